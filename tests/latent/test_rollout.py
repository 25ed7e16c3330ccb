"""The rollout against an obvious loop: values and gradients, whatever the padding, the layout or the schedule.

All in float64, where agreement to 1e-10 leaves no room for a missing term.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from coconut.latent.feedback import Feedback, Identity
from coconut.latent.thinkers import Gradient
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.types import Language, Latent, Schedule
from tests.latent.slow_rollout import (
    CASES,
    IN_FLOAT64,
    ONE_BLOCK,
    ONE_BLOCK_LENGTHS,
    ONE_LAYER,
    WAYS,
    WAYS_UNREAD,
    Marker,
    Rows,
    assert_close,
    columns_of,
    library,
    make_rows,
    program,
    scored_of,
    setup,
    valid_parts,
    weighed,
)
from tests.tiny_models import quick_jit, random_decoder


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


# --- The tests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name == "gpt2-all_scored" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_equals_the_slow_loop_in_values_and_gradients(name: str) -> None:
    decoder, feedback, rows = setup(name)
    schedule = CASES[name][1]
    (loss, seen), gradients = program(name, "slow")(decoder, feedback, rows)
    # A comparison of zeros would prove nothing. What is added to all keys moves no attention, but where it is rotated.
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        path_name = jax.tree_util.keystr(path)
        assert np.linalg.norm(leaf) > 1e-2 or (".key.bias" in path_name and "gpt2" in name), path_name
    for way in WAYS[name]:
        (own_loss, own_seen), own_gradients = program(name, way)(decoder, feedback, rows)
        assert own_loss.dtype == jnp.float64
        assert_close(own_loss, loss)
        assert_close(valid_parts(own_seen, rows, schedule), valid_parts(seen, rows, schedule))
        assert_close(own_gradients, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS_UNREAD)
def test_leaving_out_what_nobody_reads_changes_no_value_and_no_gradient(name: str) -> None:
    """The last layer's work for prompt columns; they are there in every schedule of `CASES`."""
    decoder, feedback, rows = setup(name)
    schedule = CASES[name][1]
    unread = dataclasses.replace(rows, hidden=jnp.zeros_like(rows.hidden))
    (loss, seen), gradients = program(name, "slow")(decoder, feedback, unread)
    seen["hidden"] = jnp.zeros_like(seen["hidden"])
    for way in WAYS_UNREAD[name]:
        (own_loss, own_seen), own_gradients = program(name, way)(decoder, feedback, unread)
        assert_close(own_loss, loss)
        assert_close(valid_parts(own_seen, rows, schedule), valid_parts(seen, rows, schedule))
        assert_close(own_gradients, gradients)


@pytest.mark.slow
def test_pause_tokens_in_passes_of_their_own_are_pause_tokens_in_one() -> None:
    """Multi-pass pause, the control with as many sequential passes as Coconut, is the pause control to the last digit.

    Attention is causal and keys are kept: when a marker is read changes nothing of what it sees.
    """
    schedule, token = ONE_BLOCK, 7
    decoder = random_decoder(dataclasses.replace(ONE_LAYER, **IN_FLOAT64))
    rows = make_rows(schedule, ONE_BLOCK_LENGTHS, decoder.config)
    latent = columns_of(schedule, Latent)
    paused = dataclasses.replace(rows, tokens=jnp.where(latent, token, rows.tokens))
    one_pass: Schedule = (Language(5, 1), Language(3), Language(4, 3))

    def loss(decoder: Decoder, feedback: Feedback, schedule: Schedule) -> tuple[Array, Array]:
        seen = library(decoder, feedback, paused, schedule)
        return jnp.sum(seen.hidden * rows.hidden) + jnp.sum(seen.logits * rows.logits[:, scored_of(schedule)]), (
            seen.hidden * rows.valid[..., None]
        )

    results = [
        quick_jit(jax.value_and_grad(lambda decoder, f=f, s=s: loss(decoder, f, s), has_aux=True))(decoder)
        for f, s in ((Marker(token), schedule), (Identity(), one_pass))
    ]
    assert_close(*results)


