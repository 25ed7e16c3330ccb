"""Room for new tokens in a trained decoder, such as the three latent markers.

Both ways start a new token as a copy of an old one: in the embedding, and in the head where that is not tied. The
official implementation copies ``<<``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from coconut.errors import CoconutError
from coconut.models.decoder import Decoder
from coconut.models.parameters import decoder_of, decoder_parameters, parameter_axes
from coconut.sharding import Axes, parameter_sharding


def resize_vocabulary(decoder: Decoder, vocab_size: int, *, copy_from: int) -> Decoder:
    """A decoder with more tokens, the new ones copies of token ``copy_from``.

    Args:
      decoder: the decoder; it stays as it is, and the other parameters are shared with it.
      vocab_size: the new ``V``, at least the old one. On a mesh it must be divisible as `coconut.sharding` says.
      copy_from: an id of the old vocabulary.

    Raises:
      CoconutError: ``vocab_size`` is smaller than it was, ``copy_from`` is no token, or the mesh cannot split it.
    """
    old = decoder.config.vocabulary
    if vocab_size < old:
        raise CoconutError(f"vocab_size = {vocab_size}: the decoder has {old} tokens, and none can be taken away")
    _check_token("copy_from", copy_from, old)
    ids = jnp.concatenate([jnp.arange(old), jnp.full(vocab_size - old, copy_from)])
    return _with_tokens(decoder, vocab_size, lambda table, axis: jnp.take(table, ids, axis))


def copy_token(decoder: Decoder, ids: Sequence[int], *, copy_from: int) -> Decoder:
    """A decoder whose tokens ``ids`` are copies of token ``copy_from``: for reserved ids, such as those of Llama 3.

    Args:
      decoder: the decoder; it stays as it is, and the other parameters are shared with it.
      ids: tokens to overwrite.
      copy_from: the token to copy.

    Raises:
      CoconutError: an id is no token.
    """
    old = decoder.config.vocabulary
    _check_token("copy_from", copy_from, old)
    for token in ids:
        _check_token("ids", token, old)
    sources = jnp.arange(old).at[jnp.asarray(ids, jnp.int32)].set(copy_from)
    return _with_tokens(decoder, old, lambda table, axis: jnp.take(table, sources, axis))


def _check_token(argument: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise CoconutError(f"{argument}: {token} is no token, ids run from 0 to {vocab_size - 1}")


def _with_tokens(decoder: Decoder, vocab_size: int, change: Callable[[Array, int], Array]) -> Decoder:
    parameters: dict[str, Any] = decoder_parameters(decoder)
    for name, axes in parameter_axes(decoder).items():
        if axes is not None and "vocabulary" in axes:
            new = change(parameters[name], axes.index("vocabulary"))
            parameters[name] = _placed_like(new, parameters[name], name, axes, vocab_size)
    return decoder_of(dataclasses.replace(decoder.config, vocab_size=vocab_size), decoder.execution, parameters)


def _placed_like(new: Array, old: Array, name: str, axes: Axes, vocab_size: int) -> Array:
    if not isinstance(old.sharding, NamedSharding) or old.sharding.mesh.size == 1:
        return new
    try:
        same = new.shape == old.shape
        return jax.device_put(
            new, old.sharding if same else parameter_sharding(name, new.shape, axes, old.sharding.mesh)
        )
    except CoconutError as error:
        raise CoconutError(f"vocab_size = {vocab_size}: {error}") from error
