"""What the benchmark of kernels times: each op at several sizes, computed by us and by others from the same numbers.

Every side gets its arrays in the layout that it is written for, so nobody pays for a transposition.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import pytorch_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

TFLOPS, GIGABYTES = "tflop_per_second", "gigabytes_per_second"


@dataclasses.dataclass(frozen=True)
class Program:
    """Something compiled, with its arguments.

    Attributes:
      start: begins a call, and returns what it will have computed.
      wait: returns when what was begun last is there.
      temporary_bytes: needed besides inputs and outputs, where the compiler tells.
      residual_bytes: kept by the forward pass for this backward pass.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], object] = jax.block_until_ready
    temporary_bytes: int | None = None
    residual_bytes: int | None = None

    def run(self, calls: int) -> None:
        """Calls one behind the other, so that the host's part of one passes while the device is at another."""
        result = None
        for _ in range(calls):
            result = self.start()
        self.wait(result)


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation.

    Attributes:
      sizes: what identifies it.
      work: floating-point operations or bytes that it takes at least; what a side does beyond them does not count.
      unit: of work done in a second, `TFLOPS` or `GIGABYTES`: what bounds the computation.
      ours: how each of our implementations comes to its program.
      others: the same for what they are compared with.
    """

    sizes: dict[str, int]
    work: float
    unit: str
    ours: Mapping[str, Callable[[], Program]]
    others: Mapping[str, Callable[[], Program]]


@dataclasses.dataclass(frozen=True)
class AttentionSizes:
    """Causal self-attention."""

    batch: int
    heads: int
    length: int
    features: int


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """One query a row and head, to a full cache whose heads are shared."""

    batch: int = 32
    heads: int = 32
    shared: int = 8
    columns: int = 4_096
    features: int = 128


@dataclasses.dataclass(frozen=True)
class LossSizes:
    """Rows, features and ids of a linear cross-entropy."""

    rows: int = 8_192
    features: int = 768
    columns: int = 50_257


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...], residual_bytes: int | None = None) -> Program:
    """The function compiled by JAX."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    temporary = None if memory is None else int(memory.temp_size_in_bytes)
    return Program(functools.partial(program, *arguments), temporary_bytes=temporary, residual_bytes=residual_bytes)


def compiled_backward(function: Callable[..., Any], arguments: tuple[jax.Array, ...]) -> Program:
    """The function's backward pass alone; its cotangent is its output."""
    out, pull = jax.jit(functools.partial(jax.vjp, function))(*arguments)
    residual_bytes = sum(x.nbytes for x in jax.tree.leaves(pull))
    return compiled(lambda pull, d_out: pull(d_out), (pull, out), residual_bytes)


def attention(sizes: AttentionSizes, dtype: str, implementations: list[str], *, backward: bool) -> Case:
    """The forward or the backward pass of `flash_attention`."""
    shape = (sizes.batch, sizes.heads, sizes.length, sizes.features)
    arrays = tuple(jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
    made = compiled_backward if backward else compiled

    def ours(implementation: str) -> Program:
        return made(functools.partial(flash_attention, causal=True, implementation=implementation), arrays)

    def library(implementation: Any) -> Program:
        call = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
        return made(call, heads_last(arrays))

    # Two products forward and five backward, each over the half of the scores that is seen.
    work = math.prod(shape) * sizes.length * (5 if backward else 2)
    pytorch = functools.partial(pytorch_attention.attention, shape, shape, dtype, causal=True, backward=backward)
    return Case(dataclasses.asdict(sizes), work, TFLOPS, each(ours, implementations), libraries(library, pytorch))


def decode(sizes: DecodeSizes, dtype: str, implementations: list[str]) -> Case:
    """The forward pass of `decode_attention`: what bounds it is how fast the cache is read."""
    queries = (sizes.batch, sizes.heads, 1, sizes.features)
    cache = (sizes.batch, sizes.shared, sizes.columns, sizes.features)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, x, dtype) for key, x in zip(keys, (queries, cache, cache), strict=True))
    bounds = jnp.zeros(sizes.batch, jnp.int32), jnp.full(sizes.batch, sizes.columns, jnp.int32)

    def ours(implementation: str) -> Program:
        return compiled(functools.partial(decode_attention, implementation=implementation), (q, k, v, *bounds))

    def library(implementation: Any) -> Program:
        call = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        return compiled(call, heads_last((q, k, v)))

    pytorch = functools.partial(pytorch_attention.attention, queries, cache, dtype, causal=False, backward=False)
    work = k.nbytes + v.nbytes
    return Case(dataclasses.asdict(sizes), work, GIGABYTES, each(ours, implementations), libraries(library, pytorch))


