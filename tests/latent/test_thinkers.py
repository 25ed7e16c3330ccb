"""Sweeps, keys and gaps against an obvious loop, values and gradients. All in float64, to 1e-10."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Key

from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback, Identity
from coconut.latent.generate import prefill, think_on
from coconut.latent.rollout import rollout
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.models.decoder import Decoder
from coconut.types import Language, Latent, Schedule
from tests.tiny_models import LLAMA_STYLE, quick_jit, random_decoder

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(LLAMA_STYLE, num_layers=1, param_dtype="float64")
MARKER = 7
BLOCKS: Schedule = (Language(3, 1), Latent(3), Language(2, 1), Latent(2), Language(2, 1))
LENGTHS = [[3, 3, 1, 2, 2], [1, 2, 0, 0, 1], [2, 0, 2, 1, 2]]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noisy:
    """A feedback that multiplies by noise, so that the noise has a part in every gradient."""

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        del decoder
        assert keys is not None and keys.shape == hidden.shape[:-1]
        draw = functools.partial(jax.random.normal, shape=hidden.shape[-1:], dtype=hidden.dtype)
        for _ in keys.shape:
            draw = jax.vmap(draw)
        return hidden * (1.0 + 0.3 * draw(keys))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch by its columns, the schedule of which is known beside it."""

    tokens: np.ndarray
    positions: np.ndarray
    valid: np.ndarray


def rows_of(schedule: Schedule, lengths: list[list[int]], seed: int = 0) -> Rows:
    """Rows that use ``lengths[row][span]`` columns: of the first span from the right, of the others from the left."""
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
    latent = np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in schedule])
    tokens = np.random.default_rng(seed).integers(0, 20, valid.shape)
    return Rows(
        np.where(latent, MARKER, tokens).astype(np.int32),
        np.where(valid, np.cumsum(valid, 1) - 1, 0).astype(np.int32),
        valid,
    )


def kept_columns(schedule: Schedule, kind: type, scored: bool = False) -> np.ndarray:
    """Which columns belong to spans of a kind, or are scored in them."""
    parts = []
    for span in schedule:
        fewest = span.length - span.scored if scored and isinstance(span, Language) else 0
        parts.append((np.arange(span.length) >= fewest) & isinstance(span, kind))
    return np.concatenate(parts)


Seen = dict[str, Array]


def roll_out(
    decoder: Decoder,
    feedback: Feedback,
    schedule: Schedule,
    rows: Rows,
    think: Thinker,
    keys: Array | None = None,
    every_hidden: bool = False,
) -> Seen:
    """What a rollout returns, zero where a row has nothing."""
    output = rollout(
        decoder,
        schedule,
        tokens=jnp.asarray(rows.tokens),
        positions=jnp.asarray(rows.positions),
        valid=jnp.asarray(rows.valid),
        feedback=feedback,
        think=think,
        keys=keys,
        every_hidden=every_hidden,
    )
    scored = rows.valid[:, kept_columns(schedule, Language, scored=True)]
    return {
        "predictors": output.predictors * scored[..., None],
        "thoughts": jnp.concatenate([jnp.zeros((len(scored), 0, CONFIG.embed_dim)), *output.thoughts], 1),
        "last": output.last,
    }


