"""A training step with thoughts over plain steps, ours and Hugging Face's, and over loops of thoughts in PyTorch."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from coconut.models.config import ExecutionConfig
from experiments.benchmarks import latent_step, pytorch_steps
from experiments.benchmarks.latent_step import Asked, Geometry, Trainer, latent_schedule, plain_schedule
from experiments.benchmarks.pytorch_steps import TorchTrainer
from experiments.on_gpu.record import Measurement, Progress
from experiments.on_gpu.sides import Prepare, compare

ROUNDS = 7
OURS = "ours, with thoughts"
LISTS = "PyTorch, thoughts, inputs rebuilt as lists"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
      dtype: of activations; parameters are float32.
      batch: rows.
      thoughts: columns between a prompt of 160 columns and an answer of 20.
      lists: also the loop that takes many seconds a step.
      scan_layers: `ExecutionConfig.scan_layers` of our side, True in ``gin_configs/pretrained.gin``.
    """

    dtype: str
    batch: int
    thoughts: int
    lists: bool = True
    scan_layers: bool = True

    def geometry(self, *, smoke: bool) -> Geometry:
        """Its sizes: GPT-2 small, or tiny ones."""
        geometry = Geometry(latent_step.GPT2_SMALL, batch=self.batch, thoughts=(self.thoughts,), rounds=ROUNDS)
        geometry = latent_step.smoke(geometry) if smoke else geometry
        execution = ExecutionConfig(dtype=self.dtype, scan_layers=self.scan_layers)
        return dataclasses.replace(geometry, execution=execution)


COMPARISONS = (
    Comparison("bfloat16", 128, 6),
    Comparison("bfloat16", 32, 6, lists=False),
    Comparison("float32", 128, 6, lists=False),
    Comparison("bfloat16", 128, 32, lists=False),
    Comparison("float32", 32, 6, lists=False),
    Comparison("bfloat16", 32, 32, lists=False),
    Comparison("float32", 128, 32, lists=False),
    Comparison("float32", 32, 32, lists=False),
    Comparison("bfloat16", 128, 6, lists=False, scan_layers=False),
)
SMOKE = (Comparison("bfloat16", 128, 2), Comparison("float32", 128, 2, lists=False, scan_layers=False))


def measurements(*, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """A measurement for each comparison, and one of what computes our attention."""
    del work
    first, *others = (
        (_name(one), functools.partial(measure, one, smoke=smoke)) for one in (SMOKE if smoke else COMPARISONS)
    )
    implementations = functools.partial(attentions, COMPARISONS[0], smoke=smoke)
    return dict([first, ("attention by each implementation", implementations), *others])


def _name(one: Comparison) -> str:
    layers = "" if one.scan_layers else ", layers one by one"
    return f"{one.dtype}, batch {one.batch}, {one.thoughts} thoughts{layers}"


def measure(comparison: Comparison, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """Ours with thoughts against all others, in one process, in turns."""
    geometry, thoughts = comparison.geometry(smoke=smoke), comparison.thoughts
    trainer = Trainer(geometry)
    plain, latent = plain_schedule(geometry, thoughts), latent_schedule(geometry, thoughts)
    asked = {OURS: Asked(thoughts, latent), "ours, plain": Asked(thoughts, plain)}
    if not comparison.scan_layers:
        # A scanned stack leaves out no columns of its last layer.
        asked["ours, plain, every column"] = Asked(thoughts, plain, every_column=True)
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        pool.submit(pytorch_steps.load)  # Where PyTorch is missing, its sides will say so.
        trainer.steps(list(asked.values()))
    compiling = time.perf_counter() - start
    print(f"compiled {len(asked)} programs beside each other in {compiling:.1f} s", flush=True)
    sides: dict[str, Prepare] = {name: functools.partial(_ours, trainer, one) for name, one in asked.items()}
    sides |= _pytorch(comparison, geometry, trainer.parameters)
    result = compare(
        sides, 2 if smoke else ROUNDS, title=f"{comparison.dtype}, {geometry.batch} rows", progress=progress
    )
    sizes = {**dataclasses.asdict(comparison), **latent_step.describe(geometry, trainer, ROUNDS)}
    return {**sizes, "compile_seconds": compiling, **result}


def attentions(comparison: Comparison, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """Our step with thoughts, with attention by dense products and by the kernels."""
    names = ["dense", "gpu" if jax.default_backend() == "gpu" else "reference"]
    geometries = {}
    for name in names:
        geometry = comparison.geometry(smoke=smoke)
        execution = dataclasses.replace(geometry.execution, attention=name)
        geometries[name] = dataclasses.replace(geometry, execution=execution)

    def prepare(geometry: Geometry) -> tuple[Callable[[], None], Callable[[], Mapping[str, Any]]]:
        asked = Asked(comparison.thoughts, latent_schedule(geometry, comparison.thoughts))
        return _ours(Trainer(geometry), asked)

    sides: dict[str, Prepare] = {name: functools.partial(prepare, geometry) for name, geometry in geometries.items()}
    result = compare(sides, 2 if smoke else ROUNDS, title="attention", progress=progress)
    return {**dataclasses.asdict(comparison), **result}


def _ours(trainer: Trainer, asked: Asked) -> tuple[Callable[[], None], Callable[[], Mapping[str, Any]]]:
    [(take, temporary)] = trainer.steps([asked])
    return take, lambda: {"temporary_bytes": temporary}


def _pytorch(comparison: Comparison, geometry: Geometry, parameters: int) -> dict[str, Prepare]:
    """Their steps on the same tokens."""
    thoughts, answer = comparison.thoughts, geometry.answer
    tokens = latent_step.random_batch(geometry, thoughts, plain_schedule(geometry, thoughts)).tokens
    trainer = functools.cache(
        lambda: TorchTrainer(geometry.decoder, latent_step.OPTIMIZER, parameters, dtype=geometry.execution.dtype)
    )

    def side(make: Callable[[TorchTrainer], Callable[[], None]]) -> Prepare:
        def prepare() -> tuple[Callable[[], None], Callable[[], Mapping[str, Any]]]:
            take, most = make(trainer()), trainer().watch_memory()
            return take, lambda: {**most(), **trainer().described}

        return prepare

    sides = {
        "Hugging Face, plain, as its users run it": side(lambda x: x.plain_with_labels(tokens, answer)),
        "Hugging Face, plain, logits of labels, fused activation": side(
            lambda x: x.plain(tokens, answer, fused_activation=True)
        ),
        "PyTorch, thoughts, from the cache": side(lambda x: x.thoughts_from_cache(tokens, thoughts, answer)),
    }
    if comparison.lists:
        sides[LISTS] = side(lambda x: x.thoughts_by_lists(tokens, thoughts, answer))
    return sides
