"""What training changes, and how it starts."""

import dataclasses
import fnmatch
import functools
import zlib
from collections.abc import Collection, Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, Key

from coconut.errors import CoconutError
from coconut.latent.feedback import make_feedback
from coconut.latent.halting import LinearHalt
from coconut.latent.policies.config import PART, POLICIES
from coconut.latent.scorer import DECODER_PART, HEAD_PART, ScoreHead
from coconut.methods import get_method
from coconut.model import MakeParts, Model, Parameters, Template, make_model, make_parts, parameters_of, part_of
from coconut.models.adapters import add_adapters, add_singular_values, is_trained_adapter
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.models.multi_token import MULTI_TOKEN, MultiToken
from coconut.models.singular_values import SingularValueConfig
from coconut.training.config import RunConfig
from coconut.training.spikes import SpikeConfig, SpikeWindow


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a train step reads and writes.

    Attributes:
      parameters: of the decoder and of all parts.
      opt_state: the optimizer's moments, of the parameters that are trained.
      step: optimizer steps taken.
      spikes: what a gradient is judged by where the run skips spikes; None where it does not.
    """

    parameters: Parameters
    opt_state: Any
    step: Int[Array, ""]
    spikes: SpikeWindow | None = None


def fresh_model(config: RunConfig) -> Model:
    """The model of a run, with random parameters. Traceable, which gives its shapes alone."""
    model = make_model(
        config.decoder,
        jax.random.key(config.seed),
        execution=config.execution,
        feedback=config.feedback,
        parts=_parts_of(config),
    )
    return model._replace(decoder=with_adapters(config, model.decoder))


def with_adapters(config: RunConfig, decoder: Decoder) -> Decoder:
    """The decoder with the run's adapters, fresh; the decoder itself where the run has none. Traceable.

    Raises:
      CoconutError: see `coconut.models.adapters`.
    """
    if config.adapter is None:
        return decoder
    # A key of its own, so that it moves no number of another.
    key = jax.random.fold_in(jax.random.key(config.seed), _ADAPTERS)
    if isinstance(config.adapter, SingularValueConfig):
        return add_singular_values(decoder, config.adapter, key)
    return add_adapters(decoder, config.adapter, key)


_ADAPTERS = zlib.crc32(b"adapters")


def fresh_parts(config: RunConfig) -> Mapping[str, Any]:
    """The parts of `fresh_model` without its decoder."""
    return make_parts(config.decoder, jax.random.key(config.seed), feedback=config.feedback, parts=_parts_of(config))


def _parts_of(config: RunConfig) -> MakeParts:
    def parts(decoder: DecoderConfig, key: Key[Array, ""]) -> Mapping[str, Any]:
        own = get_method(config.method).parts(config.options, decoder, key)
        drawing = _parts_to_draw(config, own, decoder, jax.random.fold_in(key, _REINFORCEMENT))
        return {**own, **drawing, **_further_tokens(config, decoder, key)}

    return parts


def _further_tokens(config: RunConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Mapping[str, Any]:
    """The module for further tokens, where its term weighs something."""
    own = config.multi_token
    if own is None or not own.weight:
        return {}
    rngs = nnx.Rngs(jax.random.fold_in(key, _FURTHER_TOKENS))
    module = MultiToken(decoder, config.execution, weight=own.weight, at_thoughts=own.at_thoughts, rngs=rngs)
    return {MULTI_TOKEN: module}


def _parts_to_draw(
    config: RunConfig, own: Mapping[str, Any], decoder: DecoderConfig, key: Key[Array, ""]
) -> Mapping[str, Any]:
    """What learning from samples adds to a model: a policy's parameters, a stop head, a copy of the model, a scorer."""
    if config.drawing is None:
        return {}
    policy = config.drawing.policy

    def added() -> dict[str, Any]:
        part = POLICIES[policy.kind].part(policy.kind_options(), decoder, key)
        parts = {} if part is None else {PART: part}
        return {**parts, "halt": LinearHalt.fresh(decoder)} if policy.learnt_stop and "halt" not in own else parts

    if config.scorer is not None:
        # The numbers of its decoder are a copy of the model's (`coconut.training.setup`).
        scorer = Decoder(decoder, config.execution, rngs=nnx.Rngs(key))
        return {**added(), DECODER_PART: scorer, HEAD_PART: ScoreHead.fresh(decoder)}
    assert config.reinforcement is not None
    if not config.reinforcement.kl_weight:
        return added()
    # What samples are made with, once more; `coconut.training.setup` copies the numbers that the run starts from.
    reference = {
        "decoder": Decoder(decoder, config.execution, rngs=nnx.Rngs(key)),
        "feedback": make_feedback(config.feedback, decoder, key),
        **({"halt": get_method(config.method).parts(config.options, decoder, key)["halt"]} if "halt" in own else {}),
        **added(),
    }
    return {**added(), REFERENCE: reference}


