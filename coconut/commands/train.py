"""``coconut train``: one run, from gin files to a trained workdir."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from coconut.commands.configuration import operative_config
from coconut.commands.plan.training import look_at_step
from coconut.datasets import Dataset
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.evaluate import evaluate
from coconut.evaluation.sample_statistics import best
from coconut.evaluation.samples import SampleConfig, SampleDrawing
from coconut.evaluation.subject import Subject
from coconut.methods import get_method
from coconut.model import Model
from coconut.pipeline import BatchSource
from coconut.sharding import make_mesh, own_rows, replicated
from coconut.storage import write_atomically
from coconut.storage_path import StoragePath, as_path
from coconut.training.clock import told
from coconut.training.config import RunConfig, to_json
from coconut.training.loop import TrainResult, train
from coconut.training.optimizer import make_optimizer
from coconut.training.rollouts import make_learning
from coconut.training.run import Run
from coconut.training.scoring import ScorerConfig
from coconut.training.setup import abstract_state, prepare
from coconut.training.trajectories import scorer_of


def validate(model: Model, run: Run, dataset: Dataset, stage: int) -> Mapping[str, float]:
    """Accuracy on the validation split by generation; empty where the run has none. The test split is not touched.

    Of a run that trains a scorer it is that of the best trajectory by the scorer, beside that of one
    (``accuracy_of_one``) and that of an oracle (``accuracy_of_any``), with as many trajectories of each question as it
    trains on.
    """
    examples = dataset.splits["validation"]
    if not examples:
        return {}
    if run.config.scorer is not None:
        return _validate_scorer(model, run, dataset, stage, run.config.scorer)
    answer_config = AnswerConfig(
        batch_size=run.config.evaluation_batch_size, sampling=run.config.sampling, halting=run.config.halting
    )
    result = evaluate(
        model,
        run.tokenizer,
        get_method(run.config.method),
        run.placing(stage),
        dataset.task,
        examples,
        dataset.tokenized("validation", run.tokenizer),
        answer_config,
    )
    return {"accuracy": result.accuracy, "tokens": result.tokens, "thoughts": result.thoughts}


def _validate_scorer(model: Model, run: Run, dataset: Dataset, stage: int, scorer: ScorerConfig) -> Mapping[str, float]:
    subject = Subject(
        model=model,
        tokenizer=run.tokenizer,
        method=get_method(run.config.method),
        placing=run.placing(stage),
        task=dataset.task,
        text_format=dataset.text_format,
    )
    config = SampleConfig(
        count=scorer.trajectories,
        batch_size=run.config.evaluation_batch_size,
        sampling=dataclasses.replace(run.config.sampling, temperature=scorer.temperature),
        policy=scorer.policy,
        seed=run.config.seed,
    )
    examples, tokenized = dataset.splits["validation"], dataset.tokenized("validation", run.tokenizer)
    drawn = SampleDrawing(subject, examples, tokenized, config, scorer_of(model.parts)).draw().samples
    right = np.asarray([[own.right for own in samples] for samples in drawn])
    scores = np.asarray([[own.score for own in samples] for samples in drawn], float)
    return {
        "accuracy": float(right[np.arange(len(right)), best(scores)].mean()),
        "accuracy_of_one": float(right.mean()),
        "accuracy_of_any": float(right.any(1).mean()),
    }


def run_training(
    config: RunConfig,
    workdir: StoragePath | str,
    *,
    mesh: Mesh | None = None,
    dataset: Dataset | None = None,
    allow: Collection[str] = (),
    from_step: int | None = None,
    verify: bool = True,
    cell: Mapping[str, Any] | None = None,
    console: Console | None = None,
    started: float | None = None,
) -> TrainResult:
    """Trains and validates ``config`` in ``workdir``; goes on where an earlier call stopped. See `train`.

    Beside checkpoints and metrics the workdir gets ``run.json`` (the resolved config) and, for a config that came from
    gin, ``operative.gin``.
    """
    workdir = as_path(workdir)
    result = train(
        config,
        workdir,
        mesh=mesh,
        dataset=dataset,
        validate=validate,
        look_at_step=look_at_step,
        allow=allow,
        from_step=from_step,
        verify=verify,
        cell=cell,
        console=console,
        started=started,
    )
    if (text := operative_config()) and jax.process_index() == 0:
        write_atomically(workdir / "operative.gin", text)
    return result


def train_to_the_end(
    config: RunConfig, workdir: StoragePath, console: Console, dataset: Dataset | None
) -> TrainResult | None:
    """Trains one run of several and says how it went; None where it was interrupted."""
    result = run_training(config, workdir, console=console, dataset=dataset)
    if not result.progress.finished:
        return None
    name, progress = f"{workdir.parent.name}/{workdir.name}", result.progress
    console.print(f"{name}: {progress.step:,} steps in {progress.seconds:.0f} s; {told(result.clock)}", highlight=False)
    return result


def how_it_went(trained: TrainResult) -> dict[str, Any]:
    """Steps, seconds without compilation, those of this call by the clock, and stages of a run, as plain values."""
    progress = trained.progress
    return {
        "steps": progress.step,
        "seconds": progress.seconds,
        "clock": dict(trained.clock),
        "stages": [dict(stage) for stage in progress.stages],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSummary:
    """What one stage costs.

    Attributes:
      stage: its number.
      schedule: the spans of its batches, one schedule a length bucket.
      steps: optimizer steps at most.
      flops: of one train step on each device, as XLA counts them (the body of a loop once).
      temporary_bytes: scratch memory of the compiled step on each device.
    """

    stage: int
    schedule: str
    steps: int
    flops: float
    temporary_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would be.

    Attributes:
      parameters: number of parameters.
      state_bytes: parameters and optimizer.
      train_examples: examples to learn from.
      stages: a line a stage.
    """

    parameters: int
    state_bytes: int
    train_examples: int
    stages: tuple[StageSummary, ...]


