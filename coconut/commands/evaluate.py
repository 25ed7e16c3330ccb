"""``coconut evaluate``: accuracy of a trained workdir, its price, and the same model thinking otherwise."""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from coconut.commands.evaluate_beams import beam_table, load_scorer, measure_beams, plan_beams
from coconut.commands.evaluate_samples import SamplesConfig, measure_samples, plan_samples, sample_costs, sample_table
from coconut.commands.measuring import TRAINED, Measuring
from coconut.datasets import load_dataset, load_split, text_format_of
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.interventions import REMOVED, check_interventions
from coconut.evaluation.subject import Subject
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.scorer import LatentScorer
from coconut.latent.soft_thinking import SoftThinkingConfig
from coconut.latent.swi_reasoning import SwiReasoningConfig
from coconut.methods import get_method
from coconut.model import Model
from coconut.pages import question_alone
from coconut.provenance import provenance
from coconut.sharding import make_mesh
from coconut.storage import write_atomically
from coconut.storage_path import StoragePath
from coconut.tasks import content_hash, get_task, without_overlap
from coconut.tasks.tables import is_table
from coconut.tokenizers import TokenizedExample
from coconut.training.checkpoint import Which
from coconut.training.config import to_json
from coconut.training.loading import Numerics, load_model
from coconut.training.metrics import progress_bar
from coconut.training.progress import Progress
from coconut.training.run import Run, split_fingerprint
from coconut.types import Example

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
      split: ``test`` or ``validation`` of the run's own data, or a source of questions (`coconut.tasks.records`).
      task: whose questions these are: it reads and judges them; None for the run's own.
      which: the ``best`` checkpoint by validation, the ``latest``, or that of a step.
      verify: compare the checkpoint's files with their SHA-256 first.
      thoughts: numbers of thoughts to try besides the trained one; for each the answer is forced behind them, so that
        the model cannot fall back on writing the steps. ``(0,)`` is the model with its thoughts removed.
      forced: text that every answer has to go on from; where it is empty, those of ``thoughts`` go on from the mark of
        an answer.
      batch_size: rows decoded together; None for the run's own.
      sampling: how tokens are chosen; None for the run's own.
      halting: when blocks of thoughts are over (`AnswerConfig.halting`); None for the run's own.
      halting_thresholds: thresholds of ``halting`` to try besides, for a curve of accuracy by mean thoughts; for
        ``stop = "count"`` numbers of thoughts.
      soft_thinking: think softly in the place of written reasoning (`coconut.latent.soft_thinking`), or by turns with
        it (`coconut.latent.swi_reasoning`); None for neither.
      temperature: of sampling; None for that of ``sampling``. ``top_k``, ``top_p`` and ``min_p`` likewise.
      samples: draw several samples of each question besides; None for not.
      numerics: the numbers in which the model, and a scorer, are kept and computed.
      seed: of the draws.
      limit: the first so many questions only; None for all.
      interventions: what is done to thoughts (`coconut.evaluation.interventions`), of questions that have some. Each is
        evaluated as the trained model is, ``removed`` as 0 of ``thoughts`` is.
      intervention_seed: of what interventions draw.
      allow_overlap: answer questions of a file although the run was trained on some of them; the result says on how
        many.
      answers_file: where to write every answer as JSON lines; None for nowhere.
    """

    split: str = "test"
    task: str | None = None
    which: Which | int = "best"
    verify: bool = True
    thoughts: tuple[int, ...] = (0,)
    forced: str = ""
    batch_size: int | None = None
    sampling: SamplingConfig | None = None
    halting: HaltingConfig | None = None
    halting_thresholds: tuple[float, ...] = ()
    soft_thinking: SoftThinkingConfig | SwiReasoningConfig | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    samples: SamplesConfig | None = None
    numerics: Numerics = dataclasses.field(default_factory=Numerics)
    seed: int = 0
    limit: int | None = None
    interventions: tuple[str, ...] = ()
    intervention_seed: int = 0
    allow_overlap: bool = False
    answers_file: StoragePath | str | None = None

    def __post_init__(self) -> None:
        check_interventions(self.interventions)
        if self.task is not None:
            get_task(self.task)
            if self.split in ("test", "validation"):
                raise CoconutError(f"--task {self.task}: the run's own {self.split} questions are of its own task")
        for field in ("batch_size", "limit"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise CoconutError(f"--{field} {value}: must be at least 1")

    def sampling_from(self, own: SamplingConfig) -> SamplingConfig:
        """How tokens are chosen, of a model that has a sampling of its own.

        Raises:
          CoconutError: tokens are to be left out, and the likeliest one is taken anyway.
        """
        filters = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        given = {name: value for name, value in filters.items() if value is not None}
        warmth = {} if self.temperature is None else {"temperature": self.temperature}
        sampling = dataclasses.replace(self.sampling or own, **warmth, **given)
        if given and sampling.temperature == 0:
            name, value = next(iter(given.items()))
            raise CoconutError(f"--{name} {value}: at temperature 0 the likeliest token is taken, give a --temperature")
        return sampling


def at_threshold(halting: HaltingConfig, threshold: float) -> HaltingConfig:
    """The same stop at another threshold; for ``stop = "count"`` with as many thoughts.

    Raises:
      CoconutError: the stop has no threshold, or it is out of range.
    """
    if halting.stop != "count":
        return dataclasses.replace(halting, threshold=threshold)
    count = int(threshold)
    if count != threshold:
        raise CoconutError(f"--halting_thresholds {threshold}: stop = 'count' needs whole numbers of thoughts")
    return dataclasses.replace(halting, least=min(halting.least, count), most=count, room=max(halting.room, count))


def subject_of(run: Run, model: Model, progress: Progress, task: str | None = None) -> Subject:
    """The model of a checkpoint, with how its run asks questions; ``task`` judges answers if not the run's own."""
    return Subject(
        model=model,
        tokenizer=run.tokenizer,
        method=get_method(run.config.method),
        placing=run.placing(progress.stage),
        task=get_task(task or run.config.data.task),
        text_format=text_format_of(run.config.data),
    )


