"""What microbatches are worth on a CPU: training steps whose activations fit the caches part by part.

    python -m experiments.benchmarks.microbatches [--case a|b|all]

The geometries are those of `experiments.benchmarks.latent_step` with 6 thoughts, and freed memory stays with the
process, as with the ``coconut`` command (`coconut.commands.allocator`). Steps with 1, 2, 4 and, where the
batch has as many rows, 8 microbatches take turns; the batch is the same, and so is the update to rounding.
"""

import functools
from typing import Any
from unittest import mock

import numpy as np

from coconut.commands.allocator import keep_freed_memory
from experiments.benchmarks import latent_step, timing
from experiments.benchmarks.latent_step import CASES, Geometry, Trainer, describe, latent_schedule, smoke

PARTS = (1, 2, 4, 8)


def main(arguments: list[str] | None = None) -> None:
    """Measures and reports."""
    parser = timing.parser("What microbatches are worth on a CPU.")
    parser.add_argument("--case", choices=["a", "b", "all"], default="all")
    options = parser.parse_args(arguments)
    kept = keep_freed_memory()
    report = timing.Report("microbatches", options)
    for name in ["a", "b"] if options.case == "all" else [options.case]:
        geometry = smoke(CASES[name]) if options.smoke else CASES[name]
        case = measure(name, geometry, options.repeats or geometry.rounds)
        report.add(name, {**case, "freed_memory_stays": kept})
    report.finish()


def measure(name: str, geometry: Geometry, rounds: int) -> dict[str, Any]:
    """One case: seconds, memory and the first loss with each number of microbatches."""
    [thoughts] = geometry.thoughts
    trainers, steps, memory, losses = {}, {}, {}, {}
    for parts in PARTS:
        if geometry.batch % parts:
            continue
        split = functools.partial(latent_step.make_train_step, microbatches=parts)
        trainers[parts] = Trainer(geometry)
        with mock.patch.object(latent_step, "make_train_step", split):
            steps[parts], memory[parts] = trainers[parts].step(thoughts, latent_schedule(geometry, thoughts))
        steps[parts]()
        losses[parts] = float(trainers[parts].metrics["loss"].mean())
    np.testing.assert_allclose(list(losses.values()), losses[1], rtol=1e-5)
    seconds = timing.interleave({str(parts): step for parts, step in steps.items()}, rounds, title=f"({name})")
    found = {
        parts: {
            **timing.ratio(seconds[str(parts)], seconds["1"]),
            **timing.summary(seconds[str(parts)]),
            "temporary_bytes": memory[parts],
            "loss": losses[parts],
        }
        for parts in steps
    }
    shown = ", ".join(f"{parts}: {case['ratio']:.3f}" for parts, case in found.items())
    print(f"({name}) time over that of one microbatch, by their number: {shown}", flush=True)
    return {**describe(geometry, trainers[1], rounds), "thoughts": thoughts, "microbatches": found}


if __name__ == "__main__":
    main()
