"""``coconut data``: generate questions, prepare splits of files, look at them, and measure their shortcuts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from coconut.commands.evaluate import markdown_table
from coconut.datasets import SPLITS, DataConfig, load_split
from coconut.errors import CoconutError
from coconut.tasks import TASKS, BadRecords, Task, content_hash, get_task, save_examples, without_overlap
from coconut.tasks.gsm8k import is_number
from coconut.tasks.statistics import Marginal, answer_shares, text_statistics
from coconut.types import Example

T = TypeVar("T")


def generate_file(path: Path | str, task: str, count: int, seed: int, options: Mapping[str, Any]) -> list[Example]:
    """Generates questions into a file (``.json`` or ``.jsonl``), whole or not at all.

    Raises:
      CoconutError: the task has no generator or refuses its options.
    """
    examples = get_task(task).generate(count, seed, **options)
    if not examples:
        raise CoconutError(f"--count = {count}: there is nothing to write")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_examples(path, examples)
    return examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """What became of one split.

    Attributes:
      split: its name.
      source: where it came from: a file, a data set, or a number of generated questions.
      read: questions there.
      overlapping: of these, left out because their question is in a split nearer to the test.
      without_steps: of the rest, those without steps.
      dropped: of these, left out because they were asked to be.
      repeated: questions that occur earlier in the split; they are kept.
      left_out: a message for each malformed record that was left out (``DataConfig.skip_bad_records``).
      examples: what was written.
      file: where.
    """

    split: str
    source: int | str
    read: int
    overlapping: int
    without_steps: int
    dropped: int
    repeated: int
    left_out: list[str]
    examples: list[Example] = dataclasses.field(repr=False)
    file: Path


def prepare_splits(output: Path | str, config: DataConfig, *, drop_without_steps: bool = False) -> list[PreparedSplit]:
    """Writes the splits of a data set as the field's JSON: ``train.json``, ``validation.json`` and ``test.json``.

    A question that occurs in two splits stays in the one nearer to the test: training gives way to validation and test,
    validation to test. What is left out is counted. Nothing is written before everything has been read.

    Args:
      output: the folder, made if it is missing; each file appears whole or not at all.
      config: the task, the three sources (a file in the task's own format, part of one, or a number to generate), and
        the generator's options and seed.
      drop_without_steps: leave training questions without steps out.

    Raises:
      CoconutError: a source cannot be read or generated, or nothing is left of it.
    """
    output = Path(output)
    for split in SPLITS:
        target = (output / f"{split}.json").resolve()
        for source in (getattr(config, name) for name in SPLITS):
            if isinstance(source, str) and target in (Path(source).resolve(), Path(source.partition("[")[0]).resolve()):
                raise CoconutError(f"{output}: {source} is read from there, and would be overwritten")
    splits: list[PreparedSplit] = []
    for split in reversed(SPLITS):
        if not (source := getattr(config, split)):
            continue
        taken = [later.examples for later in splits]
        bad = BadRecords(most=config.skip_bad_records)
        exclude = frozenset(content_hash(example) for later in taken for example in later)
        read = load_split(config, split, exclude=exclude, bad=bad)
        apart = without_overlap(read, *taken)
        drops = drop_without_steps and split == "train"
        kept = [example for example in apart if example.steps or not drops]
        if not kept:
            raise CoconutError(
                f"DataConfig.{split} = {source!r}: nothing is left of {len(read):,} questions, "
                f"{len(read) - len(apart):,} of which are in another split"
            )
        splits.append(
            PreparedSplit(
                split=split,
                source=source,
                read=len(read),
                overlapping=len(read) - len(apart),
                without_steps=sum(not example.steps for example in apart),
                dropped=len(apart) - len(kept),
                repeated=_repeated(kept),
                left_out=bad.reasons,
                examples=kept,
                file=output / f"{split}.json",
            )
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CoconutError(f"{output}: cannot be made: {error.strerror or error}") from error
    for prepared in splits:
        save_examples(prepared.file, prepared.examples)
    return splits[::-1]


def prepare_report(splits: Sequence[PreparedSplit]) -> str:
    """Markdown: what became of every split, and which malformed records were left out."""
    rows = [
        [
            prepared.split,
            str(prepared.source),
            *(
                f"{count:,}"
                for count in (
                    prepared.read,
                    prepared.overlapping,
                    prepared.without_steps,
                    prepared.dropped,
                    prepared.repeated,
                    len(prepared.examples),
                )
            ),
            str(prepared.file),
        ]
        for prepared in splits
    ]
    columns = ("split", "source", "read", "in another split", "without steps", "dropped", "repeated", "written", "file")
    left_out = [f"left out: {reason}" for prepared in splits for reason in prepared.left_out]
    return "\n\n".join([markdown_table(columns, rows), *left_out])


def statistics_report(path: Path | str, task: str | None = None) -> str:
    """Markdown: what can be counted in a file of questions, and the accuracy of each known shortcut.

    Args:
      path: a source of questions (`coconut.tasks.records`), or part of one (``questions.json[:100]``).
      task: whose format it has; the field's JSON if none is named, and then the task is found out.

    Raises:
      CoconutError: the file cannot be read, or holds no questions of that task.
    """
    examples = _load(path, task)
    kind = get_task(task) if task else _task_of(examples)
    unsolved = sum(not example.steps for example in examples)
    report = [
        f"{len(examples):,} questions of {path}{f' ({kind.name})' if kind else ''}; {_repeated(examples):,} repeated, "
        f"{unsolved:,} without steps",
        _marginal_table(text_statistics(examples)),
    ]
    shares = answer_shares(examples)
    report.append(
        markdown_table(
            ("most frequent answer", "share %"), [[answer, f"{100 * share:.1f}"] for answer, share in shares]
        )
    )
    if numbers := sum(is_number(example.answer) for example in examples):
        report.append(f"{numbers:,} of {len(examples):,} answers are numbers")
    if kind and kind.statistics:
        measured, left_out = _measure(kind.statistics, examples, "these statistics")
        report += ([_marginal_table(measured)] if measured else []) + left_out
    if kind and kind.shortcuts:
        measured, left_out = _measure(kind.shortcuts, examples, "these rules")
        rules = [
            [name, f"{100 * accuracy.value:.1f} +- {100 * accuracy.half_width:.1f}"]
            for name, accuracy in measured.items()
        ]
        report += ([markdown_table(("shortcut rule", "accuracy % (95 %)"), rules)] if rules else []) + left_out
    return "\n\n".join(report)


def show(path: Path | str, count: int, task: str | None = None) -> str:
    """The first questions of a file, as a person reads them.

    Args:
      path: a source of questions (`coconut.tasks.records`), or part of one (``questions.json[100:]``).
      count: how many.
      task: whose format it has; the field's JSON if none is named.

    Raises:
      CoconutError: the file cannot be read, or the count is not positive.
    """
    if count < 1:
        raise CoconutError(f"--count = {count}: must be at least 1")
    blocks = []
    for number, example in enumerate(_load(path, task)[:count]):
        shown = (step if isinstance(step, str) else f"({step.count} thoughts)" for step in example.steps)
        steps = "".join(f"\n  {step}" for step in shown)
        blocks.append(f"[{number}] {example.question}{steps}\n  -> {example.answer}")
    return "\n\n".join(blocks)


def _load(path: Path | str, task: str | None) -> list[Example]:
    if task is not None:
        return get_task(task).load(path)
    try:
        return Task(name="any").load(path)
    except CoconutError as error:
        raise CoconutError(f"{error} (a file in a task's own format needs --task)") from error


def _measure(
    measure: Callable[[Sequence[Example]], Mapping[str, T]], examples: Sequence[Example], name: str
) -> tuple[Mapping[str, T], list[str]]:
    """What can be measured, and a line on the records that cannot, if there are any."""
    try:
        return measure(examples), []
    except CoconutError:
        reasons = {index: reason for index, example in enumerate(examples) if (reason := _refusal(measure, example))}
    kept = [example for index, example in enumerate(examples) if index not in reasons]
    if not reasons:
        raise CoconutError(f"{name} can be taken of each question alone, but not of all of them")
    first, reason = next(iter(reasons.items()))
    line = (
        f"{len(reasons):,} of {len(examples):,} questions are left out of {name}; the first is record {first}: {reason}"
    )
    return (measure(kept) if kept else {}), [line]


def _refusal(measure: Callable[[Sequence[Example]], Any], example: Example) -> str | None:
    """Why a question cannot be measured."""
    try:
        measure([example])
    except CoconutError as error:
        return str(error)
    return None


def _task_of(examples: Sequence[Example]) -> Task | None:
    """The task whose statistics can be taken of one of the first questions."""
    for task in TASKS.values():
        if task.statistics is not None and any(_refusal(task.statistics, e) is None for e in examples[:20]):
            return task
    return None


def _repeated(examples: Sequence[Example]) -> int:
    return len(examples) - len({content_hash(example) for example in examples})


def _marginal_table(marginals: Mapping[str, Marginal]) -> str:
    rows = []
    for name, marginal in marginals.items():
        values = sorted(marginal.counts)
        shares = "  ".join(f"{value}: {marginal.share(value):.3f}" for value in values) if len(values) <= 11 else ""
        rows.append([name, f"{marginal.mean:.2f}", f"{marginal.standard_deviation:.2f}", shares])
    return markdown_table(("statistic", "mean", "sd", "shares"), rows)
