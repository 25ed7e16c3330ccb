"""The table of the experiment on rewards: what a measure does not apply to is not in it."""

from typing import Any

from experiments.learning_from_rewards import SAMPLES, describe


def measured(accuracy: float, altered: dict[str, float]) -> dict[str, Any]:
    points = [{"samples": 1, "accuracy": accuracy}, {"samples": SAMPLES, "accuracy": 1.0}]
    return {
        "greedy": {
            "trained": {"accuracy": accuracy, "thoughts": 3.0},
            "interventions": {name: {"accuracy": value} for name, value in altered.items()},
        },
        "samples": {"budgets": [{"curves": {"pass_at": points}}]},
        "training_seconds": 10.0,
    }


def test_means_over_seeds_with_the_least_and_the_most() -> None:
    every = {"removed": 0.1, "noise": 0.5, "other": 0.4}
    table = describe(
        {
            "gaussian": {"0": measured(0.8, every), "1": measured(0.9, every)},
            "learnt_stop": {"0": measured(0.7, {"removed": 0.1})},
        }
    )

    gaussian, stop = (list(map(str.strip, line.split("|")[1:-1])) for line in table.splitlines()[-2:])
    assert gaussian[:3] == ["gaussian", "85.0 (80.0-90.0)", "85.0 (80.0-90.0)"]
    assert stop == ["learnt_stop", "70.0", "70.0", "100.0", "3.0", "10.0", "-", "-", "10.0"]
