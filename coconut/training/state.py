"""What training changes, and how it starts."""

import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, Key

from coconut.latent.feedback import Feedback
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.models.parameters import parameter_names


class Model(NamedTuple):
    """What is trained together."""

    decoder: Decoder
    feedback: Feedback


Parameters = dict[str, Any]
"""Arrays, or their abstract values, by dotted path, such as ``decoder.layers.0.attention.query.kernel``.

Between steps a model is this plain dictionary: jit flattens it in C++, optax, orbax and a reader of a checkpoint need
to know nothing of modules.
"""


@dataclasses.dataclass(frozen=True)
class Template:
    """How to make a `Model` of `Parameters`, under jit or outside."""

    names: tuple[str, ...]
    structure: Any

    @classmethod
    def of(cls, model: Model) -> "Template":
        """The template of a model, which may be abstract."""
        return cls(tuple(parameter_names(model)), jax.tree.structure(model))

    def model(self, parameters: Parameters) -> Model:
        """The model that holds ``parameters``."""
        return jax.tree.unflatten(self.structure, [parameters[name] for name in self.names])


def parameters_of(model: Model) -> Parameters:
    """The parameters of a model by name."""
    return dict(zip(parameter_names(model), jax.tree.leaves(model), strict=True))


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a train step reads and writes.

    Attributes:
      parameters: of the decoder and the feedback.
      opt_state: the optimizer's moments.
      step: optimizer steps taken.
    """

    parameters: Parameters
    opt_state: Any
    step: Int[Array, ""]


def make_model(config: DecoderConfig, feedback: Feedback, key: Key[Array, ""]) -> Model:
    """A model with fresh parameters, a function of ``key`` alone. Traceable: `jax.eval_shape` gives it abstractly."""
    return Model(Decoder(config, rngs=nnx.Rngs(key)), feedback)


def make_state(parameters: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """The state a run starts from. Traceable."""
    return TrainState(parameters=parameters, opt_state=optimizer.init(parameters), step=jnp.zeros((), jnp.int32))


def restart_optimizer(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """The state with the optimizer's moments made anew, where they were."""
    places = jax.tree.map(lambda x: x.sharding, state.opt_state)
    return dataclasses.replace(state, opt_state=jax.jit(optimizer.init, out_shardings=places)(state.parameters))
