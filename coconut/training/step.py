"""One optimizer step: pure, jitted once a schedule, its state donated."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.extend.core as jax_core
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, Key

from coconut.errors import CoconutError
from coconut.losses import Loss, Ratio, ratio
from coconut.methods.method import LossContext, Method, Views
from coconut.model import Parameters, Template
from coconut.models.multi_token import MULTI_TOKEN
from coconut.sharding import constrain_tree, matrices_are_whole, replicate
from coconut.training.balancing import Loads, no_loads, rebalanced, with_tallies
from coconut.training.gathering import gathered, in_place_of
from coconut.training.spikes import SpikeConfig, judge
from coconut.training.state import TrainState, select

Metrics = dict[str, Ratio]
TrainStep = Callable[[TrainState, Views, Any, Key[Array, ""]], tuple[TrainState, Metrics]]
Weights = dict[str, Array]


def objective(loss: Loss, weights: Weights) -> Array:
    """The sum of a loss's terms: each times its factor, over its weight in the whole step, in units of `_unit`.

    The loss may be that of some of the step's rows. A term that weighs nothing counts nothing.
    """
    unit = _unit(weights)
    share = lambda weight: jnp.where(weight > 0, unit / jnp.where(weight > 0, weight, 1.0), 0.0)
    terms = [term.factor * term.ratio.total * share(weights[name]) for name, term in loss.terms.items()]
    return functools.reduce(jnp.add, terms)


def _unit(weights: Weights) -> Array:
    """What gradients and objective are divided by once, at the end: the weight of the first term, or 1."""
    first = next(iter(weights.values()))
    return jnp.where(first > 0, first, 1.0)


def term_weights(loss_of: Callable[[Parameters, Views], Loss], parameters: Parameters, views: Views) -> Weights:
    """The weight of each term over all rows, without running the model.

    Raises:
      CoconutError: a weight depends on the model, so that it is not known before it has run.
    """
    weights = lambda parameters, views: {
        name: term.ratio.weight for name, term in loss_of(parameters, views).terms.items()
    }
    traced, shapes = jax.make_jaxpr(weights, return_shape=True)(parameters, views)
    outputs, structure = jax.tree.flatten(shapes)
    # What the weights need of the whole computation; the rest is never made.
    needed, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(outputs))
    if any(used[: len(jax.tree.leaves(parameters))]):
        raise CoconutError(f"the weight of one of the terms {', '.join(shapes)} depends on the model's parameters")
    arguments = [x for x, use in zip(jax.tree.leaves((parameters, views)), used, strict=True) if use]
    return jax.tree.unflatten(structure, jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(needed, traced.consts))(*arguments))


def _gradients(
    parameters: Parameters,
    template: Template,
    method: Method,
    options: Any,
    views: Views,
    key: Key[Array, ""],
    microbatches: int,
    balanced: Collection[str],
) -> tuple[Array, Parameters, Loads, Metrics]:
    """The objective of the whole step, its gradients, the loads of the routers ``balanced``, and the metrics.

    Sums are added up over rows and microbatches, and divided once. Where there are several microbatches, each of them
    needs the weights of all before it runs.
    """
    frozen = {name: value for name, value in parameters.items() if name not in template.trained}
    whole = gathered(parameters, template.axes, template.model(parameters).decoder.execution)

    def placed(every: Parameters) -> Parameters:
        """The parameters as the model uses them; their gradients stay in shards, those of every microbatch included."""
        return constrain_tree(every, template.axes) if whole is None else in_place_of(every, whole, template.axes)

    def loss_of(trained: Parameters, loads: Loads, views: Views, key: Key[Array, ""]) -> Loss:
        model = template.model(with_tallies(placed({**trained, **frozen}), loads))
        loss = method.loss(model, views, LossContext(options=options, think=method.think(options), key=key))
        if MULTI_TOKEN in model.parts and MULTI_TOKEN not in loss.terms:
            raise CoconutError(
                f"RunConfig.multi_token: method = {method.name!r} has no such term, its loss is none of "
                "`coconut.methods.method.imitate`"
            )
        return loss

    def part(
        moved: tuple[Parameters, Loads], views: Views, key: Key[Array, ""], weights: Weights | None
    ) -> tuple[Array, tuple[Metrics, Weights]]:
        loss = loss_of(*moved, views, key)
        own = {name: jax.lax.stop_gradient(term.ratio.weight) for name, term in loss.terms.items()}
        metrics = dict(loss.metrics)
        if len(loss.terms) > 1:
            metrics |= {name: term.ratio for name, term in loss.terms.items()}
        return objective(loss, own if weights is None else weights), (metrics, own)

    trained, derive = select(parameters, template.trained), jax.value_and_grad(part, has_aux=True)
    moved = trained, no_loads(select(parameters, balanced))
    with matrices_are_whole(whole is not None):
        if microbatches == 1:
            (total, (metrics, weights)), (gradients, loads) = derive(moved, views, key, None)
        else:
            weights = term_weights(lambda trained, views: loss_of(trained, {}, views, key), trained, views)
            # Every so-manieth row, so that each device keeps the rows it has.
            parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), views)
            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(derive, moved, first, key, weights)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def accumulate(sums: Any, scanned: tuple[Views, Array]) -> tuple[Any, None]:
                rows, index = scanned
                return jax.tree.map(jnp.add, sums, derive(moved, rows, jax.random.fold_in(key, index), weights)), None

            ((total, (metrics, _)), (gradients, loads)), _ = jax.lax.scan(
                accumulate, zeros, (parts, jnp.arange(microbatches))
            )
    unit = _unit(weights)
    value = total / unit
    if len(weights) > 1:
        metrics["objective"] = Ratio(value, jnp.ones_like(value))
    return value, jax.tree.map(lambda g: g / unit.astype(g.dtype), gradients), loads, metrics


def make_loss(
    template: Template, method: Method, *, options: Any = None, microbatches: int = 1
) -> Callable[[Parameters, Views, Key[Array, ""]], Array]:
    """Builds ``loss(parameters, views, key)``: the objective of a step's first microbatch, without a gradient.

    Whether it is finite tells whether the parameters are any good.
    """
    options = method.options() if options is None else options

    @jax.jit
    def loss(parameters: Parameters, views: Views, key: Key[Array, ""]) -> Array:
        rows = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:])[:, 0], views)
        made = method.loss(
            template.model(parameters), rows, LossContext(options=options, think=method.think(options), key=key)
        )
        weights = {name: term.ratio.weight for name, term in made.terms.items()}
        return replicate(objective(made, weights) / _unit(weights))

    return loss


def _updated(
    optimizer: optax.GradientTransformation,
    gradients: Parameters,
    opt_state: Any,
    parameters: Parameters,
    learning_rate: Array,
) -> tuple[Parameters, Any]:
    updates, opt_state = optimizer.update(gradients, opt_state, parameters)
    return jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), parameters, updates), opt_state


def make_train_step(
    template: Template,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    options: Any = None,
    microbatches: int = 1,
    spikes: SpikeConfig | None = None,
    correction_rate: float = 0.0,
) -> TrainStep:
    """Builds ``train_step(state, views, learning_rate, key) -> (state, metrics)``.

    Compiled once for each schedule and shape of the views. The state given in is donated. ``key`` is the run's own, the
    same at every step; the step number is folded in. On a mesh (`jax.set_mesh`) rows, parameters and optimizer are
    split as `coconut.sharding` says.

    A step whose loss or gradient is not finite, or whose gradient is a spike (`coconut.training.spikes`), is skipped:
    parameters and optimizer stay as they were, the step counts, and its metrics weigh nothing but for ``skipped`` and
    ``spikes``, the shares of steps that were skipped and that were spikes, ``padding``, the share of columns that are
    not valid, and ``tokens``, the number of those that are, both over all views.

    Where a loss has several terms, the metrics hold each of them by its name, and their sum as ``objective``.

    Args:
      template: how to make the model of the state's parameters, and which of them are trained.
      method: the method, for its loss.
      optimizer: from `coconut.training.optimizer.make_optimizer`; the learning rate is applied here.
      options: of the method; None for its defaults.
      microbatches: parts the rows are split into, one after the other, to save memory.
      spikes: when a gradient is a spike; None where nothing is.
      correction_rate: by how much the correction biases of routers move (`coconut.training.balancing`).

    Raises:
      CoconutError: when it is traced with several microbatches: see `term_weights`.
    """
    update = make_update(
        *(template, method, optimizer),
        options=options,
        microbatches=microbatches,
        spikes=spikes,
        correction_rate=correction_rate,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, views: Views, learning_rate: Float[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        following, metrics = update(state, views, learning_rate, jax.random.fold_in(key, state.step))
        following = dataclasses.replace(following, step=state.step + 1)
        return constrain_tree(following, template.axes), replicate(metrics)

    return train_step


def skipped_of(metrics: Metrics, updates: int) -> Ratio:
    """Whether a step of several updates was skipped: one was not finite, or all were spikes. Traceable.

    Args:
      metrics: sums over the updates.
      updates: how many.
    """
    skipped = metrics["skipped"].total
    spikes = metrics["spikes"].total if "spikes" in metrics else jnp.zeros_like(skipped)
    was = ((skipped > spikes) | (skipped >= updates)).astype(jnp.float32)
    return Ratio(was, jnp.ones_like(was))


def make_update(
    template: Template,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    options: Any = None,
    microbatches: int = 1,
    spikes: SpikeConfig | None = None,
    correction_rate: float = 0.0,
) -> TrainStep:
    """Builds one update of `make_train_step`, whose arguments it has: traceable, of a state whose step it leaves."""
    options = method.options() if options is None else options
    balanced = template.balanced if correction_rate else frozenset[str]()

    def update(
        state: TrainState, views: Views, learning_rate: Float[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        value, gradients, loads, metrics = _gradients(
            *(state.parameters, template, method, options, views, key, microbatches, balanced)
        )
        norm = optax.tree.norm(gradients)
        taken = finite = jnp.isfinite(value) & jnp.isfinite(norm)
        window = state.spikes
        if spikes is not None:
            assert state.spikes is not None
            spike, behind = judge(state.spikes, jnp.where(finite, norm, 0.0), spikes)
            taken = finite & ~spike
            window = jax.tree.map(lambda a, b: jnp.where(finite, a, b), behind, state.spikes)
        # A branch: to choose element by element kept old and new state side by side, half as much memory again.
        trained, opt_state = jax.lax.cond(
            taken,
            lambda parameters, opt_state: _updated(optimizer, gradients, opt_state, parameters, learning_rate),
            lambda parameters, opt_state: (parameters, opt_state),
            select(state.parameters, template.trained),
            state.opt_state,
        )
        one = jnp.ones_like(norm)
        metrics["gradient_norm"] = Ratio(norm, one)
        metrics = jax.tree.map(lambda x: jnp.where(taken, x, 0.0), metrics)
        valid = [view.valid for view in views.values()]
        padding = [ratio(1.0 - columns, jnp.ones(columns.shape)) for columns in valid]
        tokens = [jnp.sum(columns, dtype=jnp.float32) for columns in valid]
        metrics |= {
            "skipped": Ratio(1.0 - taken, one),
            "padding": functools.reduce(lambda a, b: Ratio(a.total + b.total, a.weight + b.weight), padding),
            "tokens": Ratio(functools.reduce(jnp.add, tokens), one),
        }
        if spikes is not None:
            metrics["spikes"] = Ratio(1.0 * (finite & ~taken), one)
        biases = select(state.parameters, balanced)
        moved = jax.tree.map(lambda a, b: jnp.where(taken, a, b), rebalanced(biases, loads, correction_rate), biases)
        parameters = {**state.parameters, **trained, **moved}
        return TrainState(parameters=parameters, opt_state=opt_state, step=state.step, spikes=window), metrics

    return update
