"""What makes two questions the same, and the proof that two splits share none."""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable

from coconut.errors import CoconutError
from coconut.types import Example

_OPTIONS = re.compile(r"^(Is \S+ an? )(\S+)( or )(\S+)\?$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def content_hash(example: Example) -> str:
    """Hashes what a question asks, whatever the order and the letters in which it says so.

    Sentences (or the edges of the symbol form) are sorted, and so are the two options; blanks are normalised. Case, a
    final full stop, the Unicode form (NFKC) and invisible characters make no difference. Steps and
    answer do not enter: the same question with another solution is still the same question. Two graphs that differ
    only in the names of their nodes are different questions.

    Returns:
      32 hexadecimal digits.
    """
    return _digest(example.question, exact=False)


# Drawn, left out of other splits, compared with them: a question is asked for several times before a run begins.
@functools.lru_cache(maxsize=2**18)
def _digest(question: str, exact: bool) -> str:
    """The hash; ``exact`` keeps case, full stops, Unicode form and invisible characters."""
    if not exact and not question.isascii():
        # Normalised first, so that an invisible character between a letter and its accent cannot keep them apart.
        question = "".join(c for c in question if unicodedata.category(c) != "Cf")
        question = unicodedata.normalize("NFKC", question)
    head, mark, tail = question.rpartition("[Q]")
    if mark:
        parts = sorted([" ".join(part.split()) for part in head.removeprefix("<eos>").split("|")])
        candidates, _, root = tail.partition("[R]")
        parts += ["[Q]", *sorted(candidates.split()), "[R]", root.strip()]
        parts = parts if exact else [part.casefold() for part in parts]
    else:
        *parts, last = _SENTENCE_END.split(" ".join(question.split()))
        if not exact:
            *parts, last = (part.rstrip(".").casefold() for part in (*parts, last))
        if options := _OPTIONS.match(last):
            is_a, first, or_, second = options.groups()
            last = f"{is_a}{min(first, second)}{or_}{max(first, second)}?"
        parts = sorted([*parts, last])
    return hashlib.blake2b("\n".join(parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def without_overlap(examples: Iterable[Example], *others: Iterable[Example]) -> list[Example]:
    """The examples whose questions (by `content_hash`) are in none of the other splits, in their order."""
    taken = {content_hash(example) for other in others for example in other}
    return [example for example in examples if content_hash(example) not in taken]


def assert_disjoint(
    train: Iterable[Example],
    evaluation: Iterable[Example],
    train_name: str = "train",
    evaluation_name: str = "evaluation",
) -> None:
    """Checks that no evaluation question is also a training question.

    Raises:
      CoconutError: naming both splits, how many evaluation records overlap (and how many of these differ in case, a
        full stop, Unicode form or invisible characters), and the first of them.
    """
    train = list(train)
    first_seen: dict[str, int] = {}
    for index, example in enumerate(train):
        first_seen.setdefault(content_hash(example), index)
    overlaps = [
        (index, first_seen[digest], example.question)
        for index, example in enumerate(evaluation)
        if (digest := content_hash(example)) in first_seen
    ]
    if overlaps:
        index, train_index, question = overlaps[0]
        shown = question if len(question) <= 120 else question[:117] + "..."
        exact = {_digest(example.question, exact=True) for example in train}
        near = sum(_digest(text, exact=True) not in exact for _, _, text in overlaps)
        unequal = f", {near} of them but for case, a full stop, Unicode form or invisible characters" if near else ""
        raise CoconutError(
            f"{len(overlaps)} question(s) of {evaluation_name} are also in {train_name}{unequal}; the first is record "
            f"{index} of {evaluation_name}, record {train_index} of {train_name}: {shown!r}"
        )
