"""Attention of one or a few queries a row to a cache of keys and values."""

import math
from types import ModuleType
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.decode_attention import gpu, reference, tpu, xla
from pallas_kernels.implementations import resolve
from pallas_kernels.logits import LogitRule
from pallas_kernels.measured import gpu_kernel_is_faster
from pallas_kernels.platform import vary_over, varying_axes

DTYPES = (jnp.float32, jnp.bfloat16)
KERNELS: dict[str, ModuleType] = {"tpu": tpu, "gpu": gpu}
LONG_CACHE = 1_024
"""Columns from which `auto` takes the kernel on a TPU."""


@overload
def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    length: Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_log_normalizers: Literal[False] = False,
    implementation: str = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> Array: ...


@overload
def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    length: Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_log_normalizers: Literal[True],
    implementation: str = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Array, Array]: ...


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    length: Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_log_normalizers: bool = False,
    implementation: str = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of a row's queries to columns ``start`` up to ``length`` of its cache, all alike.

    The queries of a row do not see each other: what they add to the cache is another segment, and
    `segments.merge_segments` joins the two. Reverse-mode differentiation by ``q``, ``k`` and ``v``, of outputs and
    log-normalizers; columns that a row does not see get gradients of 0. They may hold any finite numbers. Sums are
    float32 whatever the inputs are.

    Args:
      q: ``[B, H, T, D]``, float32 or bfloat16. Heads ``H / KH * i`` and the following share head ``i`` of the keys.
      k: ``[B, KH, S, D]``, of the same dtype.
      v: the same.
      start: ``[B]``, integers: the first column that the row's queries see.
      length: ``[B]``, integers: the column behind the last that they see. Where it is not above ``start`` outputs are 0
        and log-normalizers `segments.NO_COLUMN`.
      scale: of the scores, ``1 / sqrt(D)`` where it is not given.
      soft_cap: scaled scores ``x`` become ``soft_cap * tanh(x / soft_cap)`` (Gemma Team 2024, section 2).
      return_log_normalizers: also returns the log of each query's sum of exponentials, ``[B, H, T]`` float32.
      implementation: ``auto`` chooses by platform and shape, see `choose`; the others are taken at their word.
      interpret: runs the kernel of ``tpu`` or ``gpu`` step by step on any platform, for tests; ``tpu`` also takes
        `pltpu.InterpretParams`.

    Returns:
      ``[B, H, T, D]``, of the dtype of ``q``.

    Raises:
      ValueError: shapes or dtypes do not fit, a number is out of its range, or the implementation asked for does not
        apply; the message says why. Bounds are checked where their numbers are known; traced ones outside of the cache
        are those of the cache.
    """
    _validate(q, k, v, start, length, scale=scale, soft_cap=soft_cap)
    batch, heads, queries, features = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1] * queries, features)
    implementation = resolve(
        implementation,
        interpret,
        kernels=KERNELS,
        operand=grouped,
        choose=lambda device: choose(device, grouped, k),
        about=f"decode_attention, queries {grouped.shape} to keys {k.shape} {k.dtype}",
    )
    rule = LogitRule(scale=features**-0.5 if scale is None else scale, soft_cap=soft_cap)
    start, length = (x.astype(jnp.int32) for x in (start, length))
    outputs, log_normalizers = _attend(grouped, k, v, start, length, rule, implementation, interpret)
    outputs = outputs.reshape(q.shape)
    return (outputs, log_normalizers.reshape(q.shape[:3])) if return_log_normalizers else outputs


def choose(platform: str, queries: Array, keys: Array) -> str:
    """What ``auto`` means for grouped queries ``[B, KH, R, D]`` and a cache of keys ``[B, KH, S, D]``.

    ``xla`` on a CPU. On a GPU the kernel where it applies and was measured to be faster (`pallas_kernels.measured`). On
    a TPU the kernel where the cache is long, by reasoning and not by measurement: it copies only the columns that rows
    see, where ``xla`` reads them all; with a short cache there is little to skip. But not where features do not fill
    the lanes: the kernel's layout pads them, and the compiler then copies the cache into it (see the temporary bytes of
    experiments/results/benchmarks).
    """
    columns, features = keys.shape[2:]
    if platform == "gpu" and gpu.refusal(queries) is None:
        return "gpu" if gpu_kernel_is_faster("decode_attention", keys.dtype, columns) else "xla"
    applies = platform == "tpu" and tpu.refusal(queries) is None
    return "tpu" if applies and columns >= LONG_CACHE and features % tpu.LANES == 0 else "xla"


def _validate(
    q: Array, k: Array, v: Array, start: Array, length: Array, *, scale: float | None, soft_cap: float | None
) -> None:
    named = {"q": q, "k": k, "v": v, "start": start, "length": length}
    shapes = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in named.items())
    if [x.ndim for x in named.values()] != [4, 4, 4, 1, 1]:
        raise ValueError(f"q is [B, H, T, D], k and v [B, KH, S, D], start and length [B], not {shapes}")
    if k.shape != v.shape or q.shape[3] != k.shape[3] or len({x.shape[0] for x in named.values()}) != 1:
        raise ValueError(f"sizes differ: q is [B, H, T, D], k and v [B, KH, S, D], start and length [B], not {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"nothing to compute with: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads of queries cannot share {k.shape[1]} heads of keys evenly: {shapes}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are all float32 or all bfloat16, not {shapes}")
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (start, length)):
        raise ValueError(f"start and length are integers, not {shapes}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale}: it is above 0 and finite")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap={soft_cap}: it is above 0 and finite, or None")
    for name in ("start", "length"):
        if not isinstance(named[name], Tracer):
            numbers = np.asarray(named[name])
            if numbers.min() < 0 or numbers.max() > k.shape[2]:
                raise ValueError(f"{name} is {numbers.min()} to {numbers.max()}, outside of the cache of k {k.shape}")


def _attend(
    queries: Array,
    keys: Array,
    values: Array,
    start: Array,
    length: Array,
    rule: LogitRule,
    implementation: str,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Array, Array]:
    """Outputs and log-normalizers of grouped queries, by the implementation chosen, differentiable."""
    if implementation == "reference":
        return reference.attend(queries, keys, values, start, length, rule)
    module, options = KERNELS.get(implementation, xla), {}
    if implementation in KERNELS:
        options = {"interpret": interpret}

    @jax.custom_vjp
    def differentiable(*arrays: Array) -> tuple[Array, Array]:
        return module.attend(*arrays, rule, **options)

    def forward(*arrays: Array) -> tuple[tuple[Array, Array], tuple[tuple[Array, ...], Array, Array]]:
        outputs, log_normalizers = differentiable(*arrays)
        return (outputs, log_normalizers), (arrays, outputs, log_normalizers)

    def backward(
        residuals: tuple[tuple[Array, ...], Array, Array], cotangents: tuple[Array, Array]
    ) -> tuple[Array, Array, Array, None, None]:
        (arrays, outputs, log_normalizers), (of_outputs, of_log_normalizers) = residuals, cotangents
        products = outputs.astype(jnp.float32) * of_outputs.astype(jnp.float32)
        shift = jnp.sum(products, -1) - of_log_normalizers
        return *module.gradients(*arrays, log_normalizers, of_outputs, shift, rule, **options), None, None

    differentiable.defvjp(forward, backward)
    # Where shard_map checks what differs between devices, a gradient must differ where its input does: so all inputs
    # are made to differ alike, and the gradients are summed where they were not.
    arrays = (queries, keys, values, start, length)
    axes = varying_axes(*arrays)
    return differentiable(*(vary_over(x, axes) for x in arrays))
