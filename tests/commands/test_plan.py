"""What `coconut plan` makes of compiled programs (test_plan_programs.py), and what it says of bad input."""

import dataclasses
import functools
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.commands.plan.advice import faster
from coconut.commands.plan.chips import CHIPS, TOPOLOGIES
from coconut.commands.plan.collectives import Collective
from coconut.commands.plan.generation import make_generation_plan
from coconut.commands.plan.hardware import Slice, make_slice, slice_of
from coconut.commands.plan.planning import Columns, make_plan, make_step, model_flops, read_plan
from coconut.commands.plan.program import flops, parse
from coconut.commands.plan.report import describe
from coconut.commands.plan.roofline import Roofline, collective_seconds, links, roofline
from coconut.commands.plan.search import meshes, search
from coconut.commands.plan.training import look_at_step
from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.mesh import MeshConfig
from coconut.models.experts import apply_experts
from coconut.models.parameters import abstract_decoder, decoder_parameters
from coconut.sharding import make_mesh
from coconut.training.config import RunConfig
from coconut.types import Language, Latent
from tests.tiny_models import EXPERTS_STYLE, quick_compilation
from tests.tiny_runs import tiny_run

V5E = CHIPS["v5e"]
COLUMNS = Columns(total=24, thoughts=2, suffix=6)


def planned_run(**changes: Any) -> RunConfig:
    return tiny_run(decoder={"vocab_size": 32, "num_layers": 3}, execution={"scan_layers": True}, **changes)


# --- Rooflines and plans ------------------------------------------------------------------------------------------


