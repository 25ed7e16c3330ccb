"""Calls of `flash_attention` that must compile for every TPU and GPU, forward and with gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import flash_attention

SIZES: dict[str, tuple[tuple[int, int, int, int, int, int], str, dict[str, Any]]] = {
    "causal 2048": ((8, 16, 16, 2048, 2048, 128), "bfloat16", {"causal": True}),
    "grouped, rows of their own": ((4, 32, 8, 1024, 1024, 128), "bfloat16", {"causal": True, "data": "rows"}),
    "GPT-2, float32": ((2, 12, 12, 1024, 1024, 64), "float32", {"causal": True, "data": "rows"}),
    "window, soft cap, odd lengths": (
        (2, 4, 2, 1000, 1100, 64),
        "bfloat16",
        {"causal": True, "window": 256, "soft_cap": 30.0, "data": "rows"},
    ),
    "segments": ((2, 4, 2, 1000, 1100, 128), "bfloat16", {"causal": True, "data": "segments"}),
    "few queries": ((2, 4, 2, 7, 300, 128), "bfloat16", {"causal": True, "data": "rows"}),
    "one query, float32": ((2, 4, 2, 1, 45, 64), "float32", {"data": "rows"}),
}
"""Name -> sizes (B, H, KH, T, S, D), dtype and options; ``data`` says which arrays besides q, k and v are given."""

DATA: dict[str, tuple[str, ...]] = {
    "none": (),
    "rows": ("query_offset", "start", "length"),
    "segments": ("query_offset", "start", "length", "query_segment_ids", "key_segment_ids"),
}


def cases(implementation: str) -> dict[str, tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]]:
    """Name -> a function, and the abstract arrays to trace it with."""
    found = {}
    for name, ((B, H, M, T, S, D), dtype, settings) in SIZES.items():
        options = dict(settings)
        names = DATA[options.pop("data", "none")]
        shapes = {
            "query_offset": (),
            "start": (B,),
            "length": (B,),
            "query_segment_ids": (B, T),
            "key_segment_ids": (B, S),
        }
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, H, T, D), (B, M, S, D), (B, M, S, D))]
        arrays += [jax.ShapeDtypeStruct(shapes[name], jnp.int32) for name in names]

        def forward(q, k, v, *data, names=names, options=options):
            return flash_attention(
                q,
                k,
                v,
                **dict(zip(names, data, strict=True)),
                **options,
                implementation=implementation,
                return_log_normalizers=True,
            )

        def backward(q, k, v, *data, forward=forward):
            results, pull = jax.vjp(lambda q, k, v: forward(q, k, v, *data), q, k, v)
            return pull(results)

        found[f"{name}: forward"] = (forward, tuple(arrays))
        found[f"{name}: forward and gradients"] = (backward, tuple(arrays))
    return found
