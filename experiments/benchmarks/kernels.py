"""What a kernel costs: time and temporary memory of each implementation, and their ratios to the obvious form.

    python -m experiments.benchmarks.kernels --op linear_cross_entropy [--implementation xla]

``linear_cross_entropy`` is the mean loss of 8,192 rows over GPT-2's vocabulary and the gradients of hidden states and
vocabulary, against the same by full logits; memory is what XLA's program needs besides its inputs and outputs.
``decode_attention`` is one query a row to a full cache of 4,096 columns, forward alone, against
`jax.nn.dot_product_attention`; what bounds it is how fast the cache is read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.api import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class LossSizes:
    """Rows, features and ids of a linear cross-entropy."""

    rows: int = 8_192
    features: int = 768
    columns: int = 50_257


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Rows, heads of queries, heads of keys, columns and features of a cache."""

    batch: int = 8
    heads: int = 32
    shared: int = 8
    columns: int = 4_096
    features: int = 128


def full_logits(hidden: jax.Array, vocabulary: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss as one writes it down: all logits, formed once and kept for the backward pass."""
    logits = jnp.einsum("nd,vd->nv", hidden, vocabulary, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def compiled(function: Callable[..., Any], arguments: tuple[jax.Array, ...]) -> tuple[Callable[[], None], int | None]:
    """A call of the function with the arguments, compiled, and its temporary bytes."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()

    def call() -> None:
        jax.block_until_ready(program(*arguments))

    return call, None if memory is None else int(memory.temp_size_in_bytes)


def measure_loss(sizes: LossSizes, dtype: str, implementation: str, rounds: int) -> dict[str, Any]:
    """Loss and gradients by an implementation, over those by full logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (sizes.rows, sizes.features), dtype)
    vocabulary = jax.random.normal(keys[1], (sizes.columns, sizes.features), dtype) * 0.02
    labels = jax.random.randint(keys[2], (sizes.rows,), 0, sizes.columns)

    def blocked(hidden: jax.Array, vocabulary: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(linear_cross_entropy(hidden, vocabulary, labels, implementation=implementation).losses)

    arguments = (hidden, vocabulary, labels)
    mine, mine_bytes = compiled(jax.value_and_grad(blocked, argnums=(0, 1)), arguments)
    full, full_bytes = compiled(jax.value_and_grad(full_logits, argnums=(0, 1)), arguments)
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


def measure_decode(sizes: DecodeSizes, dtype: str, implementation: str, rounds: int) -> dict[str, Any]:
    """One query a row by an implementation, over the same by JAX's own attention."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (sizes.batch, sizes.heads, 1, sizes.features), dtype)
    k, v = (jax.random.normal(x, (sizes.batch, sizes.shared, sizes.columns, sizes.features), dtype) for x in keys[1:])
    start, length = jnp.zeros(sizes.batch, jnp.int32), jnp.full(sizes.batch, sizes.columns, jnp.int32)
    call = functools.partial(decode_attention, implementation=implementation)
    mine, mine_bytes = compiled(call, (q, k, v, start, length))
    # Theirs is laid out with the heads behind the columns.
    theirs, their_bytes = compiled(jax.nn.dot_product_attention, tuple(x.swapaxes(1, 2) for x in (q, k, v)))
    seconds = timing.interleave({"decode_attention": mine, "jax": theirs}, rounds, title="decode_attention")
    return {
        **dataclasses.asdict(sizes),
        "dtype": dtype,
        "implementation": implementation,
        "rounds": rounds,
        **timing.ratio(seconds["decode_attention"], seconds["jax"]),
        **{
            name: {
                **timing.summary(seconds[name]),
                "temporary_bytes": size,
                "gigabytes_per_second": (k.nbytes + v.nbytes) / seconds[name].min() / 1e9,
            }
            for name, size in {"decode_attention": mine_bytes, "jax": their_bytes}.items()
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures the op asked for."""
    parser = timing.parser("Time and memory of a kernel over those of the obvious form.")
    parser.add_argument("--op", choices=["linear_cross_entropy", "decode_attention"], required=True)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)
    rounds = options.repeats or (2 if options.smoke else 5)
    asked = (options.dtype, options.implementation, rounds)
    if options.op == "linear_cross_entropy":
        sizes = LossSizes(rows=64, features=32, columns=500) if options.smoke else LossSizes()
        case = measure_loss(sizes, *asked)
    else:
        case = measure_decode(DecodeSizes(columns=64) if options.smoke else DecodeSizes(), *asked)
    print(f"{options.op} over the obvious form, time: {case['ratio']:.3f}")
    timing.report("kernels", {options.op: case}, smoke=options.smoke, output=options.output)


if __name__ == "__main__":
    main()