def test_seconds_of_collectives_are_those_of_a_ring() -> None:
    pod = Slice("pod", V5E, (16, 16), ())

    def seconds(kind: str, group: int, size: int = 10**9, **more: int) -> float:
        return collective_seconds(Collective(kind=kind, elements=0, bytes=size, group=group, times=3, **more), pod)

    both_ways = 2 * 50e9
    assert seconds("all-gather", 16) == pytest.approx(3 * 15 / 16 * 1e9 / both_ways)
    # The result of a reduce-scatter is what an all-gather is given.
    assert seconds("reduce-scatter", 16, 10**9 // 16) == pytest.approx(seconds("all-gather", 16))
    assert seconds("all-reduce", 16) == pytest.approx(2 * seconds("all-gather", 16))
    assert seconds("all-reduce", 16, dimensions=2) == pytest.approx(seconds("all-gather", 16))
    assert seconds("collective-permute", 0) == pytest.approx(3 * 1e9 / 50e9)
    assert seconds("all-gather", 1) == 0
    times = roofline(flops=197e12, traffic=819e9 / 2, collectives=[], where=pod)
    assert (times.compute, times.memory, times.expected, times.bound) == (1.0, 0.5, 1.0, "compute")


def test_links_that_a_collective_keeps_busy() -> None:
    cube, part = Slice("cube", CHIPS["v5p"], (4, 4, 8), ()), Slice("part", V5E, (4, 4), ())
    assert [links(cube, group) for group in (0, 2, 8, 32, 128)] == [6, 2, 2, 4, 6]
    assert [links(part, group) for group in (0, 4, 8)] == [2, 1, 2]  # Lines, no rings.
    assert links(cube, 4, dimensions=3) == 6
    assert links(Slice("one", V5E, (1,), ()), 0) == 1


def test_flops_are_of_the_matrices_that_a_column_uses() -> None:
    """Latent attention, and of eight experts three and the shared one."""
    config, columns = EXPERTS_STYLE, 10
    shapes = {name: leaf.shape for name, leaf in decoder_parameters(abstract_decoder(config)).items()}
    used = sum(
        math.prod(shape[-2:]) * (3 if len(shape) == 3 else 1)
        for name, shape in shapes.items()
        if name.startswith("layers.") and name.endswith(".kernel")
    )
    pairs = columns * (columns + 1) // 2
    attention = config.num_layers * 2 * config.num_heads * (12 + 5) * pairs
    logits = 2 * 4 * config.embed_dim * config.vocabulary
    expected = 3 * 2 * (2 * columns * used + attention + logits)
    assert model_flops(config, (Language(4), Latent(2), Language(4, 4)), 2) == expected


@pytest.mark.slow
def test_a_plan_of_a_tiny_run() -> None:
    config, here = planned_run(), Slice("one", V5E, (1,), (jax.devices()[0],))
    step = make_step(config, here, MeshConfig(), COLUMNS)
    with quick_compilation():
        plan = read_plan(config, here, step, COLUMNS)
    decoder, schedule = config.decoder, COLUMNS.schedule(config)
    width, columns, rows = 16, 24, 8
    matrices = 2 * 3 * (4 * width * width + 8 * width * width)
    attention = 3 * 4 * width * columns * (columns + 1) // 2
    logits = 2 * 5 * width * 32
    assert (
        plan.model_flops == model_flops(decoder, schedule, rows) == 3 * rows * (columns * matrices + attention + logits)
    )
    # Masked products of attention and a second pass through the thoughts, but no loop left out.
    assert plan.cost is not None
    assert 0.95 < plan.cost.flops / plan.model_flops < 1.6
    assert (plan.fits, plan.thoughts, plan.columns) == (True, 2, 24)
    assert (plan.cost.collectives, plan.cost.open_loops) == ({}, 0)
    # A quarter of what the compiler counts here is no matrix product.
    assert plan.cost.found is not None and 0.7 < plan.cost.found < 1
    assert plan.cost.traffic_found is not None and 0.9 < plan.cost.traffic_found < 1.05
    assert "DOUBTFUL" not in describe(plan)
    unread = dataclasses.replace(plan, cost=dataclasses.replace(plan.cost, found=0.1))
    assert "DOUBTFUL, step: of the operations that the compiler counts, 10 % were found" in describe(unread)
    overread = dataclasses.replace(plan, cost=dataclasses.replace(plan.cost, traffic_found=1.6))
    assert "DOUBTFUL, step: 160 % of the bytes that the compiler counts were found" in describe(overread)
    assert plan.memory["optimizer"] == pytest.approx(2 * plan.memory["parameters"], rel=0.01)
    assert plan.memory["parameters"] == 4 * plan.parameters
    assert plan.tokens_per_day == pytest.approx(86_400 * rows * columns / plan.cost.roofline.expected)
    content = json.loads(json.dumps(plan.to_json()))
    assert content["cost"]["roofline"]["expected"] == plan.cost.roofline.expected
    # The same program on a chip with less memory.
    refused = read_plan(config, dataclasses.replace(here, chip=dataclasses.replace(V5E, memory=1e3)), step, COLUMNS)
    assert not refused.fits
    assert any("remat" in suggestion for suggestion in refused.suggestions)


@pytest.mark.slow
def test_a_plan_of_generation() -> None:
    here = Slice("one", V5E, (1,), (jax.devices()[0],))
    with quick_compilation():
        plan = make_generation_plan(planned_run(), here, MeshConfig(), COLUMNS, batch_size=4)
    assert (plan.fits, plan.prompt, plan.thoughts, plan.new_tokens) == (True, 16, 2, 4)
    assert list(plan.memory) == list(plan.phases) == ["prefill", "thoughts", "decoding"]
    matrices = 2 * 3 * (4 * 16 * 16 + 8 * 16 * 16) * 4
    columns = {"prefill": 16, "thoughts": 2, "decoding": 4 + 1}  # The end marker is read first.
    for phase, count in columns.items():
        assert 1 < plan.phases[phase].flops / (matrices * count) < 1.6, phase
    assert plan.seconds == sum(cost.roofline.expected for cost in plan.phases.values())
    assert json.loads(json.dumps(plan.to_json()))["phases"]["decoding"]["turns"] == 4


@pytest.mark.slow
def test_plans_for_a_slice_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    """By the TPU's own compiler: both steps of a run whose rows, matrices and heads are split."""
    pytest.importorskip("libtpu")
    config, where, mesh = planned_run(), make_slice("v5e:2x2"), MeshConfig(fsdp=2, tensor=2)
    step = make_step(config, where, mesh, COLUMNS)
    plan = read_plan(config, where, step, COLUMNS)
    # Training on such devices says of the same program what its plan does.
    look_at_step(config, step.mesh, list(COLUMNS.schedules(config).values()), step.compiled)
    assert plan.faster is not None and plan.faster in caplog.text
    assert f"a step on v5e:2x2 can use {100 * plan.utilisation:.1f} %" in caplog.text
    generation = make_generation_plan(planned_run(), where, mesh, COLUMNS, batch_size=4)
    for cost in (plan.cost, generation.phases["decoding"]):
        assert cost is not None
        assert {"all-gather", "all-reduce"} <= set(cost.collectives)
        assert 0 < cost.roofline.fastest <= cost.roofline.expected
    assert plan.fits and generation.fits
    assert plan.cost is not None and plan.cost.open_loops == 0
    assert plan.cost.found is not None and 0.6 < plan.cost.found < 1
    # A quarter of the matrices on each chip, and norms.
    assert plan.memory["parameters"] < 4 * plan.parameters / 3


def test_tpus_are_known_by_their_kind_and_places() -> None:
    pytest.importorskip("libtpu")
    for topology in TOPOLOGIES:
        where = make_slice(topology)
        assert slice_of(where.devices) == where
    assert slice_of(jax.devices()) is None


def test_grouped_products_of_experts_count_the_rows_that_are_multiplied() -> None:
    """By the TPU's own compiler: three products forward, and for each one back to the rows and one to the matrices.

    On a mesh each device counts as if all its rows had chosen experts that it holds.
    """
    pytest.importorskip("libtpu")
    B, T, K, E, D, F = 4, 128, 2, 4, 128, 128
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), make_slice("v5e:2x2").devices)
    rows, matrices = PartitionSpec("fsdp"), PartitionSpec("tensor")
    shapes = {"x": (B, T, D), "weights": (B, T, K), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    given = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, rows if name in ("x", "weights") else matrices)
        )
        for name, shape in shapes.items()
    }
    chosen = jax.ShapeDtypeStruct((B, T, K), jnp.int32, sharding=NamedSharding(mesh, rows))

    def summed(given: dict[str, jax.Array], chosen: jax.Array) -> jax.Array:
        local = functools.partial(apply_experts, experts="tensor")
        apply = jax.shard_map(local, in_specs=(rows, rows, rows, *[matrices] * 3), out_specs=rows)
        return jnp.square(apply(given["x"], chosen, *(given[name] for name in ("weights", "gate", "up", "down")))).sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(summed)).lower(given, chosen).compile().as_text()
    assert program is not None
    assert flops(parse(program)) == 9 * 2 * (B // 2) * T * K * D * F


def test_an_axis_may_take_a_part_of_a_torus_dimension() -> None:
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(data=2, fsdp=64), make_slice("v5p:4x4x8").devices)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 64)
    assert len(set(mesh.devices.flat)) == 128


