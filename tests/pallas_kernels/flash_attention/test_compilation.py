"""The TPU kernels through the real compiler, which needs no TPU, and the GPU kernels lowered for CUDA."""

import contextlib
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks.flash_attention_cases import cases
from pallas_kernels.flash_attention import flash_attention
from tests.pallas_kernels.devices import one_absent_gpu

GROUPED = "Llama 3 heads, rows of their own, bfloat16"


def gradients_of(function):
    return jax.grad(function, argnums=(0, 1, 2))


@pytest.fixture(scope="module")
def tpu_devices():
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nobody holds a TPU here, so another process that compiles for one is no reason to wait.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.mark.slow
@pytest.mark.parametrize("name", [GROUPED, "segments", "few queries"])
def test_compiles_for_a_tpu(name, tpu_devices):
    """Forward and gradients in one program; `auto` means the kernel wherever there are enough queries."""
    mesh = Mesh(np.asarray(tpu_devices[:1]), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    implementation = "tpu" if name == "few queries" else "auto"
    function, shapes = cases(implementation)[name]
    arrays = [jax.ShapeDtypeStruct(*of, sharding=everywhere) for of in shapes]
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients_of(function)).trace(*arrays).lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    # The scores of the first case are 512 MiB, its largest array 32.
    assert memory.temp_size_in_bytes < 64 * 2**20
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tpu", "xla"])
def test_compiles_for_a_pod_with_heads_and_rows_split(tpu_devices, implementation):
    mesh = Mesh(np.asarray(tpu_devices[:4]).reshape(2, 2), ("data", "tensor"))
    split, rows = PartitionSpec("data", "tensor"), PartitionSpec("data")
    function, shapes = cases(implementation)[GROUPED]
    specs = (split, split, split, PartitionSpec(), rows, rows)
    arrays = [
        jax.ShapeDtypeStruct(*of, sharding=NamedSharding(mesh, spec)) for of, spec in zip(shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        whole = jax.shard_map(gradients_of(function), in_specs=specs, out_specs=split)
        compiled = jax.jit(whole).trace(*arrays).lower().compile()
    text = compiled.as_text()
    assert text is not None
    assert text.count('custom_call_target="tpu_custom_call"') == (3 if implementation == "tpu" else 0)
    assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.parametrize("name", cases("gpu"))
def test_lowers_for_cuda(name):
    function, shapes = cases("gpu")[name]
    arrays = [jax.ShapeDtypeStruct(*of) for of in shapes]
    for program, kernels in ((function, 1), (gradients_of(function), 3)):
        with one_absent_gpu():
            text = jax.jit(program).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == kernels


@pytest.mark.parametrize("interpret", [False, True])
def test_lowers_where_64_bits_are_enabled(interpret):
    """The interpreter insists on indices of one dtype, which Triton's lowering does not look at."""
    shape = jax.ShapeDtypeStruct((2, 4, 70, 16), "float32")

    def total(q, k, v):
        out = flash_attention(q, k, v, causal=True, implementation="gpu", interpret=interpret)
        assert not isinstance(out, tuple)
        return out.sum()

    with jax.enable_x64(True), contextlib.nullcontext() if interpret else one_absent_gpu():
        traced = jax.jit(gradients_of(total)).trace(shape, shape, shape)
        text = traced.lower(lowering_platforms=("cpu" if interpret else "cuda",)).as_text()
        assert {x.dtype.name for x in jax.tree.leaves(traced.out_info)} == {"float32"}
    assert "tensor<2x4x70x16xf64>" not in text
