"""Calls of `flash_attention` that must compile for every TPU and lower for CUDA."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import flash_attention

Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and dtype of each argument."""

CASES: dict[str, tuple[tuple[int, int, int, int, int, int], str, dict[str, Any]]] = {
    "causal, bfloat16": ((8, 16, 16, 2048, 2048, 128), "bfloat16", {"causal": True}),
    "Llama 3 heads, rows of their own, bfloat16": ((4, 32, 8, 1024, 1024, 128), "bfloat16", {"causal": True}),
    "GPT-2 small, float32": ((2, 12, 12, 1024, 1024, 64), "float32", {"causal": True}),
    "window and soft cap": ((2, 4, 2, 1000, 1100, 64), "bfloat16", {"causal": True, "window": 256, "soft_cap": 30.0}),
    "segments": ((2, 4, 2, 1000, 1100, 128), "bfloat16", {"causal": True}),
    "few queries": ((2, 4, 2, 7, 300, 128), "bfloat16", {"causal": True}),
    "odd sizes, one query, float32": ((2, 4, 2, 1, 45, 64), "float32", {}),
}
"""Name -> sizes (B, H, KH, T, S, D), dtype, and options. All have an offset, starts and lengths but the first."""


def cases(implementation: str) -> dict[str, tuple[Callable[..., jax.Array], Shapes]]:
    """Name -> a scalar function, to be differentiated by its first three arguments, and its arguments."""
    found = {}
    for name, ((B, H, M, T, S, D), dtype, options) in CASES.items():
        data: dict[str, tuple[int, ...]] = {"query_offset": (), "start": (B,), "length": (B,)}
        if name == "segments":
            data |= {"query_segment_ids": (B, T), "key_segment_ids": (B, S)}
        elif name == "causal, bfloat16":
            data = {}
        shapes = (((B, H, T, D), dtype), *[((B, M, S, D), dtype)] * 2, *[(shape, "int32") for shape in data.values()])
        found[name] = functools.partial(_total, names=tuple(data), implementation=implementation, **options), shapes
    return found


def _total(*arrays: jax.Array, names: tuple[str, ...], **options: Any) -> jax.Array:
    """A sum of both results, by squares: the cotangents are arrays, as they are in a model."""
    data = dict(zip(names, arrays[3:], strict=True))
    out, normalizers = flash_attention(*arrays[:3], **data, **options, return_log_normalizers=True)
    return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(jnp.square(normalizers))
