"""Examples as token ids: how their parts are written, and what is checked before ids reach a device."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from coconut.errors import CoconutError
from coconut.tokenizers.tokenizer import Tokenizer
from coconut.types import Example, Think


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFormat:
    r"""How the parts of an example are written before they are encoded.

    Attributes:
      question_suffix: follows the question.
      step_suffix: follows each step.
      answer_prefix: precedes the answer.
    """

    question_suffix: str = "\n"
    step_suffix: str = "\n"
    answer_prefix: str = "### "

    def write(self, example: Example) -> tuple[str, tuple[str | Think, ...], str]:
        """The question, each step and the answer as they are encoded; blocks of thoughts stay what they are."""
        steps = tuple(step if isinstance(step, Think) else step + self.step_suffix for step in example.steps)
        return example.question + self.question_suffix, steps, self.answer_prefix + example.answer

    def texts(self, examples: Iterable[Example]) -> Iterator[str]:
        """Every text that encoding the examples will meet: the corpus to train a tokenizer on."""
        for example in examples:
            question, steps, answer = self.write(example)
            yield from (question, *(step for step in steps if isinstance(step, str)), answer)


TEXT = TextFormat()
"""The official format of the text tasks."""

SYMBOLS = TextFormat(question_suffix="", step_suffix="", answer_prefix="[A] ")
"""The format of graph questions written in symbols."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedExample:
    """The ids of an example's parts; a method puts them together on a page (`coconut.pages`).

    Attributes:
      question: ids of the prompt, the vocabulary's leading special tokens included, without markers.
      steps: ids of each written step, and the blocks of thoughts between them.
      answer: ids of the answer, its prefix and EOS included.
      answer_prefix: how many of the first ids of ``answer`` are those of its prefix alone.
    """

    question: Int32[np.ndarray, "_"]
    steps: tuple[Int32[np.ndarray, "_"] | Think, ...]
    answer: Int32[np.ndarray, "_"]
    answer_prefix: int = 0

    @property
    def written_steps(self) -> tuple[Int32[np.ndarray, "_"], ...]:
        """The steps that are text."""
        return tuple(step for step in self.steps if not isinstance(step, Think))

    @property
    def num_steps(self) -> int:
        """How many steps are text; curricula count these alone."""
        return sum(not isinstance(step, Think) for step in self.steps)

    @property
    def ids(self) -> Int32[np.ndarray, "_"]:
        """All of its ids, in order."""
        return np.concatenate([self.question, *self.written_steps, self.answer])


def encode_example(tokenizer: Tokenizer, example: Example, text_format: TextFormat) -> TokenizedExample:
    """Encodes the parts of an example, each on its own, as ``text_format`` writes them.

    The question alone gets the special tokens that the vocabulary wants before a text, such as Llama's
    ``<|begin_of_text|>``.

    Raises:
      CoconutError: for a symbol that a ``symbol`` vocabulary does not know.
    """
    question, steps, answer = text_format.write(example)
    answer_ids, prefix_ids = tokenizer.encode(answer), tokenizer.encode(text_format.answer_prefix)
    # A space at its end may have become part of the answer's first token.
    apart = [own == alone for own, alone in zip(answer_ids, prefix_ids, strict=False)]
    return TokenizedExample(
        question=np.asarray([*tokenizer.leading_ids, *tokenizer.encode(question)], dtype=np.int32),
        steps=tuple(
            step if isinstance(step, Think) else np.asarray(tokenizer.encode(step), dtype=np.int32) for step in steps
        ),
        answer=np.asarray([*answer_ids, tokenizer.eos_id], dtype=np.int32),
        answer_prefix=[*apart, False].index(False),
    )


def validate_ids(ids: np.ndarray | Sequence[int], vocab_size: int, where: str) -> None:
    """Checks that every id is one of a vocabulary.

    It runs on the host: on a device an id out of range gives NaN, clamps or wraps, and says nothing.

    Args:
      ids: ids of any shape.
      vocab_size: number of ids in the vocabulary.
      where: what holds the ids, for the error message.

    Raises:
      CoconutError: with the first id outside ``0 .. vocab_size - 1`` and its position, or the type of ids that are no
        integers.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return
    if not np.issubdtype(array.dtype, np.integer):
        raise CoconutError(f"{where}: token ids must be integers, not {array.dtype}")
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        position = tuple(int(index) for index in np.unravel_index(int(wrong.argmax()), array.shape))
        place = position[0] if len(position) == 1 else position
        raise CoconutError(
            f"{where}: token id {int(array[position])} at position {place} is out of range 0 .. {vocab_size - 1}"
        )
