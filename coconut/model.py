"""Everything that has parameters, made in one place: the decoder, and the parts that a run adds to it.

A part is any JAX pytree. Checkpoints, sharding, the optimizer and the tables of a plan see parameters by their names,
and need to know nothing of a part they never heard of.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Key

from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback, FeedbackConfig, make_feedback
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.experts import is_correction, kernel_beside
from coconut.models.parameters import parameter_axes, parameter_names
from coconut.sharding import Axes


class Model(NamedTuple):
    """What is trained together.

    Attributes:
      decoder: the decoder.
      parts: the rest by name. ``feedback`` (`coconut.latent.feedback.Feedback`) is always among them.
    """

    decoder: Decoder
    parts: Mapping[str, Any]

    @property
    def feedback(self) -> Feedback:
        """How a hidden state becomes the next thought."""
        return self.parts["feedback"]


MakeParts = Callable[[DecoderConfig, Key[Array, ""]], Mapping[str, Any]]
"""(the decoder's config, key) -> what a method adds to the model, by name. Traceable."""


def make_parts(
    config: DecoderConfig,
    key: Key[Array, ""],
    *,
    feedback: FeedbackConfig = FeedbackConfig(),  # noqa: B008 - immutable
    parts: MakeParts = lambda config, key: {},
) -> Mapping[str, Any]:
    """The feedback and the parts of a method, with fresh parameters. Traceable.

    Raises:
      CoconutError: a part has a name that is taken, or that is no name.
    """
    # A key for each, so that one more part moves no number of another.
    own_key = lambda name: jax.random.fold_in(key, zlib.crc32(name.encode()))
    added = parts(config, own_key("parts"))
    for name in added:
        if name in ("decoder", "feedback") or not name.isidentifier():
            raise CoconutError(f"a method's part cannot be named {name!r}: the name is taken, or is none")
    return {"feedback": make_feedback(feedback, config, own_key("feedback")), **added}


def make_model(
    config: DecoderConfig,
    key: Key[Array, ""],
    *,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - immutable
    feedback: FeedbackConfig = FeedbackConfig(),  # noqa: B008 - immutable
    parts: MakeParts = lambda config, key: {},
) -> Model:
    """A model with fresh parameters, a function of ``key`` alone. Traceable: `jax.eval_shape` gives it abstractly.

    Raises:
      CoconutError: see `make_parts`.
    """
    return Model(
        Decoder(config, execution, rngs=nnx.Rngs(key)), make_parts(config, key, feedback=feedback, parts=parts)
    )


Parameters = dict[str, Any]
"""Arrays, or their abstract values, by dotted path, such as ``decoder.layers.0.attention.query.kernel``.

Between steps a model is this plain dictionary: jit flattens it in C++, optax, orbax and a reader of a checkpoint need
to know nothing of modules.
"""


@dataclasses.dataclass(frozen=True)
class Template:
    """How to make a `Model` of `Parameters`, under jit or outside.

    Attributes:
      axes: name -> logical axes of every parameter, in the order of the model's arrays.
      trained: names of those that are trained; the others are frozen, but for the balanced ones.
      structure: the model without its arrays.
      balanced: names of the correction biases whose router is trained, which no gradient moves
        (`coconut.training.balancing`).
    """

    axes: Mapping[str, Axes]
    trained: frozenset[str]
    structure: Any
    balanced: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: Model, trains: Callable[[str], bool] = lambda name: True) -> "Template":
        """The template of a model, which may be abstract; ``trains`` says by name what is trained.

        A router's correction bias never is (`coconut.models.experts`): it is balanced where ``trains`` names it and its
        router.
        """
        axes = {_without_prefix(name): axes for name, axes in parameter_axes(model).items()}
        chosen = frozenset(name for name in axes if trains(name))
        trained = frozenset(name for name in chosen if not is_correction(name))
        balanced = frozenset(name for name in chosen - trained if kernel_beside(name) in trained)
        return cls(axes, trained, jax.tree.structure(model), balanced)

    def model(self, parameters: Parameters) -> Model:
        """The model that holds ``parameters``."""
        return jax.tree.unflatten(self.structure, [parameters[name] for name in self.axes])


def parameters_of(model: Model) -> Parameters:
    """The parameters of a model by name: ``decoder.norm.scale``, ``feedback.scale``."""
    names = map(_without_prefix, parameter_names(model))
    return dict(zip(names, jax.tree.leaves(model), strict=True))


def part_of(name: str) -> str:
    """The part that a parameter of `parameters_of` belongs to, or ``decoder``."""
    return name.partition(".")[0]


def _without_prefix(name: str) -> str:
    return name.removeprefix("parts.")
