"""On a GPU ``auto`` takes a kernel of ours where a measurement found it faster than XLA: what was measured.

The numbers are in ``experiments/results/on_gpu``: an H100, bfloat16. What was not measured, other GPUs and float32,
stays with XLA.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.platform import device_kind

HOPPER = ("H100", "H200")
"""In the names of the devices: one processor, with memory of two sizes."""

SMALLEST = {"flash_attention": 1, "decode_attention": 4_096, "linear_cross_entropy": 2_560}
"""From which size on the kernel was the faster.

- `flash_attention`, queries and keys: in a training step with passes of 160 columns and of 20, all of whose attention
  was by the kernels, against dense attention; alone with 192 and with 2,048 columns.
- `decode_attention`, columns of the cache: with 4,096; with 224 XLA was the faster.
- `linear_cross_entropy`, rows: with 2,560 and with 8,192, of 50,257 ids.
"""


def gpu_kernel_is_faster(op: str, dtype: DTypeLike, size: int) -> bool:
    """Whether it was measured that our kernel for GPUs is faster than XLA on the GPU in use.

    Args:
      op: its name.
      dtype: of what it computes with.
      size: what `SMALLEST` counts.
    """
    kind = device_kind()
    return jnp.dtype(dtype) == jnp.bfloat16 and any(name in kind for name in HOPPER) and size >= SMALLEST[op]