_REINFORCEMENT, _FURTHER_TOKENS = zlib.crc32(b"reinforcement"), zlib.crc32(b"further tokens")
REFERENCE = "reference"
"""Name of the part that keeps the model as the run found it, as far as samples are made with it."""


def train_only_parts(config: RunConfig) -> frozenset[str]:
    """Names of the parts that only training needs."""
    return get_method(config.method).train_only | {REFERENCE}


def template_of(config: RunConfig, model: Model) -> Template:
    """How to make the run's model of its parameters, and which of these it trains.

    Of a decoder with adapters it trains these, and where it trains a scorer nothing else.

    Raises:
      CoconutError: ``RunConfig.freeze`` holds a pattern that fits no parameter, or nothing is left to train.
    """
    names = parameters_of(model).keys()
    for pattern in config.freeze:
        if not fnmatch.filter(names, pattern):
            raise CoconutError(f"RunConfig.freeze = {config.freeze!r}: the model has no parameter {pattern!r}")
    trains = get_method(config.method).trains if config.scorer is None else _is_of_scorer
    frozen = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in config.freeze)
    base = lambda name: config.adapter is not None and part_of(name) == "decoder" and not is_trained_adapter(name)
    kept = lambda name: part_of(name) == REFERENCE
    template = Template.of(model, lambda name: trains(name) and not (frozen(name) or base(name) or kept(name)))
    if not template.trained:
        raise CoconutError(f"RunConfig.freeze = {config.freeze!r}: nothing is left to train")
    return template


def _is_of_scorer(name: str) -> bool:
    return part_of(name) in (DECODER_PART, HEAD_PART)


def select(parameters: Parameters, names: Collection[str]) -> Parameters:
    """The parameters of some names, in their own order."""
    return {name: value for name, value in parameters.items() if name in names}


def make_state(
    template: Template,
    parameters: Parameters,
    optimizer: optax.GradientTransformation,
    spikes: SpikeConfig | None = None,
) -> TrainState:
    """The state a run starts from, with moments for what is trained. Traceable."""
    opt_state = optimizer.init(select(parameters, template.trained))
    window = None if spikes is None else SpikeWindow.fresh(spikes.window)
    return TrainState(parameters=parameters, opt_state=opt_state, step=jnp.zeros((), jnp.int32), spikes=window)


def restart_optimizer(template: Template, state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """The state with the optimizer's moments made anew, where they were."""
    places = jax.tree.map(lambda x: x.sharding, state.opt_state)
    moving = select(state.parameters, template.trained)
    return dataclasses.replace(state, opt_state=jax.jit(optimizer.init, out_shardings=places)(moving))


def restart_spikes(state: TrainState) -> TrainState:
    """The state with an empty window of spikes, where it was; the state itself where the run skips none."""
    if state.spikes is None:
        return state
    places = jax.tree.map(lambda x: x.sharding, state.spikes)
    fresh = functools.partial(SpikeWindow.fresh, state.spikes.logarithms.size)
    return dataclasses.replace(state, spikes=jax.jit(fresh, out_shardings=places)())
