"""What a kernel costs: time and temporary memory of each implementation, and their ratios to the obvious form.

    python -m experiments.benchmarks.kernels --op linear_cross_entropy [--implementation xla]

``linear_cross_entropy`` is the mean loss of 8,192 rows over GPT-2's vocabulary and the gradients of hidden states and
vocabulary, against the same by full logits; memory is what XLA's program needs besides its inputs and outputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.api import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class LossSizes:
    """Rows, features and ids of a linear cross-entropy."""

    rows: int = 8_192
    features: int = 768
    columns: int = 50_257


def full_logits(hidden: jax.Array, vocabulary: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss as one writes it down: all logits, formed once and kept for the backward pass."""
    logits = jnp.einsum("nd,vd->nv", hidden, vocabulary, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def compiled(loss: Callable[..., jax.Array], arguments: tuple[jax.Array, ...]) -> tuple[Callable[[], None], int | None]:
    """A function that computes a loss and the gradients of its first two arguments, and its temporary bytes."""
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    memory = program.memory_analysis()
    return (
        lambda: jax.block_until_ready(program(*arguments)) and None,
        None if memory is None else int(memory.temp_size_in_bytes),
    )


def measure_loss(sizes: LossSizes, dtype: str, implementation: str, rounds: int) -> dict[str, Any]:
    """Loss and gradients by an implementation, over those by full logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (sizes.rows, sizes.features), dtype)
    vocabulary = jax.random.normal(keys[1], (sizes.columns, sizes.features), dtype) * 0.02
    labels = jax.random.randint(keys[2], (sizes.rows,), 0, sizes.columns)

    def blocked(hidden: jax.Array, vocabulary: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(linear_cross_entropy(hidden, vocabulary, labels, implementation=implementation).losses)

    mine, mine_bytes = compiled(blocked, (hidden, vocabulary, labels))
    full, full_bytes = compiled(full_logits, (hidden, vocabulary, labels))
    seconds = timing.interleave({"blocked": mine, "full": full}, rounds, title="linear_cross_entropy")
    # Logits and both gradients; what an implementation computes twice is not counted twice.
    operations = 3 * 2 * sizes.rows * sizes.features * sizes.columns
    variants = {"blocked": mine_bytes, "full": full_bytes}
    return {
        **dataclasses.asdict(sizes),
        "dtype": dtype,
        "implementation": implementation,
        "rounds": rounds,
        **timing.ratio(seconds["blocked"], seconds["full"]),
        **{
            name: {
                **timing.summary(seconds[name]),
                "temporary_bytes": size,
                "gigaflops_per_second": operations / seconds[name].min() / 1e9,
            }
            for name, size in variants.items()
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures the op asked for."""
    parser = timing.parser("Time and memory of a kernel over those of the obvious form.")
    parser.add_argument("--op", choices=["linear_cross_entropy"], required=True)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)
    sizes = LossSizes(rows=64, features=32, columns=500) if options.smoke else LossSizes()
    rounds = options.repeats or (2 if options.smoke else 5)
    case = measure_loss(sizes, options.dtype, options.implementation, rounds)
    print(f"{options.op} over full logits, time: {case['ratio']:.3f}")
    timing.report("kernels", {options.op: case}, smoke=options.smoke, output=options.output)


if __name__ == "__main__":
    main()
