"""The train step: one update whatever the microbatches, AdamW as optax has it, and the learning rate's shapes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.losses import Loss, Ratio, Term
from coconut.methods import METHODS
from coconut.methods.method import LossContext, LossFunction, Views
from coconut.model import Model, Template, parameters_of
from coconut.tokenizers import symbol_tokenizer
from coconut.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from coconut.training.state import TrainState, make_state, restart_optimizer
from coconut.training.step import make_train_step
from coconut.types import Batch
from tests.tiny_models import GPT2_STYLE, quick_compilation, quick_jit, random_decoder
from tests.tiny_pages import aligned, one_block, thinking_page

METHOD = METHODS["coconut"]
CONFIG = dataclasses.replace(GPT2_STYLE, num_layers=1)
# With an epsilon as large as the gradients the update shows their scale, which Adam's first step would hide.
OPTIMIZER = OptimizerConfig(learning_rate=0.01, epsilon=0.1, weight_decay=0.3)
KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def make_batch() -> Batch:
    """Rows with one to eight labels, sorted, so that no two of four microbatches weigh the same; the last is empty."""
    tokenizer = symbol_tokenizer([str(number) for number in range(CONFIG.vocabulary - 4)])
    rng = np.random.default_rng(1)
    draw = lambda length: rng.integers(0, 19, length).astype(np.int32)
    pages = [thinking_page(tokenizer, draw(2 + index % 3), index % 3, draw(1 + index)) for index in range(7)]
    return jax.tree.map(jnp.asarray, aligned([*pages, None], one_block(5, 2, 8), tokenizer))


BATCH = make_batch()
VIEWS = {"main": BATCH}


def fresh(config=CONFIG, optimizer: OptimizerConfig = OPTIMIZER) -> tuple[Template, TrainState]:
    """A template, and a state of its own: a step eats the state it is given."""
    model = Model(random_decoder(config, seed=2), {"feedback": Identity()})
    template = Template.of(model)
    return template, make_state(template, parameters_of(model), make_optimizer(optimizer))


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_microbatches_change_nothing_and_the_update_is_optax_adamws():
    """Rows have different numbers of labels: a mean of the microbatches' means would be another update."""
    template, state = fresh()
    expected = jax.tree.map(np.asarray, state.parameters)
    adamw = optax.adamw(OPTIMIZER.learning_rate, eps=OPTIMIZER.epsilon, weight_decay=OPTIMIZER.weight_decay)
    adamw_state = adamw.init(expected)
    mean = lambda parameters: (
        METHOD.loss(template.model(parameters), VIEWS, LossContext()).terms["language"].ratio.mean()
    )
    derive = quick_jit(jax.grad(mean))
    whole = make_train_step(template, METHOD, make_optimizer(OPTIMIZER))
    in_parts = make_train_step(template, METHOD, make_optimizer(OPTIMIZER), microbatches=4)
    _, other = fresh()
    rate = np.float32(OPTIMIZER.learning_rate)
    for step in range(3):
        gradients = derive(expected)
        updates, adamw_state = adamw.update(gradients, adamw_state, expected)
        expected = optax.apply_updates(expected, updates)
        given = state
        state, metrics = whole(state, VIEWS, rate, KEY)  # pyright: ignore[reportArgumentType]
        other, other_metrics = in_parts(other, VIEWS, rate, KEY)  # pyright: ignore[reportArgumentType]
        assert_close(state.parameters, expected, 2e-6)
        assert_close(other.parameters, expected, 2e-6)
        assert_close(other_metrics, metrics, 2e-5)
        assert float(metrics["gradient_norm"].mean()) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
        assert float(metrics["loss"].weight) == sum(range(1, 8))
        assert int(state.step) == int(other.step) == step + 1
        # The state given in is donated: its memory is the new state's.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.parameters, given.opt_state)))


POISONED = 1000


