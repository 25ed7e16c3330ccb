"""The contract every task keeps: where its questions come from, and when an answer is right."""

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.fields import show_value
from coconut.tasks.graph_form import ANSWER
from coconut.tasks.records import BadRecords, load_examples
from coconut.tasks.statistics import Accuracy, Marginal
from coconut.types import Example

_PART = re.compile(r"(.+)\[(\d{0,18}):(\d{0,18})\]", re.ASCII)
# A single # is a mark only where a word may begin, so that "C#" is an answer.
_MARK = re.compile(r"#{3,}|(?<!\S)#+")


def extract_answer(text: str) -> str:
    """The answer in a generated text: what follows its last ``[A]`` (symbol form), else its last ``#``.

    One ``#`` or two are a mark at the beginning of a word, three or more anywhere. The answer is normalised as a
    reference is (`normalize_answer`); a text without either mark is taken whole. An extracted answer is its own
    extracted answer.
    """
    text = normalize_answer(text)  # First: without its commas a text may have other marks.
    return (text.rpartition(ANSWER)[2] if ANSWER in text else _MARK.split(text)[-1]).strip()


def normalize_answer(answer: str) -> str:
    """An answer without commas and surrounding blanks, as the official Coconut evaluation compares them."""
    return answer.replace(",", "").strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One task. One of your own is one of these, given to `coconut.tasks.register_task`.

    Attributes:
      name: what a config or a command calls it.
      generator: ``(count, *, seed, exclude=frozenset(), **options) -> list[Example]``: exactly ``count`` questions, a
        function of its arguments alone, so that every process and every resumed run draws the same. ``exclude`` holds
        the `coconut.tasks.content_hash` of questions that must not be drawn: those of other splits. The options are
        ``DataConfig.options``, of types that JSON has. ``None`` for a task that is only read from files.
      loader: ``(path, *, bad=None) -> list[Example]``: reads a source in the task's own format; the default is the
        field's JSON. `coconut.tasks.records.read_records` gives it the records of a source of any kind, be it a file or
        a data set. Without the parameter ``bad`` (`coconut.tasks.records.BadRecords`) it can leave no record out.
      extract_answer: finds the answer in a generated text, without end-of-sequence mark. A reference is never cut.
      normalize_answer: what is done to both an extracted answer and a reference before they are compared.
      statistics: the distribution of every property by which two files of the task can be compared; ``None`` for a
        task that has none beyond `coconut.tasks.statistics.text_statistics`.
      shortcuts: accuracy of rules that answer without reasoning; ``None`` where none are known.
    """

    name: str
    generator: Callable[..., list[Example]] | None = None
    loader: Callable[..., list[Example]] = load_examples
    extract_answer: Callable[[str], str] = extract_answer
    normalize_answer: Callable[[str], str] = normalize_answer
    statistics: Callable[[Sequence[Example]], Mapping[str, Marginal]] | None = None
    shortcuts: Callable[[Sequence[Example]], Mapping[str, Accuracy]] | None = None

    def generate(self, count: int, seed: int, **options: Any) -> list[Example]:
        """Draws ``count`` examples; the options are the keywords of the task's generator.

        Raises:
          CoconutError: if the task is not generated, or has no such option, or the generator refuses a value, or makes
            an answer that nothing could be compared with.
        """
        if self.generator is None:
            raise CoconutError(f"task {self.name!r} cannot be generated: load it from a file")
        known = [name for name in inspect.signature(self.generator).parameters if name not in ("count", "seed")]
        for option in options:
            if option not in known:
                raise CoconutError(unknown(f"option of task {self.name!r}", option, known))
        examples = self.generator(count, seed=seed, **options)
        self._check_references(examples, f"task {self.name!r}")
        return examples

    def load(self, path: str | os.PathLike[str], bad: BadRecords | None = None) -> list[Example]:
        """Reads a file of questions, or some of its records: ``questions.json[9000:9200]``.

        Args:
          path: the file, or part of one. Parts count the records that are left.
          bad: how many malformed records may be left out, and the list of them; none if not given.

        Raises:
          CoconutError: saying where the file is malformed, or that it has no such records, or that an answer could
            never be given: nothing is left of it, or it holds a mark at which generated answers are cut.
        """
        part = _PART.fullmatch(os.fspath(path))
        if not part or os.path.exists(path):
            return self._load(path, bad)
        file, start, stop = part.groups()
        examples = self._load(file, bad)
        chosen = examples[int(start or 0) : int(stop) if stop else None]
        if not chosen:
            raise CoconutError(f"{path}: no such records, {file} holds {len(examples):,}")
        return chosen

    def check(self, prediction: str, example: Example) -> bool:
        """Whether a generated text, or the answer extracted from one, gives exactly the example's answer."""
        return self.normalize_answer(self.extract_answer(prediction)) == self.normalize_answer(example.answer)

    def _load(self, path: str | os.PathLike[str], bad: BadRecords | None) -> list[Example]:
        if bad is None or not bad.most:
            examples = self.loader(path)
        elif "bad" in inspect.signature(self.loader).parameters:
            examples = self.loader(path, bad=bad)
        else:
            raise CoconutError(
                f"{path}: no record can be left out: the loader of task {self.name!r} has no parameter 'bad'"
            )
        self._check_references(examples, os.fspath(path))
        return examples

    def _check_references(self, examples: Sequence[Example], where: str) -> None:
        for index, example in enumerate(examples):
            answer = self.normalize_answer(example.answer)
            if not answer:
                raise CoconutError(
                    f"{where}: record {index}: field 'answer' must be a text that is not blank without its commas, "
                    f"got {show_value(example.answer)}"
                )
            # Whoever extracts answers in another way knows its own marks.
            if self.extract_answer is extract_answer and extract_answer(f"### {answer}") != answer:
                raise CoconutError(
                    f"{where}: record {index}: field 'answer' holds a mark at which generated answers are cut "
                    f"('#' or {ANSWER!r}), so that no answer could be right: {show_value(example.answer)}"
                )


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name nobody knows: the nearest known one, then all of them."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind}: {name!r}{hint} (known: {', '.join(known)})"