def questions_of(run: Run, split: str, task: str | None = None) -> list[Example]:
    """A split of the run's data, or the questions of a source, as ``task`` reads them if not the run's own.

    Raises:
      CoconutError: the run has no such split, or it is not the one that the run began with; or the file cannot be read.
    """
    if split in ("validation", "test"):
        # As in training, where generated validation questions give way to those of the test split.
        tested = load_split(run.config.data, "test") if split == "validation" else []
        examples = load_split(run.config.data, split, exclude=frozenset(map(content_hash, tested)))
        if not examples:
            raise CoconutError(f"the run has no {split} split (DataConfig.{split} = 0)")
        if run.splits.get(split, split_fingerprint(examples)) != split_fingerprint(examples):
            raise CoconutError(
                f"DataConfig.{split} = {getattr(run.config.data, split)!r}: these are not the {split} questions that "
                "the run began with; to answer a file whatever it holds, name it: --split FILE"
            )
        return examples
    try:
        return get_task(task or run.config.data.task).load(split)
    except CoconutError as error:
        if is_table(split) or Path(split.partition("[")[0]).exists():
            raise
        own = " and ".join(name for name in ("test", "validation") if getattr(run.config.data, name)) or "none"
        raise CoconutError(f"--split {split}: no such file, and the run's own splits are {own}") from error


def also_trained_on(run: Run, examples: Sequence[Example]) -> int | None:
    """How many questions are among those that the run was trained on; None where its training data cannot be read."""
    try:
        training = load_dataset(run.config.data).splits["train"]
    except CoconutError as error:
        LOG.warning("whether questions were trained on is not known: %s", error)
        return None
    return len(examples) - len(without_overlap(examples, training))