def test_meshes_of_a_slice() -> None:
    found = [(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes(12)]
    assert found == [(1, 12, 1), (2, 6, 1), (4, 3, 1), (1, 6, 2), (2, 3, 2), (1, 3, 4)]


# --- Bad input ----------------------------------------------------------------------------------------------------


def test_columns_that_make_no_batch() -> None:
    config = planned_run()
    for columns, message in (
        (Columns(total=8, thoughts=2, suffix=6), "at least 1 for the prompt"),
        (Columns(total=49, thoughts=2, suffix=6), "DecoderConfig.max_positions = 48"),
    ):
        with pytest.raises(CoconutError, match=message):
            columns.schedule(config)
    curriculum: CurriculumConfig = config.curriculum
    for padded in (True, False):
        # Nobody knows how many steps the questions have: as many as are replaced at most.
        settings = {"pad_latent_to_max": padded, "max_latent_stage": 3, "c_thought": 2, "last_stage": None}
        changed = dataclasses.replace(config, curriculum=dataclasses.replace(curriculum, **settings))
        columns = Columns(total=24, thoughts=None, suffix=6)
        assert columns.schedule(changed) == (Language(12), Latent(6), Language(6, 5))
    for method, schedule in (
        ("pause", (Language(24, 5),)),
        ("cot", (Language(24, 6),)),
        ("interleaved", (Language(12), Latent(2), Language(2, 1), Latent(2), Language(6, 5))),
    ):
        assert columns.schedule(dataclasses.replace(changed, method=method)) == schedule
    with pytest.raises(CoconutError, match="2 thoughts: the method writes this question without a block of thoughts"):
        COLUMNS.schedule(dataclasses.replace(config, method="cot"))


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v9:2x2", "v5e:axb"])
def test_an_unknown_topology_lists_those_known(topology: str) -> None:
    with pytest.raises(CoconutError, match=r"v5p:4x4x4.*'here'"):
        make_slice(topology)


def test_without_the_compiler_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr("coconut.commands.plan.hardware.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CoconutError, match=r"pip install coconut-jax\[tpu\]"):
        make_slice("v5e:2x2")


def test_what_does_not_divide_is_an_error() -> None:
    one = Slice("one", V5E, (1,), (jax.devices()[0],))
    with pytest.raises(CoconutError, match="fsdp = 3"):
        make_plan(planned_run(), one, MeshConfig(fsdp=3), COLUMNS)
    with pytest.raises(CoconutError, match="vocab_size is not set"):
        make_plan(tiny_run(), one, MeshConfig(), COLUMNS)


FLAGS = ("--gin_file", "gin_configs/runs/small_graphs.gin", "--gin_file", "gin_configs/methods/coconut.gin")
TINY = ("--gin.DecoderConfig.vocab_size=64", "--gin.DecoderConfig.num_layers=1", "--gin.DecoderConfig.embed_dim=16")


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["plan", *FLAGS, "--topology", "v9:2x2"])
    assert exit_code.value.code == EXIT_BAD_INPUT
    assert "v5p:4x4x4" in capsys.readouterr().err
    assert main(["plan", *FLAGS, "--topology", "here", "--answers", "-1"]) == EXIT_BAD_INPUT
    assert "--answers -1: must be at least 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_for_this_machine_is_compared_with_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    columns = ("--columns", "24", "--suffix", "6", "--output", str(output))
    with quick_compilation():
        # Without thoughts, whose program takes long to compile.
        adapters = ["--gin_file", "gin_configs/adapters/lora.gin", "--gin.AdapterConfig.rank=2"]
        flags = [*FLAGS[:3], "gin_configs/methods/cot.gin", *adapters, *TINY]
        search = ["--mesh", "data=1", "--search"]
        assert main(["plan", *flags, "--topology", "here", *search, "--answers", "0", *columns]) == EXIT_DONE
    content = json.loads(output.read_text())
    measured, plan = content["measured"], content["plans"][0]
    assert measured["expected"] == plan["cost"]["roofline"]["expected"] > 0
    assert measured["error"] == pytest.approx(measured["expected"] / measured["seconds"] - 1)
    assert "generation" not in content
    printed = capsys.readouterr()
    assert "measured here" in printed.out
    assert re.search(r"\| mesh +\| microbatches.*\n.*\n\| data=1 +\| 1 +\| none +\| yes ", printed.out)
    assert "data=1, 1 microbatch, remat 'none': fits" in printed.err


def test_the_first_way_that_fits_is_found_for_each_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is made up: four meshes of two devices, of which one splits no heads."""
    config = planned_run(pipeline={"batch_size": 8})
    tried: list[tuple[int, int, str, int]] = []

    def plan(way: RunConfig, where: Slice, mesh: MeshConfig, columns: Columns) -> Any:
        assert mesh.data is not None
        tried.append((mesh.data, mesh.fsdp, way.execution.remat, way.microbatches))
        if mesh.tensor == 2:
            raise CoconutError("no heads")
        # More shards need less memory and more time.
        fits = way.execution.remat == "full" and way.microbatches >= (2 if mesh.fsdp == 2 else 8)
        seconds = types.SimpleNamespace(roofline=types.SimpleNamespace(expected=float(mesh.fsdp)))
        return types.SimpleNamespace(fits=fits, cost=seconds, mesh=vars(mesh), memory={"all": 1})

    monkeypatch.setattr("coconut.commands.plan.search.make_plan", plan)
    devices = Slice("two", V5E, (2,), tuple(jax.devices()[:1] * 2))
    found = search(config, devices, COLUMNS, lambda *_: None)
    assert tried[:4] == [(1, 2, "none", 1), (1, 2, "dots", 1), (1, 2, "full", 1), (1, 2, "full", 2)]
    # Nothing is gathered there, so that microbatches come before recomputing.
    assert tried[4:7] == [(2, 1, "none", 1), (2, 1, "none", 2), (2, 1, "none", 4)]
    assert [(plan.mesh["fsdp"], plan.fits, way.microbatches) for way, plan in found] == [(2, True, 2), (1, False, 4)]
    assert tried[-1] == (1, 1, "none", 1), "a mesh that is refused is not tried in other ways"
    only = search(config, devices, COLUMNS, lambda *_: None, MeshConfig(data=1, fsdp=2))
    assert [plan.mesh["fsdp"] for _, plan in only] == [2]
    tried.clear()
    search(config, devices, COLUMNS, lambda *_: None, MeshConfig())
    # All devices are data, and so 4 rows of 8 are one device's.
    assert {(data, count) for data, _, _, count in tried} == {(2, 1), (2, 2), (2, 4)}


@pytest.mark.parametrize(
    ("changes", "mesh", "times", "expected"),
    [
        ({}, {}, (3, 1, 2), "ExecutionConfig.dtype = 'bfloat16'"),
        ({}, {"fsdp": 4}, (1, 2, 3), "ExecutionConfig.gather = 'step': matrices are gathered once a step"),
        (
            {"gather": "step", "microbatches": 8},
            {"fsdp": 4},
            (1, 2, 3),
            "PipelineConfig.batch_size = 16: the same matrices are gathered",
        ),
        ({}, {"tensor": 2}, (1, 2, 3), "less of tensor"),
        ({"gather": "step"}, {"tensor": 2, "fsdp": 2}, (1, 2, 3), "less of tensor"),
        ({"remat": "full"}, {"fsdp": 4}, (3, 2, 1), "remat = 'dots'"),
        ({}, {"fsdp": 4}, (1, 3, 2), "PipelineConfig.batch_size = 16: the same matrices are read"),
        ({}, {"fsdp": 4}, (3, 2, 1), None),
    ],
)
def test_what_would_help_most_is_about_what_takes_longest(
    changes: dict[str, Any], mesh: dict[str, int], times: tuple[float, ...], expected: str | None
) -> None:
    execution = {"dtype": "float32" if expected and "dtype" in expected else "bfloat16"}
    execution |= {name: changes.pop(name) for name in ("remat", "gather") if name in changes}
    config = planned_run(pipeline={"batch_size": 8}, **changes)
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, **execution))
    devices: Any = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1, **mesh})
    compute, memory, interconnect = map(float, times)
    found = faster(config, devices, Roofline(compute=compute, memory=memory, interconnect=interconnect))
    assert found is None if expected is None else found is not None and expected in found
