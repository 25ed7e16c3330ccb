"""``superposition.gin``: what Coconut, CoT and No-CoT reach, as far as the time goes.

Validation accuracy is written as it comes, so that a run that is stopped leaves its curve. A run that is begun again
on the same disk goes on from its checkpoint.
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from coconut.commands.configuration import resolve_run
from coconut.commands.evaluate import EvaluateConfig, evaluate_workdir
from coconut.commands.train import validate
from coconut.datasets import Dataset, load_dataset
from coconut.training.config import RunConfig, to_json
from coconut.training.loop import train
from coconut.training.run import Run
from coconut.training.state import Model
from experiments.on_gpu.record import Measurement, Progress

RUN_FILE = "gin_configs/runs/superposition.gin"
METHODS = ("coconut", "cot", "no_cot")
SHARES = {"a twelfth of the epochs": 12, "all epochs": 1}
"""The recipe's 25 epochs a stage and 300 in all, divided by so much."""
TINY = (
    "DataConfig.train = 64",
    "DataConfig.validation = 8",
    "DataConfig.test = 8",
    "DecoderConfig.embed_dim = 16",
    "DecoderConfig.num_heads = 2",
    "PipelineConfig.batch_size = 32",
    "CurriculumConfig.epochs_per_stage = 1",
    "CurriculumConfig.max_latent_stage = 1",
    "CurriculumConfig.total_epochs = 3",
)


def measurements(*, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """Each method with fewer epochs, then with all."""
    shares = {"tiny": 1} if smoke else SHARES
    return {
        f"{method}, {name}": functools.partial(measure, method, share, work / "superposition", smoke=smoke)
        for name, share in shares.items()
        for method in METHODS
    }


def run_config(method: str, share: int, *, smoke: bool) -> RunConfig:
    """The recipe in bfloat16, its epochs divided by ``share`` and none of its other numbers changed."""
    bindings = [
        "ExecutionConfig.dtype = 'bfloat16'",
        f"CurriculumConfig.epochs_per_stage = {max(1, 25 // share)}",
        f"CurriculumConfig.total_epochs = {300 // share}",
        "RunConfig.save_every = None",
        "RunConfig.evaluation_batch_size = 512",
    ]
    return resolve_run([RUN_FILE, f"gin_configs/methods/{method}.gin"], bindings + (list(TINY) if smoke else []))


@functools.cache
def questions(*, smoke: bool) -> Dataset:
    """The questions, made once for all methods."""
    return load_dataset(run_config(METHODS[0], 1, smoke=smoke).data)


def measure(method: str, share: int, work: Path, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """Trains a method, and answers the test questions with the checkpoint that the validation questions chose."""
    config = run_config(method, share, smoke=smoke)
    workdir = work / f"{method}_{share}"
    curve: list[dict[str, Any]] = []
    start = time.perf_counter()

    def note(model: Model, run: Run, dataset: Dataset, stage: int) -> Mapping[str, float]:
        began = time.perf_counter()
        found = validate(model, run, dataset, stage)
        now = time.perf_counter()
        curve.append({"seconds": now - start, "validating": now - began, "stage": stage, **found})
        progress({"validations": curve, "config": to_json(config)})
        print(f"{method}, stage {stage}: {found}, {now - start:.0f} s", flush=True)
        return found

    console = Console(quiet=True)
    dataset = questions(smoke=smoke)
    trained = train(config, workdir, dataset=dataset, validate=note, console=console)
    if not trained.progress.finished:
        raise RuntimeError("it was interrupted")
    found = evaluate_workdir(workdir, EvaluateConfig(split="test", which="best"), console=console)
    return {
        "epochs": config.curriculum.total_epochs,
        "share_of_epochs": 1 / share,
        "steps": trained.progress.step,
        "training_seconds": trained.progress.seconds,
        "test": found["trained"],
        "validations": curve,
        "config": to_json(config),
    }
