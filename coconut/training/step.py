"""One optimizer step: pure, jitted once a schedule, its state donated."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from coconut.latent.rollout import rollout_batch
from coconut.losses import Ratio, ratio
from coconut.methods.method import Method
from coconut.sharding import constrain_tree, replicate
from coconut.training.norms import norm_metrics
from coconut.training.state import Model, Parameters, Template, TrainState
from coconut.types import Batch

Metrics = dict[str, Ratio]
TrainStep = Callable[[TrainState, Batch, float, Key[Array, ""]], tuple[TrainState, Metrics]]


def batch_loss(model: Model, method: Method, batch: Batch, dropout_key: Key[Array, ""] | None) -> tuple[Ratio, Metrics]:
    """The loss of a model on a batch, not divided yet, and its metrics with those of `norm_metrics`."""
    output = rollout_batch(model.decoder, model.feedback, batch, dropout_key)
    loss, metrics = method.loss(model.decoder, batch, output)
    return loss, metrics | norm_metrics(model.decoder, batch, output)


def _gradients(
    parameters: Parameters, template: Template, method: Method, batch: Batch, key: Key[Array, ""], microbatches: int
) -> tuple[Array, Parameters, Metrics]:
    """The loss over the whole batch, not divided, the gradients of its mean, and its metrics."""

    def total(parameters: Parameters, batch: Batch, key: Key[Array, ""]) -> tuple[Array, tuple[Array, Metrics]]:
        # The constraint's transpose keeps each gradient in its shards, those of every microbatch included.
        parameters = constrain_tree(parameters)
        loss, metrics = batch_loss(template.model(parameters), method, batch, key)
        return loss.total, (loss.weight, metrics)

    derive = jax.value_and_grad(total, has_aux=True)
    if microbatches == 1:
        (loss, (weight, metrics)), gradients = derive(parameters, batch, key)
    else:
        # Sums add up over microbatches and are divided once: the update is that of the whole batch.
        # Every so-manieth row, so that each device keeps the rows it has.
        parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(derive, parameters, first, key))

        def accumulate(sums: Any, scanned: tuple[Batch, Array]) -> tuple[Any, None]:
            part, index = scanned
            return jax.tree.map(jnp.add, sums, derive(parameters, part, jax.random.fold_in(key, index))), None

        ((loss, (weight, metrics)), gradients), _ = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(microbatches)))
    gradients = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0).astype(g.dtype), gradients)
    return loss, gradients, metrics


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
    template: Template, method: Method, optimizer: optax.GradientTransformation, *, microbatches: int = 1
) -> TrainStep:
    """Builds ``train_step(state, batch, learning_rate, key) -> (state, metrics)``.

    Compiled once for each schedule and shape of ``batch``. The state given in is donated. ``key`` is the run's own,
    the same at every step; the step number is folded in. On a mesh (`jax.set_mesh`) rows, parameters and optimizer
    are split as `coconut.sharding` says.

    A step whose loss or gradient is not finite is skipped: parameters and optimizer stay as they were, the step counts,
    and its metrics weigh nothing but for ``skipped``, the share of steps that were skipped, ``padding``, the share of
    columns that are not valid, and ``tokens``, the number of those that are.

    Args:
      template: how to make the model of the state's parameters.
      method: the method, for its loss.
      optimizer: from `coconut.training.optimizer.make_optimizer`; the learning rate is applied here.
      microbatches: parts the rows are split into, one after the other, to save memory.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, batch: Batch, learning_rate: Float[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        loss, gradients, metrics = _gradients(state.parameters, template, method, batch, key, microbatches)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # A branch: to choose element by element kept old and new state side by side, half as much memory again.
        parameters, opt_state = jax.lax.cond(
            finite,
            lambda parameters, opt_state: _updated(optimizer, gradients, opt_state, parameters, learning_rate),
            lambda parameters, opt_state: (parameters, opt_state),
            state.parameters,
            state.opt_state,
        )
        metrics["gradient_norm"] = Ratio(norm, jnp.ones_like(norm))
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
        one = jnp.ones_like(norm)
        metrics |= {
            "skipped": Ratio(1.0 - finite, one),
            "padding": ratio(1.0 - batch.valid, jnp.ones(batch.valid.shape)),
            "tokens": Ratio(jnp.sum(batch.valid, dtype=jnp.float32), one),
        }
        following = TrainState(parameters=parameters, opt_state=opt_state, step=state.step + 1)
        return constrain_tree(following), replicate(metrics)

    return train_step