def by_loop(decoder: Decoder, feedback: Feedback, schedule: Schedule, rows: Rows, count: int) -> Seen:
    """PCCoT as its definition reads: every pass is over everything, and every row is on its own.

    A row's inputs are its tokens' embeddings, those of the marker in latent columns. A sweep of a block sets them to
    what the states before them make, all at once; blocks are taken one after the other.
    """
    seen: dict[str, list[Array]] = {"predictors": [], "thoughts": [], "last": []}
    latent, scored = kept_columns(schedule, Latent), kept_columns(schedule, Language, scored=True)
    spans = np.repeat(np.arange(len(schedule)), [span.length for span in schedule])
    for tokens, valid in zip(rows.tokens, rows.valid, strict=True):
        own = np.flatnonzero(valid)
        inputs = decoder.embed(jnp.asarray(tokens[own]))[None]
        everything = {"positions": jnp.arange(len(own))[None], "valid": jnp.ones((1, len(own)), bool)}
        run = lambda inputs, everything=everything: decoder.trunk(inputs, **everything)[0][0]
        for span in np.unique(spans[latent]):
            block = np.flatnonzero(spans[own] == span)
            if len(block) and count:
                sweep = lambda inputs, _, block=block, run=run: (
                    inputs.at[0, block].set(feedback(decoder, run(inputs)[block - 1])),
                    None,
                )
                inputs, _ = jax.lax.scan(sweep, inputs, length=count)
        states = jnp.concatenate([jnp.zeros((1, CONFIG.embed_dim)), run(inputs)])
        place = np.cumsum(valid) - valid  # of each column in its row, and where the state before it stands in `states`
        seen["predictors"].append(states[place[scored]] * valid[scored, None])
        padded = jnp.concatenate([inputs[0], jnp.zeros((1, CONFIG.embed_dim))])
        seen["thoughts"].append(padded[np.where(valid, place, len(own))[latent]])
        seen["last"].append(states[-1])
    return {name: jnp.stack(parts) for name, parts in seen.items()}


def derived(see: Callable[[Decoder], Seen], decoder: Decoder) -> Any:
    """What is seen, and the gradient of a loss to which all of it contributes."""

    def loss(decoder: Decoder) -> tuple[Array, Seen]:
        seen, total = see(decoder), jnp.zeros(())
        for index, name in enumerate(sorted(seen)):
            weights = np.random.default_rng(index).normal(size=seen[name].shape)
            total = total + jnp.sum(seen[name] * weights)
        return total, seen

    gradients, seen = quick_jit(jax.grad(loss, has_aux=True))(decoder)
    return seen, gradients


def assert_close(ours: Any, theirs: Any) -> None:
    """Every leaf agrees, relative to its own norm."""
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-10 * max(np.linalg.norm(b), 0.1), jax.tree_util.keystr(path)


@pytest.fixture
def decoder() -> Decoder:
    return random_decoder(CONFIG, seed=2)


@functools.cache
def of_blocks(think: Thinker) -> Any:
    """Values and gradients of `BLOCKS`, compiled once."""
    rows = rows_of(BLOCKS, LENGTHS)
    return derived(lambda decoder: roll_out(decoder, Identity(), BLOCKS, rows, think), random_decoder(CONFIG, seed=2))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_sweeps_equal_their_definition_row_by_row(decoder: Decoder, count: int) -> None:
    rows = rows_of(BLOCKS, LENGTHS)
    assert_close(
        of_blocks(Sweeps(count=count)),
        derived(lambda decoder: by_loop(decoder, Identity(), BLOCKS, rows, count), decoder),
    )


def test_as_many_sweeps_as_thoughts_equal_thoughts_one_by_one() -> None:
    assert_close(of_blocks(Sweeps(count=3)), of_blocks(OneByOne()))
    # Fewer do not, in values as in gradients: the comparison is one of thoughts that matter.
    for fewer, all_of_them in zip(of_blocks(Sweeps(count=2)), of_blocks(OneByOne()), strict=True):
        with pytest.raises(AssertionError):
            assert_close(fewer, all_of_them)


def test_sweeps_beyond_the_thoughts_change_nothing() -> None:
    assert_close(of_blocks(Sweeps(count=9)), of_blocks(Sweeps(count=3)))


def test_without_a_sweep_the_markers_are_language() -> None:
    lengths = [[3, 3, 2], [2, 1, 1], [3, 0, 2]]
    rows = rows_of((Language(3), Latent(3), Language(2)), lengths)

    def predicted(schedule: Schedule, think: Thinker) -> Callable[[Decoder], Seen]:
        def see(decoder: Decoder) -> Seen:
            seen = roll_out(decoder, Identity(), schedule, rows, think)
            return {"predictors": seen["predictors"][:, -2:], "last": seen["last"]}

        return see

    decoder = random_decoder(CONFIG, seed=2)
    assert_close(
        derived(predicted((Language(3), Latent(3), Language(2, 2)), Sweeps(count=0)), decoder),
        derived(predicted((Language(8, 2),), OneByOne()), decoder),
    )


