"""What bfloat16 is worth on a CPU: a training step with thoughts in bfloat16 over one in float32, and both losses.

    python -m experiments.benchmarks.dtypes [--case a|b|all]

Three forms of the step of `latent_step` take turns: float32; bfloat16, whose products with matrices are asked for in
float32 (`coconut.models.products`); and bfloat16 with products as JAX writes them. Behind the clock each of
the first two trains on one batch from the same parameters, and every loss is kept.
"""

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import numpy as np

from coconut.models.config import ExecutionConfig
from experiments.benchmarks import timing
from experiments.benchmarks.latent_step import CASES, Geometry, Trainer, describe, latent_schedule, smoke

PLATFORM = "coconut.models.products.platform"


def main(arguments: list[str] | None = None) -> None:
    """Measures and reports."""
    parser = timing.parser("What bfloat16 is worth on a CPU.")
    parser.add_argument("--case", choices=["a", "b", "all"], default="all")
    parser.add_argument("--losses", type=int, default=20, help="steps whose losses are kept")
    options = parser.parse_args(arguments)
    names = ["a", "b"] if options.case == "all" else [options.case]
    report = timing.Report("dtypes", options)
    for name in names:
        geometry = smoke(CASES[name]) if options.smoke else CASES[name]
        report.add(name, measure(name, geometry, options.repeats or geometry.rounds, options.losses))
    report.finish()


def measure(name: str, geometry: Geometry, rounds: int, losses: int) -> dict[str, Any]:
    """One case: seconds of the three forms, ratios within a round, and the losses of two."""
    [thoughts] = geometry.thoughts
    low = dataclasses.replace(geometry, execution=ExecutionConfig(dtype="bfloat16"))
    trainers = {"float32": Trainer(geometry), "bfloat16": Trainer(low), "bfloat16 as written": Trainer(low)}
    schedule, steps = latent_schedule(geometry, thoughts), {}
    for form, trainer in trainers.items():
        as_written = form == "bfloat16 as written"
        with mock.patch(PLATFORM, lambda: "any other") if as_written else contextlib.nullcontext():
            steps[form], _ = trainer.step(thoughts, schedule)
    float32, bfloat16 = (_losses(trainers[form], steps[form], losses) for form in ("float32", "bfloat16"))
    seconds = timing.interleave(steps, rounds, title=f"({name})")
    apart = np.max(np.abs(bfloat16 - float32) / np.abs(float32))
    result = {
        **describe(geometry, trainers["float32"], rounds),
        "thoughts": thoughts,
        **timing.ratio(seconds["bfloat16"], seconds["float32"]),
        **timing.quartiles("ratio_as_written", seconds["bfloat16 as written"] / seconds["float32"]),
        **{form: timing.summary(values) for form, values in seconds.items()},
        "losses": {"float32": float32.tolist(), "bfloat16": bfloat16.tolist()},
        "losses_differ_by": float(apart),
    }
    print(
        f"({name}) bfloat16 over float32: {result['ratio']:.3f}; with products as written: "
        f"{result['ratio_as_written']:.3f}; losses differ by {100 * apart:.2f} % at most"
    )
    return result


def _losses(trainer: Trainer, step: Any, count: int) -> np.ndarray:
    values = []
    for _ in range(count):
        step()
        values.append(float(trainer.metrics["loss"].mean()))
    return np.asarray(values)


if __name__ == "__main__":
    main()