def loss(sizes: LossSizes, dtype: str, implementations: list[str]) -> Case:
    """The mean of `linear_cross_entropy` and the gradients of hidden states and vocabulary, against full logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (sizes.rows, sizes.features), dtype)
    vocabulary = jax.random.normal(keys[1], (sizes.columns, sizes.features), dtype) * 0.02
    labels = jax.random.randint(keys[2], (sizes.rows,), 0, sizes.columns)

    def program(function: Callable[..., jax.Array]) -> Program:
        return compiled(jax.value_and_grad(function, argnums=(0, 1)), (hidden, vocabulary, labels))

    def ours(implementation: str) -> Program:
        call = functools.partial(linear_cross_entropy, implementation=implementation)
        return program(lambda *arrays: jnp.mean(call(*arrays).losses))

    # Logits and both gradients; what an implementation computes twice is not counted twice.
    work = 3 * 2 * sizes.rows * sizes.features * sizes.columns
    others = {"full logits": functools.partial(program, full_logits)}
    return Case(dataclasses.asdict(sizes), work, TFLOPS, each(ours, implementations), others)


def full_logits(hidden: jax.Array, vocabulary: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss as one writes it down: all logits, formed once and kept for the backward pass."""
    logits = jnp.einsum("nd,vd->nv", hidden, vocabulary, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def heads_last(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """``[B, T, H, D]``, as JAX's own attention has it."""
    return tuple(x.swapaxes(1, 2) for x in arrays)


def each(ours: Callable[[str], Program], implementations: list[str]) -> dict[str, Callable[[], Program]]:
    """A program of each implementation."""
    return {f"pallas_kernels, {name}": functools.partial(ours, name) for name in implementations}


def libraries(
    library: Callable[[str], Program], pytorch: Callable[[], pytorch_attention.Timed]
) -> dict[str, Callable[[], Program]]:
    """JAX's own attention, by cuDNN too on a GPU, and PyTorch's."""
    names = ["xla", "cudnn"] if jax.default_backend() == "gpu" else ["xla"]
    theirs = {f"jax.nn, {name}": functools.partial(library, name) for name in names}
    return theirs | {"PyTorch": lambda: Program(*pytorch())}


forward, backward = (functools.partial(attention, backward=backward) for backward in (False, True))
MODELS = {
    "ProsQA's prompts": AttentionSizes(32, 4, 160, 64),
    "GPT-2 small": AttentionSizes(4, 12, 1_024, 64),
    "GPT-2 small on questions": AttentionSizes(128, 12, 192, 64),
    "long": AttentionSizes(1, 12, 4_096, 64),
    "target": AttentionSizes(8, 16, 2_048, 128),
}
CASES: dict[str, dict[str, Callable[[str, list[str]], Case]]] = {
    "flash_attention": {
        f"{name}, {'backward' if direction is backward else 'forward'}": functools.partial(direction, sizes)
        for name, sizes in MODELS.items()
        for direction in (forward, backward)
    },
    "decode_attention": {
        "GPT-2 small on questions": functools.partial(decode, DecodeSizes(64, 12, 12, 224, 64)),
        "target": functools.partial(decode, DecodeSizes()),
    },
    "linear_cross_entropy": {
        "GPT-2 small on questions": functools.partial(loss, LossSizes(rows=2_560)),
        "target": functools.partial(loss, LossSizes()),
    },
}
SMOKE: dict[str, dict[str, Callable[[str, list[str]], Case]]] = {
    "flash_attention": {
        "smoke, forward": functools.partial(forward, AttentionSizes(1, 2, 40, 16)),
        "smoke, backward": functools.partial(backward, AttentionSizes(1, 2, 40, 16)),
    },
    "decode_attention": {"smoke": functools.partial(decode, DecodeSizes(2, 4, 2, 64, 16))},
    "linear_cross_entropy": {"smoke": functools.partial(loss, LossSizes(64, 32, 500))},
}