def evaluate_model(
    run: Run,
    model: Model,
    progress: Progress,
    config: EvaluateConfig,
    *,
    mesh: Mesh | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a model on the questions ``config`` names.

    Returns:
      Plain values: ``trained`` for the trained number of thoughts, ``thoughts`` for each other number, ``choices`` for
      the accuracy of choosing between the two options of a graph question (`coconut.evaluation.choices`) by number of
      thoughts (``trained`` where questions differ in it), ``interventions`` for each intervention on thoughts, of as
      many ``examples`` as it could alter (None for none), ``halting`` for when blocks were over and the curve by
      threshold, ``soft_thinking`` for its settings (None where not asked for), ``samples`` for several samples of each
      question (`coconut.commands.evaluate_samples`; None likewise), ``beams`` for a beam search
      (`coconut.commands.evaluate_beams`; None likewise), ``seconds_per_question`` of the trained
      number of thoughts without compilation, ``also_trained_on`` for how many questions of a file were trained on (None
      where that is not known), ``not_altered`` for interventions that were asked for although the model has no
      thoughts, what was evaluated, and where. The stage is the checkpoint's own.

    Raises:
      CoconutError: thoughts or a halting are asked of a model that has none, or questions were trained on; or thoughts
        are to be replaced by their mean, and the run has no validation split to take it from.
    """
    subject, scorer = subject_of(run, model, progress, config.task), None
    if config.samples is not None and config.samples.scorer is not None:
        scorer = load_scorer(config.samples.scorer, subject, mesh, verify=config.verify, numerics=config.numerics)
    examples = questions_of(run, config.split, config.task)[: config.limit]
    # The run's own splits share none: that was seen before training, and they are still the same.
    overlap = 0 if config.split in ("validation", "test") else also_trained_on(run, examples)
    if overlap and not config.allow_overlap:
        raise CoconutError(
            f"{config.split}: {overlap} of {len(examples)} questions are among those that the run was trained on "
            "(--allow_overlap answers them all the same, and says so)"
        )
    default = AnswerConfig(
        batch_size=config.batch_size or run.config.evaluation_batch_size,
        sampling=config.sampling_from(run.config.sampling),
        forced=config.forced,
        seed=config.seed,
        # A run's own halting is not asked for here: it gives way.
        halting=config.halting or (None if config.soft_thinking is not None else run.config.halting),
        soft_thinking=config.soft_thinking,
    )

    tokenized = [subject.tokenize(example) for example in examples]
    if config.task not in (None, run.config.data.task):
        tokenized = [asked if asked.num_steps else _as_long(asked, run) for asked in tokenized]
    validation = lambda: questions_of(run, "validation")
    return {
        "method": run.config.method,
        "split": config.split,
        "task": subject.task.name,
        "data_fingerprint": split_fingerprint(examples),
        "step": progress.step,
        "stage": progress.stage,
        "seed": run.config.seed,
        **measure_all(
            subject, examples, tokenized, default, config, validation=validation, scorer=scorer, console=console
        ),
        "also_trained_on": overlap,
        "provenance": provenance(),
    }


def _as_long(asked: TokenizedExample, run: Run) -> TokenizedExample:
    """A question of a test set that has no steps at all: not one of no steps, but one whose steps nobody knows."""
    alone = question_alone(asked.question, run.config.curriculum)
    return dataclasses.replace(alone, answer=asked.answer, answer_prefix=asked.answer_prefix)


def measure_all(
    subject: Subject,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    default: AnswerConfig,
    config: EvaluateConfig,
    *,
    validation: Callable[[], Sequence[Example]] | None = None,
    scorer: LatentScorer | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answers the questions in every way that ``config`` asks for.

    Args:
      subject: who is asked.
      examples: the questions.
      tokenized: their ids.
      default: how they are answered first; the others differ from it.
      config: what else to measure.
      validation: questions that thoughts are averaged over, where they are to be replaced by their mean; None where
        there are none.
      scorer: scores the thoughts of samples, and of a beam search.
      console: where the progress bar goes; standard error if None.

    Returns:
      What `evaluate_model` returns of the answers.

    Raises:
      CoconutError: thoughts or a halting are asked of a model that has none.
    """
    measuring = Measuring(subject, examples, tokenized, default)
    counts, thinks = measuring.thought_counts, measuring.thinks
    # A model that thinks none is its own control without thoughts; more it must have a place for.
    others = [count for count in config.thoughts if count or thinks]
    measuring.check_thoughts(max(others, default=None))
    by_count = {count: measuring.without(count) for count in others}
    if config.halting is not None and not thinks:
        stage = subject.placing.stage
        raise CoconutError(f"--halting stop={config.halting.stop!r}: at stage {stage} this model thinks none")
    if config.halting_thresholds and default.halting is None:
        raise CoconutError("--halting_thresholds: the run says of no stop, give one: --halting stop=...")
    by_threshold = {
        threshold: dataclasses.replace(default, halting=at_threshold(default.halting, threshold))
        for threshold in config.halting_thresholds
        if default.halting is not None
    }
    drawings, search = {}, None
    if config.samples is not None:
        drawings = plan_samples(subject, examples, tokenized, default, config.samples, scorer)
        search = plan_beams(subject, examples, tokenized, default, config.samples, scorer)
    interventions = [name for name in config.interventions if measuring.feeds_back or (name == REMOVED and any(counts))]
    needs_mean = bool({"mean", "mean_of_all"} & set(interventions))
    averaged = validation() if needs_mean and validation is not None else None
    surroundings = measuring.surroundings(averaged, config.intervention_seed)

    with progress_bar(console) as bar:
        by_samples = len(drawings) + (search is not None)
        total = len(examples) * (1 + len(others) + len(by_threshold) + len(interventions) + by_samples)
        task_id = bar.add_task("answering", total=total, numbers="")
        advance = lambda rows: bar.advance(task_id, rows)
        trained = measuring.generate(TRAINED, default, advance)
        seconds = measuring.seconds_per_question()
        by_thoughts = {
            count: measuring.generate(f"{count} thoughts, answer forced", answer_config, advance)
            for count, answer_config in by_count.items()
        }
        curve = [
            {
                "threshold": threshold,
                **measuring.generate(f"halting threshold {threshold:g}", answer_config, advance).to_json(),
            }
            for threshold, answer_config in by_threshold.items()
        ]
        by_intervention = {name: measuring.intervene(name, surroundings, advance) for name in interventions}
        samples, beams, sample_lines = None, None, []
        if config.samples is not None:
            samples, sample_lines = measure_samples(drawings, examples, default, config.samples, advance)
            if search is not None:
                beams, beam_lines = measure_beams(search, examples, config.samples, samples, advance)
                sample_lines += beam_lines
    choices = {}
    if any(counts) and measuring.graphs:
        # Questions may differ in how many thoughts were trained: then no number says it.
        for count in sorted({*others, *counts}) if len(counts) == 1 else (*sorted(others), None):
            choices[TRAINED if count is None else str(count)] = measuring.choose(count)
    if config.answers_file is not None and jax.process_index() == 0:
        lines = [*measuring.lines, *sample_lines]
        write_atomically(config.answers_file, "".join(json.dumps(line) + "\n" for line in lines))
    soft = default.soft_thinking
    return {
        "trained": trained.to_json(),
        "thoughts": {str(count): result.to_json() for count, result in by_thoughts.items()},
        "choices": choices,
        "halting": None if default.halting is None else {"config": to_json(default.halting), "curve": curve},
        "soft_thinking": None if soft is None else {"kind": type(soft).__name__, **to_json(soft)},
        "samples": samples,
        "beams": beams,
        "interventions": by_intervention,
        "not_altered": [name for name in config.interventions if name not in interventions],
        "seconds_per_question": seconds,
    }


def evaluate_workdir(
    workdir: StoragePath | str, config: EvaluateConfig, *, mesh: Mesh | None = None, console: Console | None = None
) -> dict[str, Any]:
    """`evaluate_model` for the checkpoint of a workdir, with the run's config, and how its stages went.

    Args:
      workdir: of a run that was trained on any mesh, or a quickstart's folder, which stands for its Coconut run.
      config: what to measure.
      mesh: the devices; None for all there are. Every process gets the whole result.
      console: where the progress bar goes; standard error if None.
    """
    mesh = make_mesh() if mesh is None else mesh
    run, model, progress = load_model(workdir, config.which, mesh, verify=config.verify, numerics=config.numerics)
    with jax.set_mesh(mesh), config.numerics.products():
        result = evaluate_model(run, model, progress, config, mesh=mesh, console=console)
    how = {"training_seconds": progress.seconds, "stages": list(progress.stages), "config": to_json(run.config)}
    return {**result, **how}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; a ``|`` in a cell is escaped."""
    header, rows = (
        [cell.replace("|", "\\|") for cell in header],
        [[x.replace("|", "\\|") for x in row] for row in rows],
    )
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    line = lambda cells: "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def describe(result: dict[str, Any]) -> str:
    """The Markdown table of an evaluation."""

    def share(entry: dict[str, Any]) -> str:
        low, high = entry["interval_95"]
        return f"{100 * entry['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    def cells(name: str, entry: dict[str, Any]) -> list[str]:
        return [
            name,
            share(entry),
            f"{entry['tokens']:.1f}",
            f"{entry['thoughts']:.1f}",
            str(entry["examples"]),
        ]

    halting, curve = result["halting"], []
    how = "not trained here" if result["stage"] is None else f"as trained (stage {result['stage']})"
    if halting is not None:
        how, curve = f"{how}, stop {halting['config']['stop']}", halting["curve"]
    if result["soft_thinking"] is not None:
        how = f"{how}, {result['soft_thinking']['kind'].removesuffix('Config')}"
    rows = [cells(f"{result['method']}, {how}", result["trained"])]
    rows += [cells(f"{count} thoughts, answer forced", entry) for count, entry in result["thoughts"].items()]
    rows += [cells(f"halting threshold {entry['threshold']:g}", entry) for entry in curve]
    for count, entry in result["choices"].items():
        setting = "as trained" if count == "trained" else f"{count} thoughts"
        rows.append([f"{setting}, choosing between the two options", share(entry), "", count, rows[0][-1]])
    for name, entry in result["interventions"].items():
        setting = "thoughts removed, answer forced" if name == REMOVED else f"thoughts: {name}"
        if entry is None:
            rows.append([setting, "-", "", "", "0"])
            continue
        rows.append(cells(setting, entry))
        if "choice" in entry:
            rows.append([f"{setting}, choosing between the two options", share(entry["choice"]), "", "", rows[-1][-1]])
    lines = [markdown_table(("setting", "accuracy % (95 %)", "tokens", "thoughts", "questions"), rows)]
    if result["samples"] is not None:
        lines += [markdown_table(*sample_table(result["samples"])), *sample_costs(result["samples"])]
    if result["beams"] is not None:
        lines.append(markdown_table(*beam_table(result["beams"])))
    for name, entry in (("as trained", result["trained"]), *result["thoughts"].items()):
        if entry["cut"]:
            lines.append(f"{100 * entry['cut']:.1f} % of answers ({name}) ended where thoughts began with no room left")
    lines.append(f"questions: {result['split']} (task {result['task']})")
    if result["also_trained_on"]:
        lines.append(f"{result['also_trained_on']} of these questions were trained on")
    if result["not_altered"]:
        lines.append(f"not measured: {', '.join(result['not_altered'])}: this model has no thoughts to alter")
    return "\n\n".join(lines)
