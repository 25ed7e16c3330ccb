"""Random calls of `flash_attention`, solved with gradients, and how far two solutions are apart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.flash_attention import NO_KEYS, flash_attention
from tests.tiny_models import quick_jit

# A float32 result is off by some units in its last place, 6e-8 each, times the terms of its sums. Weights and score
# gradients are rounded to bfloat16's 8 bits before their products, which leaves some 4e-3 in the gradients.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options; everything else is drawn from them."""

    heads: tuple[int, int] = (2, 1)
    lengths: tuple[int, int] = (20, 40)
    width: int = 16
    dtype: str = "float32"
    causal: bool = True
    offset: str = "rows"
    ranges: bool = True
    segments: bool = False
    window: int | None = None
    soft_cap: float | None = None

    def grown(self, factor: int) -> "Problem":
        """The same over blocks that are larger by a factor."""
        T, S = self.lengths
        window = None if self.window is None else self.window * factor
        return dataclasses.replace(self, lengths=(T * factor, S * factor), window=window)

    def options(self) -> dict[str, Any]:
        """What is static."""
        return {"causal": self.causal, "window": self.window, "soft_cap": self.soft_cap}

    def arrays(self) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
        """Queries, keys and values of two rows, and what is data. Columns outside a row's range are NaN."""
        rng = np.random.default_rng([*self.heads, *self.lengths, self.width])
        (H, M), (T, S) = self.heads, self.lengths
        q, k, v = (rng.normal(size=(2, heads, length, self.width)) for heads, length in ((H, T), (M, S), (M, S)))
        data: dict[str, Any] = {}
        if self.offset != "none":
            data["query_offset"] = rng.integers(0, S, size=2 if self.offset == "rows" else ())
        if self.ranges:
            data["start"], data["length"] = rng.integers(0, S, size=2), rng.integers(0, S + 1, size=2)
            held = (np.arange(S) >= data["start"][:, None]) & (np.arange(S) < data["length"][:, None])
            k, v = (np.where(held[:, None, :, None], x, np.nan) for x in (k, v))
        if self.segments:
            data["query_segment_ids"] = rng.integers(0, 2, size=(2, T))
            data["key_segment_ids"] = rng.integers(0, 2, size=(2, S))
        inputs = tuple(jnp.asarray(x, self.dtype) for x in (q, k, v))
        return inputs, {name: jnp.asarray(x, jnp.int32) for name, x in data.items()}


def problems(widths: tuple[int, ...]) -> st.SearchStrategy[Problem]:
    """Problems of up to three blocks of 16 in each direction."""
    return st.builds(
        Problem,
        heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
        lengths=st.tuples(st.integers(1, 44), st.integers(1, 44)),
        width=st.sampled_from(widths),
        dtype=st.sampled_from(list(TOLERANCE)),
        causal=st.booleans(),
        offset=st.sampled_from(["none", "scalar", "rows"]),
        ranges=st.booleans(),
        segments=st.booleans(),
        window=st.none() | st.integers(1, 30),
        soft_cap=st.none() | st.just(1.5),
    )


def solve(problem: Problem, **implementation: Any) -> dict[str, jax.Array]:
    """Both results, and the gradients of a sum in which every number of both has a weight."""

    def weighted(q, k, v, data):
        out, normalizers = flash_attention(
            q, k, v, **data, **problem.options(), **implementation, return_log_normalizers=True
        )
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        seen = jnp.where(normalizers == NO_KEYS, 0.0, normalizers)
        loss = (weights * out.astype(jnp.float32)).sum() + (weights[..., 0] * seen).sum()
        return loss, {"out": out, "normalizers": normalizers}

    inputs, data = problem.arrays()
    gradients, found = quick_jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs, data)
    return found | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def distance(found: jax.Array, expected: jax.Array) -> float:
    """Norm of the difference, relative to that of what is expected."""
    wide, wanted = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(wide - wanted) / max(np.linalg.norm(wanted), 1e-20))


def assert_close(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> None:
    """Within the tolerance of the dtype, and exactly alike where no key is seen."""
    blind = np.asarray(expected["normalizers"] == NO_KEYS)
    np.testing.assert_array_equal(found["normalizers"] == NO_KEYS, blind)
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape and found[name].dtype == wanted.dtype
        assert distance(found[name], wanted) < TOLERANCE[str(wanted.dtype)], name
    for name in ("out", "dq"):
        np.testing.assert_array_equal(np.asarray(found[name], np.float32)[blind], 0.0)
