"""Data sets of the Hugging Face hub: how one is named, and its rows. Needs the extra ``datasets``.

A source is written ``hf:OWNER/NAME``, with a revision and options where they are wanted:
``hf:openai/gsm8k@main,config=main,split=test``. A folder laid out like such a repository works as well:
``hf:./my_data,split=train``.

The library runs no code of a repository: since its release 4 it refuses those that need some.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coconut.errors import CoconutError

PREFIX = "hf:"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_OPTIONS = ("config", "split")
_BATCH_ROWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSource:
    """One split of a data set.

    Attributes:
      name: id of the repository, or a folder laid out like one.
      revision: branch, tag or commit; None for the newest.
      config: which of its configurations; None where there is one.
      split: which of its splits, several joined by ``+``; None where there is one.
    """

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubSource":
        """Reads ``hf:NAME[@REVISION][,config=CONFIG][,split=SPLIT]``.

        Raises:
          CoconutError: naming the part that is malformed.
        """
        form = f"a data set is written {PREFIX}OWNER/NAME[@REVISION][,config=CONFIG][,split=SPLIT]"
        place, *options = text.removeprefix(PREFIX).split(",")
        given: dict[str, str] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals or not value or key not in _OPTIONS or key in given:
                raise CoconutError(f"{text}: {option!r}: {form}")
            given[key] = value
        name, at, revision = place.rpartition("@") if "@" in place and not os.path.isdir(place) else (place, "", "")
        if os.path.isdir(name):
            if at:
                raise CoconutError(f"{text}: {name} is a folder, and has no revision {revision!r}")
        elif not REPOSITORY.fullmatch(name) or (at and not revision):
            raise CoconutError(f"{text}: {place!r} is neither a folder nor the id of a repository: {form}")
        return cls(name=name, revision=revision or None, **given)


def is_hub_source(path: str | os.PathLike[str]) -> bool:
    """Whether a source is a data set, not a file."""
    return os.fspath(path).startswith(PREFIX)


def hub_tables(text: str) -> Iterator[Any]:
    """The rows of a data set, as ``pyarrow`` tables of at most a thousand.

    It is downloaded, or taken from the library's cache.

    Raises:
      CoconutError: the source is malformed, the library is missing, or there is no such split. Other errors are the
        library's own, of a dozen kinds.
    """
    source = HubSource.parse(text)
    try:
        import datasets  # Lazy: files need no hub.
    except ImportError as error:
        raise CoconutError(f"{text}: reading a data set needs `pip install 'coconut-jax[datasets]'`") from error
    # As an absolute path, a folder is never taken for the name of one of the library's own readers.
    name = str(Path(source.name).resolve()) if os.path.isdir(source.name) else source.name
    builder = datasets.load_dataset_builder(name, source.config, revision=source.revision)
    split = _split_of(source, [str(split) for split in builder.config.data_files or builder.info.splits or ()], text)
    builder.download_and_prepare()
    dataset = builder.as_dataset(split=split)
    assert isinstance(dataset, datasets.Dataset)  # Not one for each split, since one is named.
    yield from dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS)


def _split_of(source: HubSource, known: list[str], text: str) -> str:
    if source.split is None:
        if len(known) != 1:
            raise CoconutError(
                f"{text}: says of no split; there are {', '.join(known)}: add ,split={(known or ['?'])[0]}"
            )
        return known[0]
    for part in source.split.split("+"):
        if part not in known:
            raise CoconutError(f"{text}: there is no split {part!r}, but {', '.join(known)}")
    return source.split