@pytest.mark.parametrize("think", [OneByOne(), Sweeps(count=2)])
@pytest.mark.parametrize(
    "changes", [{"scan_layers": True, "remat": "full"}, {"attention": "xla"}], ids=lambda changes: next(iter(changes))
)
def test_layouts_make_the_same_thoughts(changes: dict[str, Any], think: Thinker) -> None:
    """The kernels take no gap in a row, so that sweeps run in passes of their own there."""
    config = dataclasses.replace(CONFIG, param_dtype="float32") if "attention" in changes else CONFIG
    decoder, other = random_decoder(CONFIG, seed=2), random_decoder(config, seed=2, **changes)
    leaves = jax.tree.leaves(decoder)
    other = jax.tree.unflatten(
        jax.tree.structure(other),
        [
            leaf.reshape(like.shape).astype(like.dtype)
            for leaf, like in zip(leaves, jax.tree.leaves(other), strict=True)
        ],
    )
    rows = rows_of(BLOCKS, LENGTHS)
    result = derived(lambda decoder: roll_out(decoder, Identity(), BLOCKS, rows, think), other)
    tolerance = 2e-5 if "attention" in changes else 1e-10
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(of_blocks(think)), strict=True):
        difference = np.linalg.norm(np.asarray(ours).reshape(theirs.shape) - np.asarray(theirs))
        assert difference <= tolerance * max(np.linalg.norm(theirs), 1.0)


@pytest.mark.parametrize(
    "schedule",
    [(Language(3, 1), Latent(2), Latent(3), Language(1, 1)), (Language(2), Latent(1), Language(1), Latent(3))],
    ids=["blocks that meet", "a block at the end"],
)
def test_any_order_of_spans_equals_its_definition(decoder: Decoder, schedule: Schedule) -> None:
    lengths = [[span.length for span in schedule], [1, 1, 1, 1]]
    rows = rows_of(schedule, lengths)
    ours = lambda decoder: roll_out(decoder, Identity(), schedule, rows, Sweeps(count=2))
    assert_close(quick_jit(ours)(decoder), quick_jit(lambda d: by_loop(d, Identity(), schedule, rows, 2))(decoder))


def test_dropout_drops_the_same_units_in_every_sweep() -> None:
    decoder = random_decoder(dataclasses.replace(CONFIG, dropout=0.3), seed=2)
    rows = rows_of(BLOCKS, LENGTHS)

    def last(decoder: Decoder, think: Thinker) -> Array:
        places = {"positions": jnp.asarray(rows.positions), "valid": jnp.asarray(rows.valid)}
        options = {"tokens": jnp.asarray(rows.tokens), "think": think, "dropout_key": jax.random.key(3)}
        return rollout(decoder, BLOCKS, **places, **options).last

    run = quick_jit(last, static_argnums=1)
    assert_close(run(decoder, OneByOne()), run(decoder, Sweeps(count=3)))


# --- Feedbacks that draw ------------------------------------------------------------------------------------------


def test_noise_is_the_same_however_a_thought_is_made(decoder: Decoder) -> None:
    rows, keys = rows_of(BLOCKS, LENGTHS), jax.random.split(jax.random.key(5), len(LENGTHS))
    results = [
        derived(lambda decoder, think=think: roll_out(decoder, Noisy(), BLOCKS, rows, think, keys), decoder)
        for think in (OneByOne(), Sweeps(count=3))
    ]
    assert_close(*results)
    thoughts = results[0][0]["thoughts"]
    other_keys = jax.random.split(jax.random.key(6), len(LENGTHS))
    other = quick_jit(lambda decoder: roll_out(decoder, Noisy(), BLOCKS, rows, OneByOne(), other_keys))(decoder)
    assert np.abs(thoughts - other["thoughts"]).max() > 0.01


