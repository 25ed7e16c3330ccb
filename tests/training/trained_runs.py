"""Runs that tests train, and what they leave in their workdirs."""

import dataclasses
import io
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from coconut.training import loop
from coconut.training.checkpoint import Checkpoints
from coconut.training.config import RunConfig
from coconut.training.loop import TrainResult, train
from coconut.training.progress import Progress

QUIET = Console(file=io.StringIO())
LANGUAGE = {"method": "no_cot"}


def trained(config: RunConfig, workdir: Path, **options: Any) -> TrainResult:
    return train(config, workdir, **{"console": QUIET, **options})


def lines_of(workdir: Path, *kinds: str) -> list[dict[str, Any]]:
    """The metrics of a run, without times, which differ, and without what was compiled again after a restart."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kinds = kinds or ("train", "stage", "validation")
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines if line["kind"] in kinds]


def final_state(workdir: Path) -> tuple[Mapping[str, np.ndarray], Progress]:
    """Every array of the latest checkpoint, by path, and where the run stands."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.step("latest")
    assert step is not None
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), checkpoints.arrays(step))
    state, progress = checkpoints._restore(step, abstract)
    checkpoints.close()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    return jax.tree.map(np.asarray, leaves), progress


def assert_same_run(one: Path, two: Path) -> None:
    """Both ended with the same bits and the same metrics."""
    (state, progress), (other, other_progress) = final_state(one), final_state(two)
    assert state.keys() == other.keys()
    assert any("opt_state" in name for name in state)
    for name, value in state.items():
        assert value.tobytes() == other[name].tobytes(), name
    by_the_clock = {"seconds": 0.0, "log_seconds": 0.0}
    assert dataclasses.replace(progress, **by_the_clock) == dataclasses.replace(other_progress, **by_the_clock)
    assert lines_of(one) == lines_of(two)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Presses Ctrl-C while the step after ``step`` is prepared."""
    learning_rate_at = loop.learning_rate_at

    def pressed(*arguments: Any, **keywords: Any) -> float:
        if keywords["step"] == step:
            signal.raise_signal(signal.SIGINT)
        return learning_rate_at(*arguments, **keywords)

    monkeypatch.setattr(loop, "learning_rate_at", pressed)


def skipped_steps(workdir: Path) -> list[int]:
    """The steps that were skipped, of a run that logs each."""
    return [line["step"] for line in lines_of(workdir, "train") if line["skipped"]]
