"""Which experts thoughts use and which tokens do, at a step of a run: a few numbers for the log.

`coconut inspect` looks closer at a trained model (`coconut.analysis.experts`).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.latent.rollout import rollout_batch
from coconut.methods import get_method
from coconut.methods.method import Views
from coconut.model import Parameters, Template
from coconut.models.routes import routes
from coconut.sharding import replicate
from coconut.training.config import RunConfig
from coconut.training.state import TrainState
from coconut.types import Batch, Latent

Routing = Callable[[TrainState, Views, Key[Array, ""]], Mapping[str, float]]


def make_routing(config: RunConfig, template: Template) -> Routing:
    """Builds ``routing(state, views, key)``: how a step's first microbatch uses experts, by the state behind the step.

    It is a forward pass of its own, without dropout, compiled once for each schedule. ``key`` is the run's, and draws
    tokens alone.

    Returns:
      Nothing for a model without experts, for a run that learns from samples, and for a method that trains on other
      rows than those written down. Else means over the layers that have experts. For ``tokens``, the valid columns of
      language, and where there are any for ``thoughts``:
      ``expert_evenness_...``, the entropy of the shares of the experts, divided by that of even ones; and
      ``expert_most_used_...``, the largest share. ``expert_distance`` is the total variation distance between the
      shares of thoughts and those of tokens, from 0 to 1. Few columns are never quite alike, so beside it stands
      ``expert_distance_of_tokens``, that of as many tokens, drawn at random, to the other tokens.
    """
    experts = config.decoder.experts
    if experts is None or config.drawing is not None or not get_method(config.method).reads_pages:
        return lambda state, views, key: {}
    think = get_method(config.method).think(config.options)

    @jax.jit
    def routing(parameters: Parameters, views: Views, key: Key[Array, ""]) -> Mapping[str, Array]:
        batch = jax.tree.map(lambda x: x.reshape(-1, config.microbatches, *x.shape[1:])[:, 0], views["main"])
        model = template.model(parameters)
        output = rollout_batch(model.decoder, model.feedback, batch, think=think)
        latent = np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in batch.schedule])
        inputs = model.decoder.embed(batch.tokens)
        if output.thoughts:
            inputs = inputs.at[:, latent].set(jnp.concatenate(output.thoughts, 1).astype(inputs.dtype))
        chosen = routes(model.decoder, inputs, positions=batch.positions, valid=batch.valid, members=batch.members)
        return replicate(_numbers(chosen, batch, latent, experts.count, key))

    def measured(state: TrainState, views: Views, key: Key[Array, ""]) -> Mapping[str, float]:
        found = routing(state.parameters, views, jax.random.fold_in(key, state.step))
        return {name: float(value) for name, value in jax.device_get(found).items()}

    return measured


def _numbers(
    chosen: Int[Array, "X B T J"], batch: Batch, latent: Bool[np.ndarray, " T"], count: int, key: Key[Array, ""]
) -> dict[str, Array]:
    thoughts, tokens = batch.valid & latent, batch.valid & ~latent
    columns = {"tokens": tokens} | ({"thoughts": thoughts} if latent.any() else {})
    shares = {name: expert_shares(chosen, own, count) for name, own in columns.items()}
    found = {}
    for name, own in shares.items():
        entropy = -jnp.sum(jnp.where(own > 0, own * jnp.log(jnp.where(own > 0, own, 1.0)), 0.0), -1)
        found[f"expert_evenness_{name}"] = entropy.mean() / np.log(count) if count > 1 else jnp.ones(())
        found[f"expert_most_used_{name}"] = own.max(-1).mean()
    if latent.any():
        drawn = as_many_at_random(tokens, thoughts.sum(), key)
        pairs = {
            "expert_distance": (shares["thoughts"], shares["tokens"]),
            "expert_distance_of_tokens": (
                expert_shares(chosen, drawn, count),
                expert_shares(chosen, tokens & ~drawn, count),
            ),
        }
        found |= {name: 0.5 * jnp.abs(a - b).sum(-1).mean() for name, (a, b) in pairs.items()}
    return found


def expert_shares(chosen: Int[Array, "X B T J"], columns: Bool[Array, "B T"], count: int) -> Float[Array, "X E"]:
    """The share that each expert has in what some columns choose, by layer; 0 where there are no columns."""
    loads = ((chosen[..., None] == jnp.arange(count)) & columns[..., None, None]).sum((1, 2, 3), dtype=jnp.float32)
    return loads / jnp.maximum(loads.sum(-1, keepdims=True), 1.0)


def as_many_at_random(columns: Bool[Array, "B T"], number: Int[Array, ""], key: Key[Array, ""]) -> Bool[Array, "B T"]:
    """``number`` of the columns, drawn at random; all of them where there are not so many."""
    draws = jnp.where(columns, jax.random.uniform(key, columns.shape), jnp.inf)
    ranks = jnp.argsort(jnp.argsort(draws.reshape(-1))).reshape(columns.shape)
    return columns & (ranks < number)