def poisoned_loss(where: str) -> LossFunction:
    """The method's loss, but for batches that hold example `POISONED`: there the loss or its gradient is not finite."""

    def loss(model: Model, views: Views, context: LossContext) -> Loss:
        terms, metrics = METHOD.loss(model, views, context)
        own = terms["language"].ratio
        poisoned = (views["main"].examples == POISONED).any()
        if where == "loss":
            extra = jnp.where(poisoned, jnp.inf, 0.0)
        else:  # The root of zero: its value is 0, its derivative is not finite.
            root = jnp.sqrt(jnp.where(poisoned, 0 * model.decoder.tokens.embedding[...].sum(), 1.0))
            extra = root - jax.lax.stop_gradient(root)
        return Loss({"language": Term(Ratio(own.total + extra, own.weight))}, metrics)

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("where,microbatches", [("loss", 1), ("gradient", 1), ("gradient", 4)])
def test_a_step_that_is_not_finite_is_skipped_to_the_bit(where: str, microbatches: int):
    template, state = fresh()
    method = dataclasses.replace(METHOD, loss=poisoned_loss(where))
    step = make_train_step(template, method, make_optimizer(OPTIMIZER), microbatches=microbatches)
    bad = dataclasses.replace(BATCH, examples=BATCH.examples.at[3].set(POISONED))
    _, other = fresh()
    rate = np.float32(OPTIMIZER.learning_rate)
    seen = []
    for batch in (BATCH, bad, bad, BATCH):
        state, metrics = step(state, {"main": batch}, rate, KEY)  # pyright: ignore[reportArgumentType]
        seen.append(metrics)
    for _ in range(2):
        other, expected = step(other, VIEWS, rate, KEY)  # pyright: ignore[reportArgumentType]
    assert (int(state.step), int(other.step)) == (4, 2)
    for ours, theirs in zip(
        *map(jax.tree.leaves, ((state.parameters, state.opt_state), (other.parameters, other.opt_state))), strict=True
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert [float(metrics["skipped"].mean()) for metrics in seen] == [0.0, 1.0, 1.0, 0.0]
    # What was skipped weighs nothing in any other average.
    assert {
        float(x) for name, pair in seen[1].items() if name not in ("skipped", "padding", "tokens") for x in pair
    } == {0.0}
    assert_close(seen[3], expected, 0.0)


@pytest.mark.slow
def test_every_step_drops_other_units():
    template, state = fresh(dataclasses.replace(CONFIG, dropout=0.3))
    step = make_train_step(template, METHOD, make_optimizer(OPTIMIZER))

    def loss(number: int, key: jax.Array) -> float:
        given = jax.tree.map(jnp.copy, dataclasses.replace(state, step=jnp.asarray(number, jnp.int32)))
        _, metrics = step(given, VIEWS, np.float32(0.0), key)  # pyright: ignore[reportArgumentType]
        return float(metrics["loss"].mean())

    losses = [loss(0, KEY), loss(1, KEY), loss(0, jax.random.key(1))]
    assert len(set(losses)) == 3
    assert loss(1, KEY) == losses[1]


@pytest.mark.parametrize(
    "changes,reference",
    [
        ({}, optax.adamw(0.1, weight_decay=0.01)),
        ({"b1": 0.5, "b2": 0.9, "epsilon": 1e-3}, optax.adamw(0.1, 0.5, 0.9, 1e-3, weight_decay=0.01)),
        ({"weight_decay": 0.0}, optax.adam(0.1)),
        (
            {"weight_decay": 0.5, "decay_matrices_only": True},
            optax.adamw(0.1, weight_decay=0.5, mask={"matrix": True, "vector": False}),
        ),
        (
            {"clip_norm": 0.5, "epsilon": 0.1},
            optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, eps=0.1, weight_decay=0.01)),
        ),
    ],
)
def test_the_optimizer_is_adamw_up_to_the_learning_rate(changes: dict[str, Any], reference):
    optimizer = make_optimizer(OptimizerConfig(**changes))
    rng = np.random.default_rng(0)
    draw = lambda: {
        "matrix": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        "vector": jnp.asarray(rng.normal(size=3), jnp.float32),
    }
    parameters = draw()
    ours, theirs = optimizer.init(parameters), reference.init(parameters)
    for _ in range(3):
        gradients = draw()
        updates, ours = optimizer.update(gradients, ours, parameters)
        expected, theirs = reference.update(gradients, theirs, parameters)
        assert_close(jax.tree.map(lambda u: -0.1 * u, updates), expected, 1e-6)
        parameters = optax.apply_updates(parameters, expected)


