"""Losses of several terms over several views: exact whatever the microbatches; what is frozen stays as it is."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from coconut.errors import CoconutError
from coconut.losses import Loss, Ratio, Term, language_loss, ratio
from coconut.methods.method import LossContext, Method, Views
from coconut.model import Model, Template, make_model, parameters_of
from coconut.training.optimizer import make_optimizer
from coconut.training.state import make_state
from coconut.training.step import make_train_step
from coconut.types import IGNORED_LABEL
from tests.tiny_models import quick_compilation, quick_jit
from tests.training.test_step import BATCH, CONFIG, KEY, METHOD, OPTIMIZER, assert_close

# Another view of the same rows: it scores the first label of each row alone, and none of every third row.
FIRST = np.asarray(BATCH.pieces == 0) & (np.cumsum(np.asarray(BATCH.pieces == 0), 1) == 1)
TEACHER = dataclasses.replace(
    BATCH, labels=jnp.where(FIRST & (np.arange(8) % 3 > 0)[:, None], BATCH.labels, IGNORED_LABEL)
)
VIEWS = {"main": BATCH, "teacher": TEACHER}
FACTORS = {"language": 1.0, "teacher": 20.0, "length": 0.5}


def parts(options: Any, decoder: Any, key: jax.Array) -> Mapping[str, Any]:
    del options
    return {"reader": {"scale": nnx.Param(1 + 0.1 * jax.random.normal(key, (decoder.embed_dim,)), axes=("embed",))}}


def loss_of_three_terms(model: Model, views: Views, context: LossContext) -> Loss:
    main, metrics = language_loss(model.decoder, views["main"], context.rollout(model, views["main"]))
    output = context.rollout(model, views["teacher"])
    read = dataclasses.replace(output, predictors=output.predictors * model.parts["reader"]["scale"][...])
    teacher, _ = language_loss(model.decoder, views["teacher"], read)
    # Weights that are no counts, and below 1 in all.
    rows = views["main"].valid.any(1)
    length = ratio(jnp.square(output.last).mean(1), 0.01 * rows)
    terms = {"language": main, "teacher": teacher, "length": length}
    return Loss({name: Term(term, FACTORS[name]) for name, term in terms.items()}, metrics)


THREE_TERMS = Method(name="three_terms", pages=METHOD.pages, parts=parts, loss=loss_of_three_terms)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def fresh(trains: Any = lambda name: True) -> tuple[Template, Any]:
    model = make_model(CONFIG, jax.random.key(2), parts=lambda decoder, key: parts(None, decoder, key))
    template = Template.of(model, trains)
    return template, make_state(template, parameters_of(model), make_optimizer(OPTIMIZER))


@pytest.mark.slow
def test_terms_add_up_exactly_over_microbatches() -> None:
    template, state = fresh()
    _, other = fresh()

    def mean(parameters: dict[str, Any]) -> jax.Array:
        terms = loss_of_three_terms(template.model(parameters), VIEWS, LossContext()).terms
        return sum(
            (FACTORS[name] * term.ratio.total / term.ratio.weight for name, term in terms.items()), jnp.zeros(())
        )

    expected = {name: np.asarray(value) for name, value in state.parameters.items()}
    adamw = optax.adamw(OPTIMIZER.learning_rate, eps=OPTIMIZER.epsilon, weight_decay=OPTIMIZER.weight_decay)
    value, gradients = quick_jit(jax.value_and_grad(mean))(expected)
    assert np.abs(gradients["reader.scale"]).max() > 1e-3
    updates, _ = adamw.update(gradients, adamw.init(expected), expected)
    expected = optax.apply_updates(expected, updates)
    rate = np.float32(OPTIMIZER.learning_rate)
    whole = make_train_step(template, THREE_TERMS, make_optimizer(OPTIMIZER))
    in_parts = make_train_step(template, THREE_TERMS, make_optimizer(OPTIMIZER), microbatches=4)
    state, metrics = whole(state, VIEWS, rate, KEY)  # pyright: ignore[reportArgumentType]
    other, other_metrics = in_parts(other, VIEWS, rate, KEY)  # pyright: ignore[reportArgumentType]
    assert_close(state.parameters, expected, 2e-6)
    assert_close(other.parameters, expected, 2e-6)
    assert_close(other_metrics, metrics, 2e-5)
    assert float(metrics["objective"].mean()) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["length"].weight) == pytest.approx(0.07)
    # Both views count.
    assert float(metrics["tokens"].total) == 2 * np.asarray(BATCH.valid).sum()


@pytest.mark.slow
def test_what_is_frozen_stays_to_the_bit_and_has_no_moments() -> None:
    template, state = fresh(lambda name: name.startswith("reader.") or name == "decoder.norm.scale")
    before = {name: np.array(value) for name, value in state.parameters.items()}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 4, "two of each parameter that is trained"
    step = make_train_step(template, THREE_TERMS, make_optimizer(OPTIMIZER))
    state, _ = step(state, VIEWS, np.float32(0.01), KEY)  # pyright: ignore[reportArgumentType]
    moved = {name for name, value in state.parameters.items() if (np.asarray(value) != before[name]).any()}
    assert moved == {"reader.scale", "decoder.norm.scale"}


@pytest.mark.slow
def test_a_term_that_weighs_nothing_counts_nothing() -> None:
    template, state = fresh()
    silent = dataclasses.replace(TEACHER, labels=jnp.full_like(TEACHER.labels, IGNORED_LABEL))
    step = make_train_step(template, THREE_TERMS, make_optimizer(OPTIMIZER), microbatches=2)
    views = {"main": silent, "teacher": TEACHER}
    state, metrics = step(state, views, np.float32(0.01), KEY)  # pyright: ignore[reportArgumentType]
    assert float(metrics["language"].weight) == 0
    expected = 20 * float(metrics["teacher"].mean()) + 0.5 * float(metrics["length"].mean())
    assert float(metrics["objective"].mean()) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["gradient_norm"].mean()) > 0


def test_a_weight_that_depends_on_the_model_is_refused() -> None:
    def loss(model: Model, views: Views, context: LossContext) -> Loss:
        own = METHOD.loss(model, views, context)
        norm = jnp.square(model.decoder.tokens.embedding[...]).sum()
        return own._replace(terms={**own.terms, "norm": Term(Ratio(norm, norm))})

    template, state = fresh()
    method = dataclasses.replace(THREE_TERMS, loss=loss)
    step = make_train_step(template, method, make_optimizer(OPTIMIZER), microbatches=2)
    with pytest.raises(CoconutError, match="weight of one of the terms language, norm depends on the model"):
        step(state, VIEWS, np.float32(0.01), KEY)  # pyright: ignore[reportArgumentType]
