"""The data of a run: three splits that never overlap, and the tokenizer that reads them."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, no_type_check

from coconut.errors import CoconutError, check_fields
from coconut.hub import local_folder
from coconut.tasks import BadRecords, Task, assert_disjoint, content_hash, get_task
from coconut.tokenizers import (
    SYMBOLS,
    TEXT,
    MarkerPlace,
    TextFormat,
    TokenizedExample,
    Tokenizer,
    byte_pair_tokenizer,
    encode_example,
    gpt2_tokenizer,
    load_tokenizer,
    symbol_tokenizer,
    word_tokenizer,
)
from coconut.types import Example

TokenizerKind = Literal["symbols", "words", "byte_pair", "gpt2", "huggingface"]
SPLITS = ("train", "validation", "test")


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where questions come from.

    Attributes:
      task: name of the task (`coconut.tasks.TASKS`).
      train: questions to learn from: a number to generate, or a source to read, in full or in part
        (``questions.json[:9000]``): a file of any kind that `coconut.tasks.records` reads, or a data set of the Hugging
        Face hub (``hf:whynlp/gsm8k-aug@REVISION,split=train``, see `coconut.tasks.hub_datasets`).
      validation: questions that choose between checkpoints: likewise; 0 for none.
      test: questions that are reported: likewise; 0 for none.
      options: keywords of the task's generator, for generated splits.
      seed: of the generated splits. It is no part of the run's own seed: runs of several seeds share their data.
      tokenizer: ``symbols`` for questions written in symbols; ``words`` or ``byte_pair``, trained on the train split;
        ``gpt2`` or ``huggingface`` for that of a published model.
      vocab_size: ids of a ``byte_pair`` tokenizer.
      tokenizer_path: folder or file of a published model's tokenizer (`coconut.tokenizers.load_tokenizer`), or the id
        of a repository of the Hugging Face hub; ``huggingface`` needs it, ``gpt2`` takes what tiktoken has cached or
        downloads without.
      eos_token: name of the token that ends a sequence of a ``huggingface`` tokenizer; None for the one its files name.
      markers: where the latent markers of a ``huggingface`` tokenizer go: ``appended`` behind its last id, or
        ``reserved`` on special tokens its makers left unused.
      skip_bad_records: malformed records of each file that are left out, each logged with its line and the reason;
        one more is an error.
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
    tokenizer_path: str | None = None
    eos_token: str | None = None
    markers: MarkerPlace = "appended"
    drop_too_long: bool = False
    skip_bad_records: int = 0

    def __post_init__(self) -> None:
        self._check_tokenizer()
        check_fields(self)
        get_task(self.task)
        for split in SPLITS:
            value = getattr(self, split)
            if isinstance(value, int) and value < 0:
                raise CoconutError(f"DataConfig.{split} = {value!r}: must be a count of at least 0, or a file")
        if self.skip_bad_records < 0:
            raise CoconutError(f"DataConfig.skip_bad_records = {self.skip_bad_records!r}: must be at least 0")
        if not self.train:
            raise CoconutError(f"DataConfig.train = {self.train!r}: there is nothing to learn from")
        if taken := sorted({"count", "seed", "start", "exclude"} & self.options.keys()):
            raise CoconutError(f"DataConfig.options = {dict(self.options)!r}: {taken[0]!r} is not an option of a task")
        try:
            json.dumps(dict(self.options))
        except TypeError as error:
            raise CoconutError(f"DataConfig.options = {self.options!r}: must be plain values ({error})") from error

    def _check_tokenizer(self) -> None:
        kinds = get_args(TokenizerKind)
        if self.tokenizer not in kinds:
            nearest = difflib.get_close_matches(str(self.tokenizer), kinds, 1, 0.0)[0]
            raise CoconutError(
                f"DataConfig.tokenizer = {self.tokenizer!r}: did you mean {nearest!r}? Known: {', '.join(kinds)}"
            )
        if self.tokenizer == "huggingface" and not self.tokenizer_path:
            raise CoconutError("DataConfig.tokenizer_path = None: tokenizer = 'huggingface' needs a folder or a file")
        # A field that would say nothing was meant for something.
        unread = {
            "tokenizer_path": self.tokenizer in ("gpt2", "huggingface"),
            "eos_token": self.tokenizer == "huggingface",
            "markers": self.tokenizer == "huggingface",
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field, read in unread.items():
            if not read and getattr(self, field) != defaults[field]:
                raise CoconutError(
                    f"DataConfig.{field} = {getattr(self, field)!r}: tokenizer = {self.tokenizer!r} has no use for it"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Splits as text, and how to read and judge them.

    Attributes:
      task: the task.
      text_format: how the parts of an example are written.
      splits: the examples of each of `SPLITS`; may be empty but for ``train``.
      left_out: for each split some of whose malformed records were left out, a message for each of these: file,
        record, line and what is wrong.
    """

    task: Task
    text_format: TextFormat
    splits: Mapping[str, list[Example]]
    left_out: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)

    def tokenized(self, split: str, tokenizer: Tokenizer) -> list[TokenizedExample]:
        """The ids of a split."""
        return [encode_example(tokenizer, example, self.text_format) for example in self.splits[split]]


def text_format_of(config: DataConfig) -> TextFormat:
    """How a data set's examples are written."""
    return SYMBOLS if config.tokenizer == "symbols" else TEXT


def load_split(
    config: DataConfig, split: str, *, exclude: frozenset[str] = frozenset(), bad: BadRecords | None = None
) -> list[Example]:
    """One split, read or generated; generated questions avoid the content hashes in ``exclude``.

    ``bad`` takes the messages of malformed records that are left out, at most ``config.skip_bad_records``.

    Raises:
      CoconutError: the file cannot be read, or the generator refuses its options.
    """
    source, task = getattr(config, split), get_task(config.task)
    if isinstance(source, str):
        return task.load(source, BadRecords(most=config.skip_bad_records) if bad is None else bad)
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
    left_out: dict[str, list[str]] = {}
    seen: frozenset[str] = frozenset()
    # Evaluation first: training gives way.
    for split in reversed(SPLITS):
        bad = BadRecords(most=config.skip_bad_records)
        splits[split] = load_split(config, split, exclude=seen, bad=bad)
        if bad.reasons:
            left_out[split] = bad.reasons
        if split != "train":
            seen |= {content_hash(example) for example in splits[split]}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert_disjoint(splits[first], splits[second], first, second)
    return Dataset(task=get_task(config.task), text_format=text_format_of(config), splits=splits, left_out=left_out)


def make_tokenizer(config: DataConfig, examples: Sequence[Example]) -> Tokenizer:
    """The tokenizer of a run: made from its training examples, or a published model's.

    Raises:
      CoconutError: the examples yield no vocabulary, or a published model's tokenizer cannot be read.
    """
    if config.tokenizer == "gpt2":
        return gpt2_tokenizer(config.tokenizer_path)
    if config.tokenizer == "huggingface" and config.tokenizer_path is not None:
        path = Path(config.tokenizer_path)
        folder = path if path.is_file() else local_folder(path)
        return load_tokenizer(folder, eos_token=config.eos_token, markers=config.markers)
    texts = text_format_of(config).texts(examples)
    if config.tokenizer == "symbols":
        symbols = {symbol for text in texts for symbol in text.split()}
        # Node numbers in their own order, behind the other symbols.
        return symbol_tokenizer(sorted(symbols, key=lambda s: (s.isdigit(), int(s) if s.isdigit() else 0, s)))
    if config.tokenizer == "words":
        return word_tokenizer(texts)
    return byte_pair_tokenizer(texts, config.vocab_size)
