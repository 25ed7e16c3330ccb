"""What attention costs: time and temporary memory of an implementation, and its ratio to forming all scores.

    python -m experiments.benchmarks.flash_attention [--implementation xla]

Each case is timed forward alone and with the gradients of queries, keys and values, in the dtype of the device: float32
on a CPU, bfloat16 elsewhere. The other side is `jax.nn.dot_product_attention` by XLA and, on a GPU, by cuDNN.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from pallas_kernels.flash_attention import IMPLEMENTATIONS, flash_attention

Sizes = tuple[int, int, int, int]
"""B, H, T, D; as many keys and key heads as queries and query heads."""

CASES: dict[str, Sizes] = {
    "prompts of ProsQA": (32, 4, 160, 64),
    "GPT-2 small": (4, 12, 1024, 64),
    "long": (1, 12, 4096, 64),
}
ON_ACCELERATORS: dict[str, Sizes] = {"issue's target": (8, 16, 2048, 128)}
SMOKE: dict[str, Sizes] = {"smoke": (1, 2, 40, 8)}


def library(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str) -> jax.Array:
    """JAX's own attention, which holds heads on the third axis."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation).swapaxes(1, 2)  # pyright: ignore


def compiled(attention: Callable[..., Any], arrays: tuple[jax.Array, ...], *, gradients: bool) -> Any:
    """The program of one side."""

    def forward_and_gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(out)

    return jax.jit(forward_and_gradients if gradients else attention).lower(*arrays).compile()


def measure(sizes: Sizes, implementation: str, rounds: int, *, gradients: bool) -> dict[str, Any]:
    """Causal attention by an implementation, over JAX's own."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    arrays = tuple(jax.random.normal(key, sizes, dtype) for key in jax.random.split(jax.random.key(0), 3))
    sides: dict[str, Callable[..., Any]] = {
        implementation: functools.partial(flash_attention, causal=True, implementation=implementation),
        "jax.nn, XLA": functools.partial(library, implementation="xla"),
    }
    if jax.default_backend() == "gpu":
        sides["jax.nn, cuDNN"] = functools.partial(library, implementation="cudnn")
    programs = {name: compiled(side, arrays, gradients=gradients) for name, side in sides.items()}
    seconds = timing.interleave(
        {name: functools.partial(_run, program, arrays) for name, program in programs.items()}, rounds, title=str(sizes)
    )
    # Two products forward and five backward, each over half of the scores; what is computed again is not counted.
    operations = math.prod(sizes) * sizes[2] * (7 if gradients else 2)
    result: dict[str, Any] = {"sizes": sizes, "dtype": jnp.dtype(dtype).name}
    for name, program in programs.items():
        result[name] = timing.summary(seconds[name])
        result[name]["tflop_per_second"] = operations / result[name]["median_seconds"] / 1e12
        result[name]["temporary_mib"] = program.memory_analysis().temp_size_in_bytes / 2**20
        if name != implementation:
            result[f"{implementation} / {name}"] = timing.ratio(seconds[implementation], seconds[name])
    return result


def _run(program: Any, arrays: tuple[jax.Array, ...]) -> None:
    jax.block_until_ready(program(*arrays))


def main() -> None:
    """Runs the benchmark and prints one line of JSON."""
    options = timing.parser("Attention by blocks against attention by all scores.")
    options.add_argument("--implementation", choices=IMPLEMENTATIONS[1:], default="xla")
    arguments = options.parse_args()
    accelerated = {} if jax.default_backend() == "cpu" else ON_ACCELERATORS
    cases = SMOKE if arguments.smoke else CASES | accelerated
    rounds = arguments.repeats or (2 if arguments.smoke else 8)
    measured = {
        f"{name}, {'forward and gradients' if gradients else 'forward'}": measure(
            sizes, arguments.implementation, rounds, gradients=gradients
        )
        for name, sizes in cases.items()
        for gradients in (False, True)
    }
    timing.report("flash_attention", measured, smoke=arguments.smoke, output=arguments.output)


if __name__ == "__main__":
    main()
