"""A rollout as an obvious loop, and ours in each way it can be run, over the same rows: what tests compare."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from coconut.latent.feedback import Feedback, Identity
from coconut.latent.rollout import rollout
from coconut.latent.thinkers import Gradient, OneByOne
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.types import Language, Latent, Schedule
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE, quick_jit, random_decoder

TOLERANCE = 1e-10
IN_FLOAT64 = {"param_dtype": "float64"}


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True)
class ProjectionAndMix:
    """A feedback with a parameter of its own that also reads the decoder's: a projection plus an embedding mix."""

    projection: Array

    def __call__(self, decoder: Decoder, hidden: Array, *, keys: Array | None = None) -> Array:
        belief = jax.nn.softmax(decoder.unembed(hidden))
        return hidden @ self.projection + belief @ decoder.tokens.embedding[...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marker:
    """A feedback that feeds nothing back: every thought is the embedding of one token."""

    token: int = dataclasses.field(metadata={"static": True})

    def __call__(self, decoder: Decoder, hidden: Array, *, keys: Array | None = None) -> Array:
        return jnp.broadcast_to(decoder.embed(jnp.asarray(self.token)), hidden.shape)


# --- Rows and a loss that looks at everything -------------------------------------------------------------------


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch, and random weights of each of its outputs; those of columns that are not valid are zero."""

    tokens: Any
    positions: Any
    valid: Any
    hidden: Any
    logits: Any
    thoughts: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class Seen:
    """What both ways of rolling out return: hidden states, log-probabilities of scored columns, thoughts, last.

    Hidden states are zeros where they were not asked for.
    """

    hidden: Array
    logits: Array
    thoughts: Array
    last: Array


def columns_of(schedule: Schedule, kind: type) -> np.ndarray:
    return np.concatenate([np.full(span.length, isinstance(span, kind)) for span in schedule])


def scored_of(schedule: Schedule) -> np.ndarray:
    """The columns whose predictors a rollout returns, in order."""
    last = [span.scored if isinstance(span, Language) else 0 for span in schedule]
    kept = [np.arange(span.length) >= span.length - n for span, n in zip(schedule, last, strict=True)]
    return np.flatnonzero(np.concatenate(kept))


def make_rows(schedule: Schedule, lengths: list[list[int]], config: DecoderConfig, *, seed: int = 0) -> Rows:
    """Rows that use ``lengths[row][span]`` columns of each span: of the first from the right, else from the left."""
    valid = np.asarray(
        [
            np.concatenate(
                [
                    np.arange(span.length) >= span.length - own if index == 0 else np.arange(span.length) < own
                    for index, (span, own) in enumerate(zip(schedule, row, strict=True))
                ]
            )
            for row in lengths
        ]
    )
    rng = np.random.default_rng(seed)
    is_scored = np.isin(np.arange(valid.shape[1]), scored_of(schedule))
    weigh = lambda width, where: rng.normal(size=(*valid.shape, width)) * where[..., None]
    D, V = config.embed_dim, config.vocabulary
    return jax.tree.map(
        jnp.asarray,
        Rows(
            tokens=rng.integers(0, V, valid.shape).astype(np.int32),
            positions=np.where(valid, np.cumsum(valid, 1) - 1, 0).astype(np.int32),
            valid=valid,
            hidden=weigh(D, valid),
            logits=weigh(V, valid & is_scored),
            thoughts=weigh(D, valid & columns_of(schedule, Latent)),
            last=rng.normal(size=(len(lengths), D)),
        ),
    )


def weighed(seen: Seen, rows: Rows, schedule: Schedule) -> Array:
    """A loss to which every valid output contributes, row by row."""
    thoughts = rows.thoughts[:, columns_of(schedule, Latent)]
    return (
        jnp.sum(seen.hidden * rows.hidden)
        + jnp.sum(seen.logits * rows.logits[:, scored_of(schedule)])
        + jnp.sum(seen.thoughts * thoughts)
        + jnp.sum(seen.last * rows.last)
    )


def library(
    decoder: Decoder,
    feedback: Feedback,
    rows: Rows,
    schedule: Schedule,
    gradient: Gradient = "implicit",
    dropout_key: Array | None = None,
    every_hidden: bool = True,
) -> Seen:
    """What `rollout` returns."""
    output = rollout(
        decoder,
        schedule,
        tokens=rows.tokens,
        positions=rows.positions,
        valid=rows.valid,
        feedback=feedback,
        think=OneByOne(gradient=gradient),
        dropout_key=dropout_key,
        every_hidden=every_hidden,
    )
    assert (output.hidden is not None) == every_hidden
    hidden = jnp.zeros(rows.hidden.shape) if output.hidden is None else output.hidden
    thoughts = jnp.concatenate([hidden[:, :0], *output.thoughts], 1)
    return Seen(hidden, jax.nn.log_softmax(decoder.unembed(output.predictors)), thoughts, output.last)


def slow_loop(decoder: Decoder, feedback: Feedback, rows: Rows, schedule: Schedule) -> Seen:
    """The definition: before each thought everything is run again, for the column before it; then once more."""
    batch, total = rows.tokens.shape
    # For each column the last valid one before it, for the end the last valid one of all.
    own = jnp.where(rows.valid, jnp.arange(total), -1)
    before = jnp.concatenate([jnp.full((batch, 1), -1), jax.lax.cummax(own, axis=1)], 1)
    pick = lambda hidden, column: jnp.where(
        (before[:, column] >= 0)[:, None], hidden[jnp.arange(batch), jnp.maximum(before[:, column], 0)], 0.0
    )

    def run(inputs: Array) -> Array:
        return decoder.trunk(inputs, positions=rows.positions, valid=rows.valid)[0]

    def think(inputs: Array, column: Array) -> tuple[Array, None]:
        thought = feedback(decoder, pick(run(inputs), column))
        return inputs.at[:, column].set(jnp.where(rows.valid[:, column, None], thought, 0.0)), None

    latent = jnp.asarray(np.flatnonzero(columns_of(schedule, Latent)))
    inputs, _ = jax.lax.scan(think, decoder.embed(rows.tokens), latent)
    hidden = run(inputs)
    predictors = jnp.stack([pick(hidden, column) for column in scored_of(schedule)], 1)
    return Seen(
        hidden,
        jax.nn.log_softmax(decoder.unembed(predictors)),
        inputs[:, columns_of(schedule, Latent)],
        pick(hidden, total),
    )


# --- Programs, each compiled once -------------------------------------------------------------------------------

ONE_BLOCK: Schedule = (Language(5, 1), Latent(3), Language(4, 3))
ONE_BLOCK_LENGTHS = [[5, 3, 4], [3, 1, 2], [2, 0, 1]]
# Thoughts, then language that is forced upon the model and may be missing, then thoughts again.
TWO_BLOCKS: Schedule = (Language(4), Latent(2), Language(2, 1), Latent(2), Language(3, 2))
TWO_BLOCKS_LENGTHS = [[4, 2, 2, 2, 3], [2, 0, 1, 1, 2], [3, 1, 0, 2, 1], [1, 2, 2, 0, 3]]
# What stands directly behind thoughts, of which a row may lack the last one or all, is scored, too.
ALL_SCORED: Schedule = (Language(3), Latent(2), Language(2, 2))
ALL_SCORED_LENGTHS = [[3, 2, 2], [2, 1, 2], [3, 0, 1]]

ONE_LAYER = dataclasses.replace(GPT2_STYLE, num_layers=1)
ONE_LLAMA_LAYER = dataclasses.replace(LLAMA_STYLE, num_layers=1)

CASES: dict[str, tuple[DecoderConfig, Schedule, list[list[int]], bool]] = {
    "gpt2-one_block": (GPT2_STYLE, ONE_BLOCK, ONE_BLOCK_LENGTHS, False),
    "gpt2-all_scored": (ONE_LAYER, ALL_SCORED, ALL_SCORED_LENGTHS, False),
    "gpt2-two_blocks": (ONE_LAYER, TWO_BLOCKS, TWO_BLOCKS_LENGTHS, False),
    "llama-two_blocks-own_parameters": (ONE_LLAMA_LAYER, TWO_BLOCKS, TWO_BLOCKS_LENGTHS, True),
}
# Both gradients of one block, of two blocks, and where the last layer leaves work out; elsewhere the one that is used.
WAYS = {name: ("implicit",) for name in CASES} | {
    "gpt2-one_block": ("implicit", "autodiff"),
    "gpt2-two_blocks": ("implicit", "autodiff"),
}
WAYS_UNREAD = {
    "gpt2-one_block": ("implicit, read", "autodiff, read"),
    "gpt2-all_scored": ("implicit, read",),
    "llama-two_blocks-own_parameters": ("implicit, read",),
}


def feedback_of(name: str) -> Feedback:
    if not CASES[name][3]:
        return Identity()
    D = CASES[name][0].embed_dim
    return ProjectionAndMix(jnp.asarray(np.random.default_rng(9).normal(size=(D, D)) * D**-0.5))


def setup(name: str) -> tuple[Decoder, Feedback, Rows]:
    config, schedule, lengths, _ = CASES[name]
    config = dataclasses.replace(config, **IN_FLOAT64)
    seed = zlib.crc32(name.encode()) % 1000
    return random_decoder(config, seed), feedback_of(name), make_rows(schedule, lengths, config, seed=seed)


@functools.cache
def program(name: str, way: str) -> Callable[..., Any]:
    """(decoder, feedback, rows) -> ((loss, what was seen), gradients of decoder and feedback)."""
    schedule = CASES[name][1]

    def loss(decoder: Decoder, feedback: Feedback, rows: Rows) -> tuple[Array, dict[str, Array]]:
        if way == "slow":
            seen = slow_loop(decoder, feedback, rows, schedule)
        else:
            gradient = "autodiff" if "autodiff" in way else "implicit"
            seen = library(decoder, feedback, rows, schedule, gradient, every_hidden="read" not in way)
        return weighed(seen, rows, schedule), vars(seen)

    return quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    """Every leaf agrees, relative to its own norm."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all(), path
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 0.1), jax.tree_util.keystr(path)


def valid_parts(seen: dict[str, Array], rows: Rows, schedule: Schedule) -> dict[str, Array]:
    """What was seen, zero where it means nothing."""
    scored = rows.valid[:, scored_of(schedule), None]
    latent = rows.valid[:, columns_of(schedule, Latent), None]
    return {
        "hidden": jnp.where(rows.valid[..., None], seen["hidden"], 0.0),
        "logits": jnp.where(scored, seen["logits"], 0.0),
        # Not masked where unused: both promise zeros there.
        "thoughts": seen["thoughts"] + 0 * latent,
        "last": seen["last"],
    }
