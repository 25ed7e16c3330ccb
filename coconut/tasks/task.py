"""The contract every task keeps: where its questions come from, and when an answer is right."""

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.graph_form import ANSWER
from coconut.tasks.records import load_examples
from coconut.tasks.statistics import Accuracy, Marginal
from coconut.types import Example

_PART = re.compile(r"(.+)\[(\d{0,18}):(\d{0,18})\]", re.ASCII)


def extract_answer(text: str) -> str:
    """The answer in a generated text: what follows its last ``[A]`` (symbol form), else its last ``#``.

    Commas and surrounding blanks are removed, as the official Coconut evaluation does; a text without either mark is
    taken whole. An extracted answer is its own extracted answer.
    """
    mark = ANSWER if ANSWER in text else "#"
    return text.rpartition(mark)[2].replace(",", "").strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One task. One of your own is one of these, given to `coconut.tasks.register_task`.

    Attributes:
      name: what a config or a command calls it.
      generator: ``(count, *, seed, exclude=frozenset(), **options) -> list[Example]``: exactly ``count`` questions, a
        function of its arguments alone, so that every process and every resumed run draws the same. ``exclude`` holds
        the `coconut.tasks.content_hash` of questions that must not be drawn: those of other splits. The options are
        ``DataConfig.options``, of types that JSON has. ``None`` for a task that is only read from files.
      loader: reads a file in the task's own format; the default is the field's JSON.
      extract_answer: finds the answer in a generated text, without end-of-sequence mark.
      statistics: the distribution of every property by which two files of the task can be compared; ``None`` for a
        task that has none beyond `coconut.tasks.statistics.text_statistics`.
      shortcuts: accuracy of rules that answer without reasoning; ``None`` where none are known.
    """

    name: str
    generator: Callable[..., list[Example]] | None = None
    loader: Callable[[str | os.PathLike[str]], list[Example]] = load_examples
    extract_answer: Callable[[str], str] = extract_answer
    statistics: Callable[[Sequence[Example]], Mapping[str, Marginal]] | None = None
    shortcuts: Callable[[Sequence[Example]], Mapping[str, Accuracy]] | None = None

    def generate(self, count: int, seed: int, **options: Any) -> list[Example]:
        """Draws ``count`` examples; the options are the keywords of the task's generator.

        Raises:
          CoconutError: if the task is not generated, or has no such option, or the generator refuses a value.
        """
        if self.generator is None:
            raise CoconutError(f"task {self.name!r} cannot be generated: load it from a file")
        known = [name for name in inspect.signature(self.generator).parameters if name not in ("count", "seed")]
        for option in options:
            if option not in known:
                raise CoconutError(unknown(f"option of task {self.name!r}", option, known))
        return self.generator(count, seed=seed, **options)

    def load(self, path: str | os.PathLike[str]) -> list[Example]:
        """Reads a file of questions, or some of its records: ``questions.json[9000:9200]``.

        Raises:
          CoconutError: saying where the file is malformed, or that it has no such records.
        """
        part = _PART.fullmatch(os.fspath(path))
        if not part or os.path.exists(path):
            return self.loader(path)
        file, start, stop = part.groups()
        examples = self.loader(file)
        chosen = examples[int(start or 0) : int(stop) if stop else None]
        if not chosen:
            raise CoconutError(f"{path}: no such records, {file} holds {len(examples):,}")
        return chosen

    def check(self, prediction: str, example: Example) -> bool:
        """Whether a generated text, or the answer extracted from one, gives exactly the example's answer."""
        return self.extract_answer(prediction) == self.extract_answer(example.answer)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name nobody knows: the nearest known one, then all of them."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind}: {name!r}{hint} (known: {', '.join(known)})"
