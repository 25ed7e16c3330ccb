"""The data of a run: three splits that never overlap, and the tokenizer that reads them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, no_type_check

from coconut.tasks import Task, assert_disjoint, content_hash, get_task
from coconut.tokenizers import (
    SYMBOLS,
    TEXT,
    TextFormat,
    TokenizedExample,
    Tokenizer,
    byte_pair_tokenizer,
    encode_example,
    symbol_tokenizer,
    word_tokenizer,
)
from coconut.types import CoconutError, Example, check_fields

TokenizerKind = Literal["symbols", "words", "byte_pair"]
SPLITS = ("train", "validation", "test")


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where questions come from.

    Attributes:
      task: name of the task (`coconut.tasks.TASKS`).
      train: questions to learn from: a number to generate, or a file to read.
      validation: questions that choose between checkpoints: likewise; 0 for none.
      test: questions that are reported: likewise; 0 for none.
      options: keywords of the task's generator, for generated splits.
      seed: of the generated splits. It is no part of the run's own seed: runs of several seeds share their data.
      tokenizer: ``symbols`` for questions written in symbols; ``words`` or ``byte_pair``, trained on the train split.
      vocab_size: ids of a ``byte_pair`` tokenizer.
      drop_too_long: leave out examples longer than the model's positions, with a count, instead of an error.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    task: str
    train: int | str
    validation: int | str = 0
    test: int | str = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    tokenizer: TokenizerKind = "words"
    vocab_size: int = 4096
    drop_too_long: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        get_task(self.task)
        for split in SPLITS:
            value = getattr(self, split)
            if isinstance(value, int) and value < 0:
                raise CoconutError(f"DataConfig.{split} = {value!r}: must be a count of at least 0, or a file")
        if not self.train:
            raise CoconutError(f"DataConfig.train = {self.train!r}: there is nothing to learn from")
        try:
            json.dumps(dict(self.options))
        except TypeError as error:
            raise CoconutError(f"DataConfig.options = {self.options!r}: must be plain values ({error})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Splits as text, and how to read and judge them.

    Attributes:
      task: the task.
      text_format: how the parts of an example are written.
      splits: the examples of each of `SPLITS`; may be empty but for ``train``.
    """

    task: Task
    text_format: TextFormat
    splits: Mapping[str, list[Example]]

    def tokenized(self, split: str, tokenizer: Tokenizer) -> list[TokenizedExample]:
        """The ids of a split."""
        return [encode_example(tokenizer, example, self.text_format) for example in self.splits[split]]


def text_format_of(config: DataConfig) -> TextFormat:
    """How a data set's examples are written."""
    return SYMBOLS if config.tokenizer == "symbols" else TEXT


def load_split(config: DataConfig, split: str, *, exclude: frozenset[str] = frozenset()) -> list[Example]:
    """One split, read or generated; generated questions avoid the content hashes in ``exclude``.

    Raises:
      CoconutError: the file cannot be read, or the generator refuses its options.
    """
    source, task = getattr(config, split), get_task(config.task)
    if isinstance(source, str):
        return task.load(source)
    if source == 0:
        return []
    # Each split draws from a seed of its own, so that growing one does not move another.
    seed = config.seed * len(SPLITS) + SPLITS.index(split)
    return task.generate(source, seed, exclude=exclude, **config.options)


def load_dataset(config: DataConfig) -> Dataset:
    """All splits; no question stands in two of them.

    Raises:
      CoconutError: a file cannot be read, or splits overlap.
    """
    splits: dict[str, list[Example]] = {}
    seen: frozenset[str] = frozenset()
    # Evaluation first: training gives way.
    for split in reversed(SPLITS):
        splits[split] = load_split(config, split, exclude=seen)
        if split != "train":
            seen |= {content_hash(example) for example in splits[split]}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert_disjoint(splits[first], splits[second], first, second)
    return Dataset(task=get_task(config.task), text_format=text_format_of(config), splits=splits)


def make_tokenizer(config: DataConfig, examples: Sequence[Example]) -> Tokenizer:
    """The tokenizer of a run, made from its training examples."""
    texts = text_format_of(config).texts(examples)
    if config.tokenizer == "symbols":
        symbols = {symbol for text in texts for symbol in text.split()}
        # Node numbers in their own order, behind the other symbols.
        return symbol_tokenizer(sorted(symbols, key=lambda s: (s.isdigit(), int(s) if s.isdigit() else 0, s)))
    if config.tokenizer == "words":
        return word_tokenizer(texts)
    return byte_pair_tokenizer(texts, config.vocab_size)