def test_noise_of_a_row_knows_neither_its_neighbours_nor_its_padding(decoder: Decoder) -> None:
    schedule: Schedule = (Language(3, 1), Latent(3), Language(2, 1))
    alone: Schedule = (Language(2, 1), Latent(2), Language(2, 1))
    keys = jax.random.split(jax.random.key(5), 2)
    rows, row = rows_of(schedule, [[3, 3, 2], [2, 2, 2]]), rows_of(alone, [[2, 2, 2]])
    row = dataclasses.replace(row, tokens=rows.tokens[1:, np.flatnonzero(rows.valid[1])])
    in_batch = quick_jit(lambda decoder: roll_out(decoder, Noisy(), schedule, rows, OneByOne(), keys))(decoder)
    by_itself = quick_jit(lambda decoder: roll_out(decoder, Noisy(), alone, row, OneByOne(), keys[1:]))(decoder)
    assert_close(by_itself["last"][0], in_batch["last"][1])
    assert_close(by_itself["thoughts"][0], in_batch["thoughts"][1, :2])


# --- Blocks that a prefix holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("think", [OneByOne(), Sweeps(count=0), Sweeps(count=2)])
def test_given_blocks_are_thought_as_in_the_rollout(decoder: Decoder, think: Thinker) -> None:
    """Any number of them, with text between, in rows that lack some; also where the feedback draws."""
    rows, keys = rows_of(BLOCKS, LENGTHS), jax.random.split(jax.random.key(5), len(LENGTHS))
    expected = quick_jit(lambda decoder: roll_out(decoder, Noisy(), BLOCKS, rows, think, keys))(decoder)
    prefix, thoughts, start = None, [], 0
    for index, span in enumerate(BLOCKS):
        columns = slice(start, start + span.length)
        if isinstance(span, Language):
            prefix = prefill(decoder, rows.tokens[:, columns], rows.valid[:, columns], prefix)
        else:
            assert prefix is not None
            counts = np.asarray([row[index] for row in LENGTHS], np.int32)
            options = {"room": span.length, "think": think, "latent_id": MARKER, "keys": keys}
            prefix, made = think_on(decoder, Noisy(), prefix, counts, **options)
            thoughts.append(made)
        start += span.length
    assert prefix is not None
    assert_close(jnp.concatenate(thoughts, 1), expected["thoughts"])
    assert_close(prefix.last, expected["last"])
    assert prefix.length.tolist() == [sum(row) for row in LENGTHS]


def test_sweeps_without_the_marker_they_start_from_are_an_error(decoder: Decoder) -> None:
    prefix = prefill(decoder, np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    with pytest.raises(CoconutError, match=r"Sweeps\(count=2\): a block starts from the latent marker"):
        think_on(decoder, Identity(), prefix, np.ones(1, np.int32), room=1, think=Sweeps(count=2))


# --- Gaps in a row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("think", "count"), [(OneByOne(), 2), (Sweeps(count=1), 1)])
def test_what_predicts_a_column_is_the_valid_column_before_it(decoder: Decoder, think: Thinker, count: int) -> None:
    """Also where a span is not filled from the left, or has a gap before a column that is scored."""
    schedule: Schedule = (Language(4, 2), Latent(2), Language(4, 3), Language(2, 2))
    rows = rows_of(schedule, [[span.length for span in schedule]] * 3)
    valid = np.ones(rows.valid.shape, bool)
    valid[0, [1, 2, 6, 9]] = False  # gaps, and a span that starts late
    valid[1, [3, 5, 6, 7]] = False  # a gap as wide as its span's scored columns
    valid[2, [0, 1, 2, 6, 7, 8, 9]] = False  # a scored column with nothing before it, and a span the row lacks
    rows = Rows(rows.tokens, np.where(valid, np.cumsum(valid, 1) - 1, 0).astype(np.int32), valid)
    expected = quick_jit(lambda decoder: by_loop(decoder, Identity(), schedule, rows, count))(decoder)
    for every_hidden in (False, True):
        see = functools.partial(roll_out, every_hidden=every_hidden)
        assert_close(quick_jit(lambda d, see=see: see(d, Identity(), schedule, rows, think))(decoder), expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sweeps(count=-1), r"Sweeps\.count = -1: must be at least 0"),
        (lambda: Sweeps(count=1.5), r"Sweeps\.count = 1\.5: must be int"),  # pyright: ignore[reportArgumentType]
        (lambda: OneByOne(gradient="exact"), r"OneByOne\.gradient = 'exact'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_thinker_out_of_range_is_named_with_its_field(make: Callable[[], Thinker], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        make()
