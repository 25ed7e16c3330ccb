"""Parameters by name, the logical axes that stand beside them, and decoders of parameters."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from coconut.errors import CoconutError
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.sharding import Axes


def parameter_names(tree: Any) -> list[str]:
    """Dotted paths of the arrays of a tree of modules, such as ``layers.0.attention.query.kernel``, in its order."""
    return [_name(path) for path, _ in _parameters(tree)]


def parameter_axes(tree: Any) -> dict[str, Axes]:
    """The axes of each parameter by name: what its `nnx.Param` says under ``axes``, else None."""
    return {
        _name(path): leaf.get_metadata().get("axes") if isinstance(leaf, nnx.Variable) else None
        for path, leaf in _parameters(tree)
    }


def _parameters(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path)


def abstract_decoder(
    config: DecoderConfig,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - immutable
) -> Decoder:
    """A decoder whose arrays are `jax.ShapeDtypeStruct`: nothing is computed or allocated."""
    return jax.eval_shape(lambda: Decoder(config, execution, rngs=nnx.Rngs(0)))


def parameters_by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a tree of modules, which may be abstract, by name."""
    return dict(zip(parameter_names(tree), jax.tree.leaves(tree), strict=True))


def decoder_parameters(decoder: Decoder) -> dict[str, Any]:
    """The arrays of a decoder, which may be abstract, by name."""
    return parameters_by_name(decoder)


def decoder_of(config: DecoderConfig, execution: ExecutionConfig, parameters: Mapping[str, Any]) -> Decoder:
    """The decoder that holds ``parameters``, which are not copied.

    Raises:
      CoconutError: a parameter is missing, unknown, or has another shape than the configs give it.
    """
    abstract = abstract_decoder(config, execution)
    expected = decoder_parameters(abstract)
    if parameters.keys() != expected.keys():
        wrong = sorted(parameters.keys() ^ expected.keys())
        raise CoconutError(f"these parameters are missing or unknown: {', '.join(wrong)}")
    for name, leaf in expected.items():
        if parameters[name].shape != leaf.shape:
            raise CoconutError(f"parameter {name} has shape {parameters[name].shape}, the config gives {leaf.shape}")
    return jax.tree.unflatten(jax.tree.structure(abstract), [parameters[name] for name in expected])
