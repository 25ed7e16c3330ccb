"""Attention of many queries to many keys: `flash_attention`."""

import functools
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import gpu, reference, tpu, xla
from pallas_kernels.flash_attention.visibility import Options, Rows
from pallas_kernels.implementations import resolve
from pallas_kernels.measured import gpu_kernel_is_faster
from pallas_kernels.platform import vary_over, varying_axes

KERNELS: dict[str, ModuleType] = {"tpu": tpu, "gpu": gpu}


def flash_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B M S D"],
    v: Float[Array, "B M S D"],
    *,
    causal: bool = False,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] = 0,
    start: Int[Array, " B"] | None = None,
    length: Int[Array, " B"] | None = None,
    query_segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_log_normalizers: bool = False,
    implementation: str = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B H T D"] | tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Softmax attention, ``softmax(scale q k^T) v``, without holding the scores.

    Query ``t`` of a row stands at column ``query_offset + t`` of the row's keys. Differentiable once in ``q``, ``k``
    and ``v``, through both results. A query that sees no key gets 0, a log-normalizer of `NO_KEYS` (finite) and no
    gradient. Attention over several calls with keys of their own is ``sum_i exp(l_i - logsumexp_j(l_j)) out_i``, with
    their log-normalizers ``l_i``.

    Offsets, starts, lengths and segments are data: new values run the same program.

    Args:
      q: queries, float32 or bfloat16 (`reference` and `xla` take any floating dtype).
      k: keys; head ``h`` of the queries reads head ``h // (H / M)``. Same dtype as ``q``.
      v: values, shaped as ``k``.
      causal: a query sees no key of a later column than its own.
      query_offset: column of the first query, one for all rows or one each. Not negative.
      start: first column of each row that holds a key; None for 0. What stands before it is never read into a result,
        NaN included.
      length: column after the last key of each row, at most ``S``; None for ``S``. What stands there is not read.
      query_segment_ids: segment of each query, which sees keys of the same segment only.
      key_segment_ids: segment of each key; given together with ``query_segment_ids``.
      window: sees its own column and the ``window - 1`` before it, and none after it, as with ``causal``.
      scale: factor of the scores, ``D ** -0.5`` by default.
      soft_cap: scores become ``soft_cap * tanh(score / soft_cap)`` before masking.
      return_log_normalizers: also return the log-sum-exp of each query's scores, in at least float32.
      implementation: ``auto`` chooses by device and shape (`choose`). ``reference`` is plain float32, ``xla`` blocked
        and portable, ``tpu`` and ``gpu`` are Pallas kernels; these four are taken at their word.
      interpret: runs the kernel of ``tpu`` or ``gpu`` step by step on any device, for tests; ``tpu`` also takes
        `pltpu.InterpretParams`.

    Returns:
      Weighted values in the dtype of ``q``, and the log-normalizers if asked for.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together, or an implementation that does not apply here.
    """
    _check_arrays(q, k, v)
    _check_segments(query_segment_ids, key_segment_ids, q, k)
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap = {soft_cap}: must be positive")
    B, S = k.shape[0], k.shape[2]
    rows = Rows(
        offset=_per_row("query_offset", query_offset, B),
        start=jnp.clip(_per_row("start", 0 if start is None else start, B, S), 0, S),
        end=jnp.clip(_per_row("length", S if length is None else length, B, S), 0, S),
        query_segments=None if query_segment_ids is None else query_segment_ids.astype(jnp.int32),
        key_segments=None if key_segment_ids is None else key_segment_ids.astype(jnp.int32),
    )
    options = Options(
        causal=causal or window is not None,
        window=window,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
    )
    implementation = resolve(
        implementation,
        interpret,
        kernels=KERNELS,
        operand=q,
        choose=lambda device: choose(device, q, k),
        about=f"flash_attention, q {q.shape}, k {k.shape} {q.dtype}",
    )
    if implementation == "reference":
        out, normalizers = reference.attend(q, k, v, rows, options)
    else:
        # Where shard_map checks what differs between devices, a gradient must differ where its input does: so all
        # inputs are made to differ alike.
        axes = varying_axes(*jax.tree.leaves((q, k, v, rows)))
        q, k, v, rows = jax.tree.map(lambda x: vary_over(x, axes), (q, k, v, rows))
        out, normalizers = cast(tuple[Array, Array], _attend(implementation, interpret, options, q, k, v, rows))
    return (out, normalizers) if return_log_normalizers else out


def choose(device: str, q: Float[Array, "B H T D"], k: Float[Array, "B M S D"]) -> str:
    """The implementation that `auto` means.

    On a TPU the kernel, from 128 queries and keys on, where it applies; below, most of a block would be padding. On a
    GPU the kernel where it applies and was measured to be faster (`pallas_kernels.measured`). Elsewhere ``xla``.
    """
    size = min(q.shape[2], k.shape[2])
    if device == "gpu" and gpu.refusal(q) is None and gpu_kernel_is_faster("flash_attention", q.dtype, size):
        return "gpu"
    if device == "tpu" and size >= 128 and tpu.refusal(q) is None:
        return "tpu"
    return "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    implementation: str,
    interpret: bool | pltpu.InterpretParams,
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    rows: Rows,
) -> tuple[Array, Array]:
    if implementation in KERNELS:
        return KERNELS[implementation].forward(q, k, v, rows, options, interpret=interpret)
    return xla.forward(q, k, v, rows, options)


def _attend_forward(implementation, interpret, options, q, k, v, rows):
    out, normalizers = cast(tuple[Array, Array], _attend(implementation, interpret, options, q, k, v, rows))
    return (out, normalizers), (q, k, v, rows, out, normalizers)


def _attend_backward(implementation, interpret, options, residuals, cotangents):
    q, k, v, rows, out, normalizers = residuals
    d_out, d_normalizers = cotangents
    # With P = exp(S - normalizer), dS = P * (dP - rowsum(dO * O) + d_normalizer): one number a query.
    shift = (d_out.astype(normalizers.dtype) * out.astype(normalizers.dtype)).sum(-1) - d_normalizers
    arguments = (q, k, v, rows, options, normalizers, d_out, shift)
    if implementation in KERNELS:
        return *KERNELS[implementation].backward(*arguments, interpret=interpret), None
    return *xla.backward(*arguments), None


_attend.defvjp(_attend_forward, _attend_backward)


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    shapes = f"q {q.shape} {q.dtype}, k {k.shape} {k.dtype}, v {v.shape} {v.dtype}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes}: must have 4 axes each, [B, H, T, D] and [B, KH, S, D]")
    if k.shape != v.shape:
        raise ValueError(f"{shapes}: keys and values must have one shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: queries and keys must agree in rows (first axis) and head dimension (last axis)")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"{shapes}: no axis may be empty")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the number of query heads must be a multiple of that of key heads")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"{shapes}: must have one floating dtype")


def _check_segments(queries: Array | None, keys: Array | None, q: Array, k: Array) -> None:
    if queries is None and keys is None:
        return
    if queries is None or keys is None:
        raise ValueError("query_segment_ids and key_segment_ids must be given together")
    for name, ids, of in (("query_segment_ids", queries, q), ("key_segment_ids", keys, k)):
        expected = (of.shape[0], of.shape[2])
        if ids.shape != expected or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} {ids.shape} {ids.dtype}: must be integers of shape {expected}")


def _per_row(name: str, value: Any, batch: int, most: int | None = None) -> Int[Array, " B"]:
    """``[B]`` of int32; values that are no JAX arrays are known here, so they must be from 0 to ``most``."""
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
        if (value < 0).any() or (most is not None and (value > most).any()):
            raise ValueError(f"{name} = {value}: must not be negative{'' if most is None else f' nor beyond {most}'}")
    if value.shape not in ((), (batch,)) or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} {value.shape} {value.dtype}: must be integers, one or one for each of {batch} rows")
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,))
