"""Attention over several segments at once, and rotary positions."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from coconut.models.cache import Filling, KeyValue, LayerCache, look_back
from coconut.models.config import AnyRotaryScaling, YarnRotaryScaling
from coconut.models.rotary_config import LinearRotaryScaling, LongRotaryScaling


def attend(
    query: Float[Array, "B N T H"],
    sources: Sequence[KeyValue | Filling],
    masks: Sequence[Bool[Array, "B _ _"]],
    *,
    kept: Sequence[Bool[Array, "B N T _"]] | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> tuple[Float[Array, "B N T _"], Any]:
    """Softmax attention of each query over the columns of all sources together.

    The maximum and the sum of the softmax run over the sources, which are never concatenated.

    Args:
      query: queries, not yet scaled.
      sources: keys and values of ``C`` columns each, ``M`` heads; head ``n`` reads key/value head ``n // (N / M)``.
        One of ``B / G`` rows is shared: row ``b`` reads its row ``b // G``.
      masks: for each source which columns a query may see, broadcastable to ``[B, T, C]``. A query that may see none
        gets a finite value without meaning.
      kept: for each source which attention weights dropout keeps; None for none dropped.
      dropout: rate at which ``kept`` was drawn.
      scale: factor on the scores; None for ``H ** -0.5``.

    Returns:
      Weighted values, in the dtype of ``query``, and the last source, from there on (`look_back`).
    """
    B, N, T, H = query.shape
    M = jax.tree.leaves(sources)[0].shape[1]  # of the keys of the first source, whichever kind it is
    grouped = (query * jnp.asarray(H**-0.5 if scale is None else scale, query.dtype)).reshape(B, M, (N // M) * T, H)
    out, last = attend_by_groups(
        grouped, sources, masks, T, score=_score_keys, weigh=_weigh_values, kept=kept, dropout=dropout
    )
    return out.reshape(B, N, T, -1).astype(query.dtype), last


def _score_keys(queries: Array, source: KeyValue, wide: DTypeLike) -> Array:
    return jnp.einsum("bmqh,bmch->bmqc", queries, source.keys, preferred_element_type=wide)


def _weigh_values(weights: Array, source: KeyValue, wide: DTypeLike) -> Array:
    return jnp.einsum("bmqc,bmch->bmqh", weights, source.values, preferred_element_type=wide)


def attend_by_groups(
    grouped: Any,
    sources: Sequence[LayerCache | Filling],
    masks: Sequence[Bool[Array, "B _ _"]],
    T: int,
    *,
    score: Callable[[Any, Any, DTypeLike], Array],
    weigh: Callable[[Array, Any, DTypeLike], Array],
    kept: Sequence[Bool[Array, "B N T _"]] | None,
    dropout: float,
) -> tuple[Float[Array, "B M Q _"], Any]:
    """`attend` over whatever a mixer keeps of its columns.

    Args:
      grouped: queries ``[B, M, Q, X]``, or a pytree of several such arrays, scaled. ``Q`` holds the ``N / M`` heads
        that read the same of a source, each with its ``T`` columns.
      sources: what earlier passes and this one kept.
      masks: see `attend`.
      T: how many columns ask.
      score: ``(queries, source, dtype)`` to the scores ``[B, M, Q, C]`` in at least float32.
      weigh: ``(weights, source, dtype)`` to the weighted values ``[B, M, Q, Y]``.
      kept: see `attend`.
      dropout: see `attend`.

    Returns:
      Weighted values, in at least float32, and the last source, from there on.
    """
    first = jax.tree.leaves(grouped)[0]
    (B, M, Q), dtype = first.shape[:3], first.dtype
    wide = jnp.promote_types(dtype, jnp.float32)

    def per_group(mask: Array) -> Array:
        """[B, T, C] -> [B, 1, 1, T, C], to meet scores of shape [B, M, N / M, T, C]."""
        return mask[:, None, None]

    def by_row(function: Callable[[Any, Any, DTypeLike], Array], x: Any, source: LayerCache) -> Array:
        rows = len(jax.tree.leaves(source)[0])
        return unfold_rows(function(jax.tree.map(lambda x: fold_rows(x, rows), x), source, wide), B)

    sources, scores, parts = list(sources), [], []
    for index, mask in enumerate(masks):
        one, sources[index] = look_back(functools.partial(by_row, score), grouped, sources[index])
        one = one.reshape(B, M, Q // T, T, -1)
        scores.append(jnp.where(per_group(mask), one, jnp.finfo(wide).min))
    peak = jax.lax.stop_gradient(jnp.stack([one.max(-1) for one in scores]).max(0))
    weights = [jnp.exp(one - peak[..., None]) for one in scores]
    total = functools.reduce(jnp.add, [weight.sum(-1) for weight in weights])
    if kept is not None:
        weights = [
            jnp.where(keep.reshape(weight.shape), weight / (1.0 - dropout), 0.0)
            for weight, keep in zip(weights, kept, strict=True)
        ]
    for index, weight in enumerate(weights):
        weight = weight.reshape(B, M, Q, -1).astype(dtype)
        part, sources[index] = look_back(functools.partial(by_row, weigh), weight, sources[index])
        parts.append(part)
    return functools.reduce(jnp.add, parts) / total.reshape(B, M, Q, 1), sources[-1]


def fold_rows(x: Float[Array, "B M Q _"], rows: int) -> Float[Array, "_ M _ _"]:
    """Puts the queries of rows that share a row of keys side by side: ``[B, M, Q, X]`` to ``[rows, M, G Q, X]``."""
    B, M, Q, X = x.shape
    return x if rows == B else x.reshape(rows, B // rows, M, Q, X).swapaxes(1, 2).reshape(rows, M, -1, X)


def unfold_rows(x: Float[Array, "_ M _ _"], rows: int) -> Float[Array, "B M Q _"]:
    """Undoes `fold_rows`: back to ``rows`` rows."""
    shared, M, _, X = x.shape
    if shared == rows:
        return x
    return x.reshape(shared, M, rows // shared, -1, X).swapaxes(1, 2).reshape(rows, M, -1, X)


def attention_weights(
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B M C H"],
    mask: Bool[Array, "B _ C"],
    scale: float | None = None,
) -> Float[Array, "B N T C"]:
    """The weights themselves that `attend` gives the columns of a single source, in at least float32.

    Args:
      query: queries, not yet scaled.
      keys: head ``n`` reads key head ``n // (N / M)``.
      mask: which columns a query may see, broadcastable to ``[B, T, C]``. A query that may see none gets weights
        without meaning.
      scale: factor on the scores; None for ``H ** -0.5``.
    """
    B, N, T, H = query.shape
    M = keys.shape[1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = (query * jnp.asarray(H**-0.5 if scale is None else scale, query.dtype)).reshape(B, M, (N // M) * T, H)
    scores = jnp.einsum("bmqh,bmch->bmqc", grouped, keys, preferred_element_type=wide).reshape(B, N, T, -1)
    return jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.finfo(wide).min), axis=-1)


def offset_query_bias(
    key_bias: Float[Array, "M H"],
    num_heads: int,
    base: float,
    scaling: AnyRotaryScaling | None = None,
    width: int | None = None,
) -> Float[Array, "N H"]:
    """Query biases whose rotary score with ``key_bias`` is largest ``n + 1`` columns back, for head ``n``.

    The score of biases alone at offset ``d`` is ``q^T R(-d) k``, so ``q = R(-(n + 1)) k`` meets its own image there.
    """
    keys = jnp.repeat(key_bias, num_heads // key_bias.shape[0], axis=0)
    offsets = jnp.arange(1, num_heads + 1)
    return rotate(keys[:, None, None], -offsets[:, None], base, scaling, width)[:, 0, 0]


def rotary_frequencies(
    width: int,
    base: float,
    scaling: AnyRotaryScaling | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, " _"]:
    """Radians each of the ``width / 2`` feature pairs turns by a position: ``base ** (-2 i / width)``, scaled."""
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearRotaryScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, LongRotaryScaling):
        return frequencies / jnp.asarray(scaling.short_factors, dtype)
    if isinstance(scaling, YarnRotaryScaling):
        low, high = scaling.blended(width, base)
        stretched = jnp.clip((jnp.arange(width // 2, dtype=dtype) - low) / (high - low), 0.0, 1.0)
        return frequencies * (1.0 - stretched + stretched / scaling.factor)
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    base: float,
    scaling: AnyRotaryScaling | None = None,
    width: int | None = None,
) -> Float[Array, "B T N H"]:
    """Rotary position embedding in the half-split layout of Llama and Qwen (Su et al. 2021, section 3.2.2).

    Feature pairs are ``(i, i + width / 2)`` and turn by ``position`` times their `rotary_frequencies`.

    Args:
      x: queries or keys.
      positions: position of each column in its row.
      base: of the wavelengths.
      scaling: of the wavelengths.
      width: how many features turn, the first of them; None for all.
    """
    width = x.shape[-1] if width is None else width
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angles = positions[..., None, None].astype(wide) * rotary_frequencies(width, base, scaling, wide)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(scaling, LongRotaryScaling | YarnRotaryScaling):
        cos, sin = scaling.attention_factor * cos, scaling.attention_factor * sin
    first, second = jnp.split(x[..., :width].astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], -1)