def test_what_columns_that_are_not_valid_hold_does_not_matter() -> None:
    decoder, feedback, rows = setup("gpt2-one_block")
    _, schedule, lengths, _ = CASES["gpt2-one_block"]
    run = program("gpt2-one_block", "implicit")
    (loss, seen), gradients = run(decoder, feedback, rows)
    rng = np.random.default_rng(3)
    other = dataclasses.replace(
        rows,
        tokens=jnp.where(rows.valid, rows.tokens, rng.integers(0, 23, rows.tokens.shape)).astype(jnp.int32),
        positions=jnp.where(rows.valid, rows.positions, rng.integers(0, 32, rows.tokens.shape)).astype(jnp.int32),
    )
    (own_loss, own_seen), own_gradients = run(decoder, feedback, other)
    assert_close(own_loss, loss)
    assert_close(valid_parts(own_seen, rows, schedule), valid_parts(seen, rows, schedule))
    assert_close(own_gradients, gradients)
    # Tokens of latent columns are not read, either.
    latent = columns_of(schedule, Latent)
    (own_loss, _), own_gradients = run(
        decoder, feedback, dataclasses.replace(rows, tokens=jnp.where(latent, 0, rows.tokens))
    )
    assert_close(own_loss, loss)
    assert_close(own_gradients, gradients)
    # Nor does a row that only fills the batch: nothing of it is valid, and its gradient is zero, not NaN.
    lengths = [*lengths[:-1], [0, 0, 0]]
    filled = make_rows(schedule, lengths, decoder.config)
    filled = dataclasses.replace(filled, last=filled.last.at[-1].set(0.0))
    _, with_filler = run(decoder, feedback, filled)
    _, with_a_row = run(decoder, feedback, dataclasses.replace(filled, valid=filled.valid.at[-1].set(True)))
    assert_close(with_filler, with_a_row)


@pytest.mark.slow
def test_each_row_alone_and_unpadded_equals_the_row_in_its_batch() -> None:
    decoder, feedback, rows = setup("gpt2-one_block")
    _, schedule, lengths, _ = CASES["gpt2-one_block"]
    # The first row needs no padding in the batch either: it only stands beside the others.
    assert np.all(rows.valid[0])
    weights = {name: getattr(rows, name).at[0].set(0.0) for name in ("hidden", "logits", "thoughts", "last")}
    rows = dataclasses.replace(rows, **weights)
    (_, seen), gradients = program("gpt2-one_block", "implicit")(decoder, feedback, rows)
    scored = scored_of(schedule)
    latent = np.flatnonzero(columns_of(schedule, Latent))
    total = None
    for index, row_lengths in list(enumerate(lengths))[1:]:
        columns = np.flatnonzero(rows.valid[index])
        own = jax.tree.map(lambda x, i=index, c=columns: x[i : i + 1, c], dataclasses.replace(rows, last=rows.hidden))
        own = dataclasses.replace(own, last=rows.last[index : index + 1])
        spans: list[Language | Latent] = []
        start = 0
        for span, length in zip(schedule, row_lengths, strict=True):
            stop = start + span.length
            if length and isinstance(span, Language):
                spans.append(Language(length, int(np.isin(columns, scored[(scored >= start) & (scored < stop)]).sum())))
            elif length:
                spans.append(Latent(length))
            start = stop
        alone_schedule = tuple(spans)

        def loss(decoder: Decoder, own: Rows, schedule: Schedule = alone_schedule) -> tuple[Array, dict[str, Array]]:
            alone = library(decoder, feedback, own, schedule)
            return weighed(alone, own, schedule), vars(alone)

        (_, alone), own_gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(decoder, own)
        in_batch = {
            "hidden": seen["hidden"][index, columns],
            "logits": seen["logits"][index, np.isin(scored, columns)],
            "thoughts": seen["thoughts"][index, np.isin(latent, columns)],
            "last": seen["last"][index],
        }
        assert_close({name: value[0] for name, value in alone.items()}, in_batch)
        total = own_gradients if total is None else jax.tree.map(jnp.add, total, own_gradients)
    assert_close(total, gradients[0])