def dry_run(config: RunConfig, mesh: Mesh | None = None) -> tuple[Run, DryRun]:
    """Resolves a run, builds its model abstractly and compiles each stage's step without running any.

    Of the shapes that a stage's batches come in, buckets and wide packed rows among them, it is that of the first one.

    Args:
      config: the run.
      mesh: the devices; None for all there are.

    Raises:
      CoconutError: whatever `train` would raise before its first step.
    """
    run, dataset, examples = prepare(config)
    config = run.config
    optimizer, mesh = make_optimizer(config.optimizer), make_mesh() if mesh is None else mesh
    rows = own_rows(mesh, config.pipeline.batch_size, config.microbatches, config.pipeline.examples_per_row)
    key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(config.seed)
    template, state = abstract_state(config, optimizer, mesh)
    learning = make_learning(config, template, optimizer, mesh, tokenizer=run.tokenizer, dataset=dataset)
    stages = []
    for stage in range(config.curriculum.first_stage, config.curriculum.final_stage + 1):
        source = BatchSource(
            *(examples, run.tokenizer, learning.method, run.placing(stage), config.pipeline),
            seed=config.seed,
            rows=rows,
        )
        with jax.set_mesh(mesh):
            views = learning.abstract_views(state, source[0])
            compiled = learning.step.lower(state, views, jax.ShapeDtypeStruct((), "float32"), key).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        stages.append(
            StageSummary(
                stage=stage,
                schedule="; ".join(" ".join(map(str, view.schedule)) for view in views.values()),
                steps=source.stage_length,
                flops=float((cost or {}).get("flops", float("nan"))),
                temporary_bytes=memory.temp_size_in_bytes if memory is not None else -1,
            )
        )
    summary = DryRun(
        parameters=sum(leaf.size for leaf in state.parameters.values()),
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        train_examples=len(examples),
        stages=tuple(stages),
    )
    return run, summary


def print_dry_run(run: Run, summary: DryRun, console: Console) -> None:
    """Prints the resolved config and the summary."""
    console.print_json(json.dumps(to_json(run.config)))
    console.print(
        f"{summary.parameters:,} parameters, {summary.state_bytes / 2**20:,.1f} MiB with the optimizer; "
        f"{summary.train_examples:,} training examples, {run.tokenizer.vocab_size:,} token ids"
    )
    if run.config.drawing is not None:
        console.print("the steps below update by samples; drawing them is not in it")
    for stage in summary.stages:
        console.print(
            f"stage {stage.stage}: at most {stage.steps:,} steps of {stage.flops / 1e9:,.2f} GFLOP, "
            f"{stage.temporary_bytes / 2**20:,.1f} MiB of scratch memory; {stage.schedule}"
        )