def test_the_optimizers_state_can_be_made_anew():
    optimizer = make_optimizer(OPTIMIZER)
    parameters = {"w": jnp.ones((2, 2))}
    _, moments = optimizer.update({"w": jnp.ones((2, 2))}, optimizer.init(parameters), parameters)
    state = TrainState(parameters=parameters, opt_state=moments, step=jnp.asarray(5))
    again = restart_optimizer(Template({"w": None}, frozenset({"w"}), None), state, optimizer)
    assert_close(again.opt_state, optimizer.init(parameters), 0.0)
    assert int(again.step) == 5
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(moments), jax.tree.leaves(again.opt_state), strict=True))


def rates(config: OptimizerConfig, stages: tuple[int, ...] = (4, 4)) -> list[float]:
    """The learning rate of every step of a run with stages of these lengths."""
    return [
        learning_rate_at(
            config,
            step=sum(stages[:stage]) + stage_step,
            stage_step=stage_step,
            stage_steps=stages[stage],
            is_last_stage=stage == len(stages) - 1,
        )
        for stage in range(len(stages))
        for stage_step in range(stages[stage])
    ]


def test_the_shapes_of_the_learning_rate():
    constant = OptimizerConfig(learning_rate=2.0)
    assert rates(constant) == [2.0] * 8
    warmed = dataclasses.replace(constant, warmup_steps=2)
    assert rates(warmed) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    # A warm-up of the run goes on into the next stage.
    assert rates(dataclasses.replace(constant, warmup_steps=5))[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    # One of the stages has its own length, and the first stage does not have it.
    assert rates(dataclasses.replace(constant, stage_warmup_steps=4)) == pytest.approx([2.0] * 4 + [0.5, 1.0, 1.5, 2.0])
    each = dataclasses.replace(warmed, stage_warmup_steps=4)
    assert rates(each, (3, 2, 3)) == pytest.approx([1.0, 2.0, 2.0, 0.5, 1.0, 0.5, 1.0, 1.5])
    # Where both apply the lower rate holds.
    assert rates(dataclasses.replace(warmed, warmup_steps=6, stage_warmup_steps=2), (3, 4)) == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 1.0, 5 / 3, 2.0, 2.0]
    )
    # Decay belongs to the last stage alone, and to its end.
    linear = dataclasses.replace(constant, decay="linear", decay_share=1.0)
    assert rates(linear) == pytest.approx([2.0] * 4 + [2.0, 1.5, 1.0, 0.5])
    late = dataclasses.replace(linear, decay_share=0.5, final_share=0.5)
    assert rates(late) == pytest.approx([2.0] * 4 + [2.0, 2.0, 2.0, 1.5])
    cosine = dataclasses.replace(constant, decay="cosine", decay_share=1.0)
    halves = [1 + np.cos(np.pi * share) for share in (0, 0.25, 0.5, 0.75)]
    assert rates(cosine) == pytest.approx([2.0] * 4 + halves)
    # Both at once.
    both = dataclasses.replace(linear, warmup_steps=2, stage_warmup_steps=2)
    assert rates(both) == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.0, 1.5, 1.0, 0.5])
    assert rates(dataclasses.replace(linear, decay_share=0.0)) == [2.0] * 8


@pytest.mark.parametrize(
    "field,value",
    [
        ("learning_rate", 0.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("epsilon", 0.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("warmup_steps", -1),
        ("stage_warmup_steps", -1),
        ("decay_share", 1.5),
        ("final_share", -0.5),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(field: str, value: Any):
    with pytest.raises(CoconutError) as error:
        OptimizerConfig(**{field: value})
    assert f"OptimizerConfig.{field} = {value!r}" in str(error.value)