@pytest.mark.slow
def test_layouts_and_rematerialisation_give_the_same_values_and_gradients() -> None:
    template, feedback, rows = setup("gpt2-one_block")

    def derive(changes: dict[str, Any], rows: Rows, every_hidden: bool) -> tuple[Array, Any]:
        dropout = changes.get("dropout", 0.0)
        execution = {name: value for name, value in changes.items() if name != "dropout"}
        model = with_config(template, dataclasses.replace(template.config, dropout=dropout), **execution)
        loss = lambda model: weighed(
            library(model, feedback, rows, ONE_BLOCK, every_hidden=every_hidden), rows, ONE_BLOCK
        )
        value, gradients = quick_jit(jax.value_and_grad(loss))(model)
        return value, by_layer(gradients)

    unread = dataclasses.replace(rows, hidden=jnp.zeros_like(rows.hidden))
    for way, seen_rows, layouts in (
        ("implicit", rows, ({"remat": "dots"}, {"scan_layers": True, "remat": "full"})),
        # The last layer of a stack that is scanned, or that may drop units, leaves nothing out.
        ("implicit, read", unread, ({"remat": "full"}, {"scan_layers": True}, {"dropout": 0.5})),
    ):
        (value, _), (gradients, _) = program("gpt2-one_block", way)(template, feedback, seen_rows)
        for changes in layouts:
            own_value, own_gradients = derive(changes, seen_rows, "read" not in way)
            assert_close(own_value, value)
            assert_close(own_gradients, by_layer(gradients))


def by_layer(model: Decoder) -> dict[str, Any]:
    """The parameters in plain dictionaries, layer by layer in either layout."""
    leaves = lambda tree: {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    layers: Any = model.layers
    if model.execution.scan_layers:
        layers = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(model.config.num_layers)]
    outside = {name: leaf for name, leaf in leaves(model).items() if not name.startswith(".layers")}
    return {"outside": outside, "layers": [leaves(layer) for layer in layers]}


def with_config(model: Decoder, config: DecoderConfig, **execution: Any) -> Decoder:
    """A decoder of another layout with the parameters of ``model``, whose layers are unstacked."""
    other = random_decoder(config, 5, **execution)
    layers = list(cast(Any, model.layers))
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    if other.execution.scan_layers:
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        leaves |= {
            ".layers" + jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(stacked)[0]
        }
    paths, structure = jax.tree_util.tree_flatten_with_path(other)
    return jax.tree.unflatten(structure, [leaves[jax.tree_util.keystr(path)] for path, _ in paths])


@pytest.mark.slow
def test_dropout_drops_the_same_units_in_both_gradients() -> None:
    """A thought is computed alone on the way forward and beside its neighbours on the way back."""
    config = dataclasses.replace(ONE_LAYER, dropout=0.3, **IN_FLOAT64)
    rows = make_rows(ONE_BLOCK, ONE_BLOCK_LENGTHS, config)
    decoder = random_decoder(config)

    def derive(gradient: Gradient) -> Callable[..., Any]:
        def loss(decoder: Decoder, key: Array) -> Array:
            seen = library(decoder, Identity(), rows, ONE_BLOCK, gradient, key)
            return weighed(seen, rows, ONE_BLOCK)

        return quick_jit(jax.value_and_grad(loss))

    implicit, autodiff = derive("implicit"), derive("autodiff")
    key, other = jax.random.split(jax.random.key(4))
    loss, gradients = implicit(decoder, key)
    auto_loss, auto_gradients = autodiff(decoder, key)
    assert_close(loss, auto_loss)
    assert_close(gradients, auto_gradients)
    # The same masks again, others for another key.
    assert implicit(decoder, key)[0] == loss
    assert abs(implicit(decoder, other)[0] - loss) > 1e-3
    # Finite differences know nothing of either derivative.
    leaves, structure = jax.tree.flatten(decoder)
    rng = np.random.default_rng(5)
    direction = [rng.normal(size=leaf.shape) for leaf in leaves]
    step = 1e-5
    moved = [
        implicit(
            jax.tree.unflatten(structure, [leaf + sign * step * d for leaf, d in zip(leaves, direction, strict=True)]),
            key,
        )[0]
        for sign in (1.0, -1.0)
    ]
    slope = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradients), direction, strict=True))
    assert abs((moved[0] - moved[1]) / (2 * step) - slope) <= 1e-6 * abs(slope)
