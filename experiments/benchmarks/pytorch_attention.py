"""PyTorch's attention on the device that JAX uses, for the benchmark of kernels to compare with."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax

Timed = tuple[Callable[[], Any], Callable[[Any], None]]
"""What begins a call, and what waits for it."""


def absence() -> str | None:
    """Why PyTorch cannot take part, if it cannot."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    backend = jax.default_backend()
    if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
        return None
    return f"torch {torch.__version__} does not use this {backend}"


def attention(queries: tuple[int, ...], keys: tuple[int, ...], dtype: str, *, causal: bool, backward: bool) -> Timed:
    """`scaled_dot_product_attention` of random numbers.

    Args:
      queries: shape ``[B, H, T, D]``.
      keys: that of keys and values, ``[B, KH, S, D]``.
      dtype: of all of them.
      causal: whether queries see no later keys.
      backward: the backward pass alone, with the output as its cotangent.

    Raises:
      RuntimeError: PyTorch cannot take part.
    """
    if reason := absence():
        raise RuntimeError(reason)
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cpu":
        # As many as JAX takes.
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(shape, dtype=getattr(torch, dtype), device=device, requires_grad=backward)
        for shape in (queries, keys, keys)
    )

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=queries[1] != keys[1]
        )

    def wait(_: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if not backward:
        return forward, wait
    out = forward()
    d_out = out.detach()
    return lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True), wait
