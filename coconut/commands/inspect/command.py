"""``coconut inspect``: what the thoughts of a trained model hold, as arrays, as figures, and as a page to look at."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from coconut.analysis.interventions import Effect, Intervened, Intervention, NumberOfThoughts, intervene
from coconut.analysis.page import write_page
from coconut.batching import page_shape
from coconut.commands.evaluate import also_trained_on, markdown_table, questions_of, subject_of
from coconut.commands.inspect.figures import draw, drawings
from coconut.commands.inspect.questions import Readings, read_questions, show_question
from coconut.commands.inspect.summary import summarize
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, thoughts_of_questions
from coconut.evaluation.evaluate import wilson_interval
from coconut.evaluation.interventions import check_interventions
from coconut.evaluation.reading import given_pages
from coconut.evaluation.subject import Subject
from coconut.latent.thinkers import OneByOne
from coconut.model import Model
from coconut.provenance import provenance
from coconut.sharding import make_mesh
from coconut.storage import make_folder, write_atomically
from coconut.storage_path import StoragePath
from coconut.training.checkpoint import Which
from coconut.training.loading import load_model
from coconut.training.metrics import progress_bar
from coconut.training.progress import Progress
from coconut.training.run import Run
from coconut.types import Example

CONTENT, ARRAYS, PAGE, FIGURES = "inspect.json", "arrays.npz", "index.html", "figures"
KINDS = ("removed", "zero", "noise", "mean", "mean_of_all", "other", "permuted", "repeated")
"""What is done to all thoughts, if nothing else is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to look at.

    Attributes:
      output: the folder for everything.
      split: ``test`` or ``validation`` of the run's own data, or a file of questions.
      which: the ``best`` checkpoint by validation, the ``latest``, or that of a step.
      verify: compare the checkpoint's files with their SHA-256 first.
      questions: the first so many.
      batch_size: rows run together; None for the run's own.
      top: tokens shown of each thought.
      allow_overlap: look at questions of a file although the run was trained on some of them; the result says on how
        many.
      interventions: what is done to all thoughts; ``noise`` also to each of them and to the first ones.
      beyond: thoughts behind the last one that are tried, as far as the model has positions for them.
      seed: of what interventions draw.
    """

    output: Path | str
    split: str = "test"
    which: Which | int = "best"
    verify: bool = True
    questions: int = 50
    batch_size: int | None = None
    top: int = 5
    allow_overlap: bool = False
    interventions: tuple[str, ...] = KINDS
    beyond: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_interventions(self.interventions)
        if self.beyond < 0:
            raise CoconutError(f"--beyond {self.beyond}: must be at least 0")
        for field in ("questions", "top", "batch_size"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise CoconutError(f"--{field} {value}: must be at least 1")
        if self.seed < 0:
            raise CoconutError(f"--seed {self.seed}: must be at least 0")


def interventions_on(
    kinds: Sequence[str], most: int, beyond: int, *, one_by_one: bool
) -> list[Intervention | NumberOfThoughts]:
    """What is done to thoughts: all kinds to all of them, noise to each and to the first ones, and other numbers.

    Args:
      kinds: of interventions.
      most: thoughts of the question that has the most.
      beyond: how many more are tried.
      one_by_one: whether thoughts are made one by one, so that later ones can be made again.
    """
    numbers = range(1, most + 1)
    found: list[Intervention | NumberOfThoughts] = [Intervention(kind=kind) for kind in kinds]
    if "noise" in kinds:
        found += [Intervention(kind="noise", thoughts=(number,)) for number in numbers]
        if one_by_one:
            found += [Intervention(kind="noise", thoughts=(number,), later="made again") for number in numbers[:-1]]
        found += [Intervention(kind="noise", thoughts=tuple(range(1, number + 1))) for number in numbers[1:-1]]
    # What the model would answer if it were made to after its own thoughts, which is what other numbers compare with.
    found.append(Intervention(kind="intact", forced=True))
    found += [NumberOfThoughts(count=count) for count in range(1, most)]
    return [*found, *(NumberOfThoughts(count=most + more, beyond=True) for more in range(1, beyond + 1))]


def inspect_workdir(
    workdir: StoragePath | str,
    config: InspectConfig,
    *,
    command: str,
    mesh: Mesh | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """`inspect_model` for the checkpoint of a workdir.

    Args:
      workdir: of a run that was trained on any mesh, or a quickstart's folder, which stands for its Coconut run.
      config: what to look at.
      command: the command that this is, for the page.
      mesh: the devices; None for all there are.
      console: where the progress bar goes; standard error if None.
    """
    mesh = make_mesh() if mesh is None else mesh
    run, model, progress = load_model(workdir, config.which, mesh, verify=config.verify)
    with jax.set_mesh(mesh):
        return inspect_model(run, model, progress, config, command=command, console=console)


def inspect_model(
    run: Run, model: Model, progress: Progress, config: InspectConfig, *, command: str, console: Console | None = None
) -> dict[str, Any]:
    """Looks into the thoughts of a model, and writes down what it finds.

    Args:
      run: the run the model comes from.
      model: the model.
      progress: where its checkpoint stands.
      config: what to look at.
      command: the command that this is.
      console: where the progress bar goes; standard error if None.

    Returns:
      What ``inspect.json`` holds: what `coconut.analysis.page.write_page` shows, without the attention weights, and
      ``effects``, all that `coconut.analysis.interventions.Effect` says.

    Raises:
      CoconutError: the model thinks none, `coconut.analysis.interventions.intervene` cannot work on it, or thoughts are
        to be replaced by their mean and the run has no validation split to take it from.
    """
    subject = subject_of(run, model, progress)
    examples = questions_of(run, config.split)[: config.questions]
    asked = AnswerConfig(
        batch_size=config.batch_size or min(run.config.evaluation_batch_size, len(examples)),
        sampling=run.config.sampling,
        halting=run.config.halting,
    )
    if config.top > run.tokenizer.vocab_size:
        raise CoconutError(f"--top {config.top}: the vocabulary has {run.tokenizer.vocab_size} tokens")
    overlap = 0 if config.split in ("validation", "test") else also_trained_on(run, examples)
    if overlap and not config.allow_overlap:
        raise CoconutError(
            f"{config.split}: {overlap} of {len(examples)} questions are among those that the run was trained on "
            "(--allow_overlap looks at them all the same, and says so)"
        )
    output = Path(config.output)
    make_folder(output / FIGURES)
    averages = any(kind.startswith("mean") for kind in config.interventions)
    averaged = questions_of(run, "validation") if averages else ()
    with progress_bar(console) as bar:
        most = max(map(len, thoughts_of_questions(*subject.asked, list(map(subject.tokenize, examples)), asked)))
        if not most:
            raise CoconutError(f"the method {run.config.method!r}, stage {progress.stage}: no question has a thought")
        room = _room(subject, examples, asked)
        one_by_one = isinstance(subject.method.think(subject.placing.options), OneByOne)
        interventions = interventions_on(config.interventions, most, min(config.beyond, room), one_by_one=one_by_one)
        task_id = bar.add_task("inspecting", total=len(examples) * (len(interventions) + most + 4), numbers="")
        advance = lambda rows: bar.advance(task_id, rows)
        intervened = intervene(
            subject, examples, asked, interventions, averaged=averaged, seed=config.seed, advance=advance
        )
        readings = read_questions(subject, examples, asked, intervened, top=config.top, advance=advance)
        summary = summarize(subject, examples, intervened, readings, asked.batch_size)
    effects = [outcome.effect for outcome in intervened.outcomes if outcome.effect is not None]
    correct, where_from = sum(intervened.right), provenance()
    content = {
        "title": f"{run.config.method} on {run.config.data.task}",
        "run": {
            "method": run.config.method,
            "task": run.config.data.task,
            "split": config.split,
            "seed": run.config.seed,
            "step": progress.step,
            "stage": progress.stage,
            "commit": where_from["commit"],
            "command": command,
            "also_trained_on": overlap,
        },
        "measures": {
            "examples": len(examples),
            "correct": correct,
            "accuracy": correct / len(examples),
            "interval_95": wilson_interval(correct, len(examples)),
        },
        "interventions": list(map(_shown, effects)),
        "questions": [show_question(index, x, intervened, readings) for index, x in enumerate(examples)],
    }
    if jax.process_index():
        return content
    content["figures"] = draw([*drawings(effects), *summary.drawings], output / FIGURES)
    write_page(content, output / PAGE)
    _write_arrays(output / ARRAYS, intervened, readings)
    # Attention is long: it is in the arrays.
    plain = [{name: x for name, x in question.items() if name != "attention"} for question in content["questions"]]
    whole = {**content, "questions": plain, "effects": list(map(dataclasses.asdict, effects)), **summary.numbers}
    whole["provenance"] = where_from
    write_atomically(output / CONTENT, json.dumps(whole, indent=1, default=_as_list) + "\n")
    return whole


def describe(content: Mapping[str, Any], output: Path | str) -> str:
    """What was found, in short: the effects of interventions."""
    share = lambda value, interval: f"{100 * value:.1f} ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"
    rows = [
        [
            effect["label"] + ", answer forced" * (effect["forced"] and "forced" not in effect["label"]),
            str(effect["examples"]),
            f"{100 * effect['accuracy_before']:.1f}",
            share(effect["accuracy"], effect["accuracy_interval"]),
            share(effect["flips"], effect["flips_interval"]),
            f"{effect['log_probability_change']:+.2f}",
            f"{effect['kl']:.2f}",
        ]
        for effect in content["effects"]
    ]
    header = ("thoughts", "n", "before", "accuracy % (95 %)", "changed % (95 %)", "log p", "KL")
    return f"{markdown_table(header, rows)}\n\nlook at it: {Path(output) / PAGE}"


def _room(subject: Subject, examples: Sequence[Example], config: AnswerConfig) -> int:
    """Thoughts for which the model has positions besides those that questions have."""
    pages = given_pages(subject.method, subject.placing, list(map(subject.tokenize, examples)))
    forced = len(subject.tokenizer.encode(subject.text_format.answer_prefix))
    needed = page_shape(pages).columns + forced + config.sampling.max_new_tokens
    return max(0, subject.model.decoder.config.max_positions - needed)


def _shown(effect: Effect) -> dict[str, Any]:
    """An effect as the page shows it."""
    return {
        "name": effect.kind + (" of thoughts" if effect.kind == "number" else "") + ", answer forced" * effect.forced,
        "thoughts": effect.thoughts,
        "later": effect.later,
        "examples": effect.examples,
        "accuracy": effect.accuracy,
        "interval_95": effect.accuracy_interval,
        "accuracy_before": effect.accuracy_before,
        "flips": effect.flips,
        "flips_interval_95": effect.flips_interval,
        "p_value": effect.p_value,
        "log_probability_change": effect.log_probability_change,
        "kl": effect.kl,
    }


def _write_arrays(path: Path, intervened: Intervened, readings: Readings) -> None:
    """Everything that is an array, a question an entry; under a temporary name first."""
    arrays = {}
    for index, (thoughts, attention) in enumerate(zip(intervened.thoughts, readings.attention, strict=True)):
        arrays |= {f"thoughts/{index}": thoughts, f"attention/{index}": attention}
        if readings.values is not None and readings.beliefs is not None:
            arrays |= {f"values/{index}": readings.values[index], f"belief/{index}": readings.beliefs[index]}
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez_compressed(temporary, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_list(value: Any) -> Any:
    """Numpy's arrays and numbers as JSON has them."""
    return value.tolist()
