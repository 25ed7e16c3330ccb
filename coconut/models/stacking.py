"""A decoder's layers stacked along a first axis (`ExecutionConfig.scan_layers`), or one by one: two names of the same.

Whatever is kept by the names of parameters has either layout: parameters, moments, and their abstract values.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_LAYERS = "decoder.layers."
_OF_ONE = re.compile(re.escape(_LAYERS) + r"(\d+)\.")


def is_stacked(name: str) -> bool:
    """Whether a parameter holds all layers, along its first axis: ``decoder.layers.mlp.up.kernel``."""
    return name.startswith(_LAYERS) and _OF_ONE.match(name) is None


def in_layout_of(names: Iterable[str], tree: Any) -> Any:
    """A tree with its layers stacked, or one by one, as those that have these names are.

    Args:
      names: of parameters (`coconut.model.parameters_of`).
      tree: a pytree in which dictionaries with names of parameters hold arrays or their abstract values. An abstract
        value's sharding follows; an array's is the compiler's choice.

    Returns:
      The tree itself where it has that layout already.
    """
    wanted = any(map(is_stacked, names))
    nodes = [node for node in jax.tree.leaves(tree, is_leaf=_holds_layers) if _holds_layers(node)]
    if all(any(map(is_stacked, node)) == wanted for node in nodes):
        return tree
    change = _stack if wanted else _unstack
    return jax.tree.map(lambda node: change(node) if _holds_layers(node) else node, tree, is_leaf=_holds_layers)


def _holds_layers(node: Any) -> bool:
    return isinstance(node, dict) and any(str(name).startswith(_LAYERS) for name in node)


def _stack(node: Mapping[str, Any]) -> dict[str, Any]:
    layers: dict[str, dict[int, Any]] = {}
    for name, value in node.items():
        if found := _OF_ONE.match(name):
            layers.setdefault(_LAYERS + name[found.end() :], {})[int(found[1])] = value
    stacked = {name: _joined([of[index] for index in sorted(of)]) for name, of in layers.items()}
    return {name: value for name, value in node.items() if not _OF_ONE.match(name)} | stacked


def _unstack(node: Mapping[str, Any]) -> dict[str, Any]:
    single = {
        f"{_LAYERS}{index}.{name.removeprefix(_LAYERS)}": _taken(value, index)
        for name, value in node.items()
        if is_stacked(name)
        for index in range(value.shape[0])
    }
    return {name: value for name, value in node.items() if not is_stacked(name)} | single


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jnp.stack(values)
    return _abstract(first, (len(values), *first.shape), lambda spec: (None, *spec))


def _taken(value: Any, index: int) -> Any:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value[index]
    return _abstract(value, value.shape[1:], lambda spec: spec[1:])


def _abstract(
    value: jax.ShapeDtypeStruct, shape: tuple[int, ...], change: Callable[[tuple[Any, ...]], tuple[Any, ...]]
) -> jax.ShapeDtypeStruct:
    sharding = value.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*change(tuple(sharding.spec))))
    return jax.ShapeDtypeStruct(shape, value.dtype, sharding=sharding)
