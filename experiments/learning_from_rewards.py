"""A supervised run against reinforcement learning from it, with each way to draw thoughts: gains and costs.

    python -m experiments.learning_from_rewards --start RUN --output DIR [--seeds 0,1,2] [--steps 300]

Every arm starts from the same checkpoint and takes the same number of steps, on as many samples of as many questions.
``imitation`` takes as many steps on as many rows of other questions, with the same optimizer: a control for the updates
alone, not the best that imitation could do. The arms whose thoughts are made of tokens need a start that was trained
with ``FeedbackConfig.kind = 'mixture'``. Each model is then asked the test questions: by its likeliest tokens, with its
thoughts removed and replaced, and in several samples at temperature 1 with its own policy; the start with each of
them. Runs and results are kept: the same command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from coconut.commands.configuration import resolve_run
from coconut.commands.evaluate import EvaluateConfig, evaluate_workdir, markdown_table
from coconut.commands.evaluate_samples import SamplesConfig
from coconut.commands.train import run_training
from coconut.latent.policies.config import PolicyConfig
from coconut.provenance import provenance
from coconut.storage import write_atomically
from coconut.training.config import RunConfig, to_json
from coconut.training.run import Run

RUN = "gin_configs/runs/small_graphs_reinforcement.gin"
ARMS = ("deterministic", "gaussian", "gumbel", "dropout", "learnt_stop")
"""The policies of ``gin_configs/policies``, each an arm."""
IMITATION, START = "imitation", "start"
INTERVENTIONS = ("removed", "noise", "other")
SAMPLES = 16


def arm_config(arm: str, start: Path, seed: int, steps: int, bindings: Sequence[str]) -> RunConfig:
    """The run of an arm: the start's model and task, the reinforcement of the gin files."""
    other = Run.load(start).config
    files = [RUN, f"gin_configs/methods/{other.method}.gin"]
    files += [] if arm == IMITATION else [f"gin_configs/policies/{arm}.gin"]
    config = resolve_run(files, [f"CurriculumConfig.steps_per_stage = {steps}", *bindings], shared=True)
    config = dataclasses.replace(
        config,
        data=other.data,
        decoder=dataclasses.replace(other.decoder, vocab_size=None),
        feedback=other.feedback,
        options=other.options,
        init_from=str(start),
        seed=seed,
        evaluate_every=None,
    )
    if arm != IMITATION:
        return config
    assert config.reinforcement is not None
    rows = config.pipeline.batch_size * config.reinforcement.group
    pipeline = dataclasses.replace(config.pipeline, batch_size=rows)
    return dataclasses.replace(config, reinforcement=None, pipeline=pipeline)


def measure(workdir: Path, policy: PolicyConfig, questions: int) -> dict[str, Any]:
    """What a run answers."""
    samples = SamplesConfig(count=SAMPLES, policy=policy, pass_at=(1, SAMPLES))
    greedy = evaluate_workdir(
        workdir,
        EvaluateConfig(which="latest", limit=questions, interventions=INTERVENTIONS),
        console=Console(stderr=True),
    )
    drawn = evaluate_workdir(
        workdir,
        EvaluateConfig(which="latest", limit=questions, thoughts=(), temperature=1.0, samples=samples),
        console=Console(stderr=True),
    )
    return {"greedy": greedy, "samples": drawn["samples"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and measures every arm, and writes ``result.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description="Reinforcement learning of thoughts against the run it starts from.")
    parser.add_argument("--start", type=Path, required=True, help="a supervised run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--arms", default=",".join((IMITATION, *ARMS)))
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--gin_binding", action="append", default=[], help="for every arm")
    options = parser.parse_args(arguments)
    start, questions = options.start.absolute(), options.questions
    results: dict[str, dict[str, Any]] = {}
    for arm in options.arms.split(","):
        # What an arm gained shows in samples of its own policy alone: noise costs accuracy before anything is learnt.
        policy = _policy(arm_config(arm, start, 0, options.steps, options.gin_binding))
        if not policy.learnt_stop:  # The start has no head that could stop.
            name = f"{START}, {policy.kind}"
            folder = options.output / START / policy.kind
            results[name] = {"0": _kept(folder, start, policy, questions)}
    for seed in options.seeds.split(","):
        for arm in options.arms.split(","):
            config = arm_config(arm, start, int(seed), options.steps, options.gin_binding)
            folder = options.output / arm / seed
            trained = run_training(config, folder / "run", console=Console(stderr=True))
            if not trained.progress.finished:
                sys.exit(130)
            found = _kept(folder, folder / "run", _policy(config), questions)
            found["training_seconds"] = trained.progress.seconds
            results.setdefault(arm, {})[seed] = found
    content = {
        "command": " ".join(["python -m experiments.learning_from_rewards", *sys.argv[1:]]),
        "start": to_json(Run.load(start).config),
        "results": results,
        "provenance": provenance(),
    }
    write_atomically(options.output / "result.json", json.dumps(content, indent=1) + "\n")
    table = describe(results)
    write_atomically(options.output / "table.md", table + "\n")
    print(table)


def _policy(config: RunConfig) -> PolicyConfig:
    """What an arm's samples are drawn with."""
    return PolicyConfig() if config.reinforcement is None else config.reinforcement.policy


def _kept(folder: Path, workdir: Path, policy: PolicyConfig, questions: int) -> dict[str, Any]:
    """What was measured of a run, now or by an earlier call."""
    path = folder / "measured.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        jax.clear_caches()  # Else seconds would depend on what was measured before.
        write_atomically(path, json.dumps(measure(workdir, policy, questions), indent=1) + "\n")
    return json.loads(path.read_text())


def describe(results: dict[str, dict[str, Any]]) -> str:
    """The table: means over seeds, and in brackets the least and the most of them."""

    def cell(values: Sequence[float | None], scale: float = 100.0) -> str:
        if None in values:
            return "-"  # The thoughts of a block that a head ends cannot be replaced.
        found = np.asarray(values, float) * scale
        return f"{found.mean():.1f}" + (f" ({found.min():.1f}-{found.max():.1f})" if len(found) > 1 else "")

    rows = []
    for arm, seeds in results.items():
        of = lambda pick, seeds=seeds: [pick(found) for found in seeds.values()]
        altered = lambda name: lambda found: found["greedy"]["interventions"].get(name, {}).get("accuracy")
        rows.append(
            [
                arm,
                cell(of(lambda found: found["greedy"]["trained"]["accuracy"])),
                cell(of(_pass_at(1))),
                cell(of(_pass_at(SAMPLES))),
                cell(of(lambda found: found["greedy"]["trained"]["thoughts"]), 1.0),
                *(cell(of(altered(name))) for name in INTERVENTIONS),
                cell(of(lambda found: found.get("training_seconds", 0.0)), 1.0),
            ]
        )
    header = ("arm", "likeliest", "pass@1", f"pass@{SAMPLES}", "thoughts", *INTERVENTIONS, "seconds")
    return markdown_table(header, rows)


def _pass_at(number: int) -> Callable[[dict[str, Any]], float]:
    def share(found: dict[str, Any]) -> float:
        [budget] = found["samples"]["budgets"]
        return next(point["accuracy"] for point in budget["curves"]["pass_at"] if point["samples"] == number)

    return share


if __name__ == "__main__":
    main()
