"""Attention over several segments at once, and rotary positions."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from coconut.models.cache import Filling, KeyValue, look_back
from coconut.models.config import LongRotaryScaling, RotaryScaling


def attend(
    query: Float[Array, "B N T H"],
    sources: Sequence[KeyValue | Filling],
    masks: Sequence[Bool[Array, "B _ _"]],
    *,
    kept: Sequence[Bool[Array, "B N T _"]] | None = None,
    dropout: float = 0.0,
) -> tuple[Float[Array, "B N T H"], KeyValue | Filling]:
    """Softmax attention of each query over the columns of all sources together.

    The maximum and the sum of the softmax run over the sources, which are never concatenated.

    Args:
      query: queries, not yet scaled by ``H ** -0.5``.
      sources: keys and values of ``C`` columns each, ``M`` heads; head ``n`` reads key/value head ``n // (N / M)``.
        One of ``B / G`` rows is shared: row ``b`` reads its row ``b // G``.
      masks: for each source which columns a query may see, broadcastable to ``[B, T, C]``. A query that may see none
        gets a finite value without meaning.
      kept: for each source which attention weights dropout keeps; None for none dropped.
      dropout: rate at which ``kept`` was drawn.

    Returns:
      Weighted values, in the dtype of ``query``, and the last source, from there on (`look_back`).
    """
    B, N, T, H = query.shape
    M = jax.tree.leaves(sources)[0].shape[1]  # of the keys of the first source, whichever kind it is
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = (query * jnp.asarray(H**-0.5, query.dtype)).reshape(B, M, (N // M) * T, H)

    def per_group(mask: Array) -> Array:
        """[B, T, C] -> [B, 1, 1, T, C], to meet scores of shape [B, M, N / M, T, C]."""
        return mask[:, None, None]

    def score_keys(queries: Array, source: KeyValue) -> Array:
        queries = fold_rows(queries, len(source.keys))
        scores = jnp.einsum("bmqh,bmch->bmqc", queries, source.keys, preferred_element_type=wide)
        return unfold_rows(scores, B)

    def weigh_values(weights: Array, source: KeyValue) -> Array:
        weights = fold_rows(weights, len(source.values))
        return unfold_rows(jnp.einsum("bmqc,bmch->bmqh", weights, source.values, preferred_element_type=wide), B)

    sources, scores, parts = list(sources), [], []
    for index, mask in enumerate(masks):
        score, sources[index] = look_back(score_keys, grouped, sources[index])
        score = score.reshape(B, M, N // M, T, -1)
        scores.append(jnp.where(per_group(mask), score, jnp.finfo(wide).min))
    peak = jax.lax.stop_gradient(jnp.stack([score.max(-1) for score in scores]).max(0))
    weights = [jnp.exp(score - peak[..., None]) for score in scores]
    total = functools.reduce(jnp.add, [weight.sum(-1) for weight in weights])
    if kept is not None:
        weights = [
            jnp.where(keep.reshape(weight.shape), weight / (1.0 - dropout), 0.0)
            for weight, keep in zip(weights, kept, strict=True)
        ]
    for index, weight in enumerate(weights):
        weight = weight.reshape(B, M, (N // M) * T, -1).astype(query.dtype)
        part, sources[index] = look_back(weigh_values, weight, sources[index])
        parts.append(part)
    out = functools.reduce(jnp.add, parts) / total.reshape(B, M, (N // M) * T, 1)
    return out.reshape(B, N, T, H).astype(query.dtype), sources[-1]


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
    query: Float[Array, "B N T H"], keys: Float[Array, "B M C H"], mask: Bool[Array, "B _ C"]
) -> Float[Array, "B N T C"]:
    """The weights themselves that `attend` gives the columns of a single source, in at least float32.

    Args:
      query: queries, not yet scaled by ``H ** -0.5``.
      keys: head ``n`` reads key head ``n // (N / M)``.
      mask: which columns a query may see, broadcastable to ``[B, T, C]``. A query that may see none gets weights
        without meaning.
    """
    B, N, T, H = query.shape
    M = keys.shape[1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = (query * jnp.asarray(H**-0.5, query.dtype)).reshape(B, M, (N // M) * T, H)
    scores = jnp.einsum("bmqh,bmch->bmqc", grouped, keys, preferred_element_type=wide).reshape(B, N, T, -1)
    return jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.finfo(wide).min), axis=-1)


def offset_query_bias(
    key_bias: Float[Array, "M H"],
    num_heads: int,
    base: float,
    scaling: RotaryScaling | LongRotaryScaling | None = None,
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
    scaling: RotaryScaling | LongRotaryScaling | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, " _"]:
    """Radians each of the ``width / 2`` feature pairs turns by a position: ``base ** (-2 i / width)``, scaled."""
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LongRotaryScaling):
        return frequencies / jnp.asarray(scaling.short_factors, dtype)
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    base: float,
    scaling: RotaryScaling | LongRotaryScaling | None = None,
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
    if isinstance(scaling, LongRotaryScaling):
        cos, sin = scaling.attention_factor * cos, scaling.attention_factor * sin
    first, second = jnp.split(x[..., :width].astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], -1)
