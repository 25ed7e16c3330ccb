"""How long `coconut train` takes to its first step: without kept programs, with none kept yet, and with all kept.

    python -m experiments.benchmarks.start

Each start is a process of its own, from the command to the line of metrics of its first step: Python, imports, data,
parameters, compilation, one step. It is then killed. The three kinds of start take turns.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import ending
from experiments.benchmarks import timing

CASES = {
    "small graphs, 2 layers x 64": [
        *("--gin_file", "gin_configs/runs/small_graphs.gin", "--gin_file", "gin_configs/methods/coconut.gin"),
        "--gin.CurriculumConfig.first_stage=3",
    ],
    "ProsQA, GPT-2 small": [
        *("--gin_file", "gin_configs/runs/prosqa_from_scratch.gin", "--gin_file", "gin_configs/methods/coconut.gin"),
        *("--gin_file", "gin_configs/models/gpt2.gin", "--gin.CurriculumConfig.first_stage=6"),
        *("--gin.DataConfig.train=500", "--gin.DataConfig.validation=0", "--gin.DataConfig.test=0"),
        *("--gin.PipelineConfig.batch_size=4", "--gin.RunConfig.microbatches=1"),
    ],
}
SMOKE = ["--gin.DataConfig.train=40", "--gin.DataConfig.validation=8", "--gin.DataConfig.test=8"]
LONGEST = 600.0
"""Seconds in which a start has to reach its first step."""


def main(arguments: list[str] | None = None) -> None:
    """Measures and reports."""
    options = timing.parser("How long `coconut train` takes to its first step.").parse_args(arguments)
    names = list(CASES)[:1] if options.smoke else list(CASES)
    report = timing.Report("start", options)
    for name in names:
        flags = [*CASES[name], *(SMOKE if options.smoke else [])]
        rounds = options.repeats or 5
        with ending.by_exception(), tempfile.TemporaryDirectory() as folder:
            seconds = _measured(Path(folder), flags, rounds, name, before=0 if options.smoke else 1)
        case = {
            "rounds": rounds,
            **{kind: timing.summary(values) for kind, values in seconds.items()},
            "warm_ratio": timing.ratio(seconds["all kept"], seconds["none kept yet"]),
            "cold_ratio": timing.ratio(seconds["none kept yet"], seconds["nothing is kept"]),
        }
        report.add(name, case)
        print(f"{name}: with all programs kept {case['warm_ratio']['ratio']:.2f} of the time with none kept yet")
    report.finish()


def _measured(folder: Path, flags: list[str], rounds: int, name: str, before: int) -> timing.Seconds:
    kept = folder / "kept"

    def cold() -> float:
        shutil.rmtree(kept, ignore_errors=True)
        return _first_step(folder, flags, {"XDG_CACHE_HOME": str(kept)})

    kinds: dict[str, Callable[[], float]] = {
        "nothing is kept": lambda: _first_step(folder, flags, {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
        "none kept yet": cold,
        "all kept": lambda: _first_step(folder, flags, {"XDG_CACHE_HOME": str(kept)}),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    # Rounds before the first that counts read files from the disk.
    for index in range(-before, rounds):
        for kind, start in kinds.items():
            spent = start()
            if index >= 0:
                seconds[kind].append(spent)
        print(f"{name} round {index + 1}/{rounds}", file=sys.stderr, flush=True)
    return {kind: np.asarray(values) for kind, values in seconds.items()}


def _first_step(folder: Path, flags: list[str], environment: dict[str, str]) -> float:
    """Seconds from the command to the line of metrics of the first step."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "coconut",
        "train",
        *flags,
        "--gin.RunConfig.log_every=1",
        "--workdir",
        str(workdir),
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    with (folder / "errors").open("w+") as errors:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env={**inherited, **environment}, stdout=errors, stderr=errors)
        try:
            while time.perf_counter() - begun < LONGEST:
                with contextlib.suppress(FileNotFoundError, ValueError):
                    lines = map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
                    if any(line["kind"] == "train" for line in lines):
                        return time.perf_counter() - begun
                if process.poll() is not None:
                    break
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        raise SystemExit(f"{' '.join(command)} reached no step:\n{errors.read()}")


if __name__ == "__main__":
    main()
