"""What the TPU compiler makes of every kernel, forward and backward, on several generations, without a TPU.

    python -m experiments.benchmarks.tpu_compile [--generation v5e] [--op linear_cross_entropy]

Needs `libtpu` (the extra ``tpu``). The compiler is the one that a TPU's host would run: it lays out registers and VMEM,
and rejects what does not fit. Speed it does not tell. VMEM is what it reports of each kernel; on v6e that includes
operands which XLA places there whole, a vocabulary of 74 MiB for one. A new op adds its cases to `CASES`.
"""

import dataclasses
import functools
import importlib.metadata
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from experiments.benchmarks import flash_attention_cases, timing
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
AXIS = "chips"


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
      function: what is differentiated by its first ``differentiated`` arguments; returns a scalar.
      shapes: of its arguments.
      specs: how they are split over the mesh; on one chip where there are none.
      differentiated: number of arguments.
    """

    function: Callable[..., jax.Array]
    shapes: tuple[tuple[tuple[int, ...], DTypeLike], ...]
    specs: tuple[PartitionSpec, ...] = ()
    differentiated: int = 2

    @property
    def program(self) -> Callable[..., Any]:
        """The function's value and gradients."""
        return jax.value_and_grad(self.function, argnums=tuple(range(self.differentiated)))


def loss_case(rows: int, features: int, columns: int, dtype: str, *, sharded: bool = False) -> Case:
    """Loss, soft cap and predictions; over a vocabulary split over all chips where it is ``sharded``."""

    def loss(hidden: jax.Array, vocabulary: jax.Array, labels: jax.Array) -> jax.Array:
        axis = AXIS if sharded else None
        found = linear_cross_entropy(hidden, vocabulary, labels, soft_cap=30.0, axis_name=axis, implementation="tpu")
        return jnp.mean(found.losses) + jnp.mean(found.predictions)

    shapes = (((rows, features), dtype), ((columns, features), dtype), ((rows,), jnp.int32))
    if not sharded:
        return Case(loss, shapes)
    specs = (PartitionSpec(), PartitionSpec(AXIS), PartitionSpec())

    def split(*arrays: jax.Array) -> jax.Array:
        # Made at every call: it keeps the mesh that it meets first.
        return jax.shard_map(loss, in_specs=specs, out_specs=PartitionSpec())(*arrays)

    return Case(split, shapes, specs)


def decode_case(batch: int, heads: int, shared: int, queries: int, columns: int, features: int, dtype: str) -> Case:
    """Outputs and log-normalizers of ``heads`` heads of queries to ``shared`` heads of keys."""

    def total(*arrays: jax.Array) -> jax.Array:
        call = functools.partial(decode_attention, return_log_normalizers=True, implementation="tpu")
        return sum((jnp.sum(x.astype(jnp.float32)) for x in call(*arrays)), start=jnp.zeros(()))

    cache, bounds = ((batch, shared, columns, features), dtype), ((batch,), jnp.int32)
    return Case(total, (((batch, heads, queries, features), dtype), cache, cache, bounds, bounds), differentiated=3)


CASES: dict[str, dict[str, Case]] = {
    "linear_cross_entropy": {
        "GPT-2 small, bfloat16": loss_case(8_192, 768, 50_257, "bfloat16"),
        "GPT-2 small, float32": loss_case(8_192, 768, 50_257, "float32"),
        "Llama 3.1 8B, bfloat16": loss_case(8_192, 4_096, 128_256, "bfloat16"),
        "Llama 3.1 8B, vocabulary over 4 chips": loss_case(8_192, 4_096, 128_256, "bfloat16", sharded=True),
        "odd sizes, float32": loss_case(77, 100, 1_001, "float32"),
    },
    "decode_attention": {
        "GPT-2 small, bfloat16": decode_case(32, 12, 12, 1, 1_024, 64, "bfloat16"),
        "GPT-2 small, float32": decode_case(32, 12, 12, 1, 1_024, 64, "float32"),
        "Llama 3.1 8B, bfloat16": decode_case(8, 32, 8, 1, 8_192, 128, "bfloat16"),
        "odd sizes, float32": decode_case(3, 6, 2, 5, 777, 100, "float32"),
    },
    "flash_attention": {
        name: Case(function, shapes, differentiated=3)
        for name, (function, shapes) in flash_attention_cases.cases("tpu").items()
    },
}


def compile_case(case: Case, devices: np.ndarray) -> dict[str, Any]:
    """Compiles a case; raises what the compiler raises.

    Returns:
      Seconds to compile, VMEM bytes of each kernel, and bytes that the program needs besides inputs and outputs.
    """
    mesh = Mesh(devices if case.specs else devices[:1], (AXIS,))
    specs = case.specs or (PartitionSpec(),) * len(case.shapes)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(case.shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        compiled = jax.jit(case.program).trace(*arguments).lower().compile()
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {
        "compile_seconds": seconds,
        "vmem_bytes": kernel_memory(compiled.as_text() or ""),
        "temporary_bytes": None if memory is None else int(memory.temp_size_in_bytes),
    }


def kernel_memory(program: str) -> list[int]:
    """VMEM that each Pallas kernel of a compiled program uses, in bytes."""
    kernels = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    used = [re.search(r'"used_scoped_memory_configs":\[{"memory_space":"1",[^}]*"size":"(\d+)"', x) for x in kernels]
    if not kernels or None in used:
        raise ValueError("the program has no kernel, or the compiler does not tell what its kernels use")
    return [int(match[1]) for match in used if match]


def main(arguments: list[str] | None = None) -> None:
    """Compiles the cases asked for."""
    parser = timing.parser("Compiles every kernel for TPUs that are not there.")
    parser.add_argument("--generation", choices=[*TOPOLOGIES, "all"], default="all")
    parser.add_argument("--op", choices=[*CASES, "all"], default="all")
    parser.add_argument("--case", help="cases with this in their name")
    options = parser.parse_args(arguments)
    # There is no TPU here to look for, and another process may be compiling too.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    report = timing.Report("tpu_compile", options)
    report.add("libtpu", importlib.metadata.version("libtpu"))
    for generation in TOPOLOGIES if options.generation == "all" else [options.generation]:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
        devices, results = np.array(topology.devices), {}
        for op in CASES if options.op == "all" else [options.op]:
            for name, case in CASES[op].items():
                if options.case is None or options.case in name:
                    result = compile_case(case, devices)
                    results.setdefault(op, {})[name] = result
                    report.add(generation, results)
                    print(f"{generation} {op} {name}: {result}", flush=True)
    report.finish()


if __name__ == "__main__":
    main()
