"""The tokenizer: plain data, its checks, its file, and the `tiktoken.Encoding` built from it."""

import base64
import dataclasses
import difflib
import functools
import hashlib
import json
import operator
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import tiktoken

from coconut.errors import CoconutError
from coconut.tokenizers.splits import compile_split, split_text

START_LATENT = "<|start-latent|>"
LATENT = "<|latent|>"
END_LATENT = "<|end-latent|>"
MARKERS = (START_LATENT, LATENT, END_LATENT)

KINDS = ("symbol", "word", "byte_pair")
NORMALIZATIONS = ("", "NFC")

SYMBOL_PATTERN = r"\S+"

SINGLE_BYTES = tuple(bytes([value]) for value in range(256))
# What a vocabulary that was trained on text alone may lack, as SmolLM's does: control characters, bytes of no UTF-8,
# and the first ones of characters of the fifth plane and behind, where none is printed.
_NOT_IN_TEXT = frozenset([*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)]) - frozenset(b"\t\n\r")

# The fields of a tokenizer's file: the type of each value, and how an error calls the whole.
_STRING, _STRINGS, _INTEGERS = (str, "a string"), (str, "a list of strings"), (int, "a list of integers")
_REAL = {
    "splits": _STRINGS,
    "special_ids": _INTEGERS,
    "spelled": _STRINGS,
    "leading": _STRINGS,
    "normalization": _STRING,
}
_FIELDS = {
    "kind": _STRING,
    "pattern": _STRING,
    "tokens": _STRINGS,
    "special_tokens": _STRINGS,
    "eos_token": _STRING,
    **_REAL,
    "fingerprint": _STRING,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A vocabulary and the rule that cuts text into it.

    Ids are exactly ``0 .. vocab_size - 1``. Unless ``special_ids`` says otherwise, token ``i`` has the bytes
    ``tokens[i]``, and the special tokens follow in their order.

    Attributes:
      kind: ``symbol`` (symbols between white space, which itself carries no token), ``word`` or ``byte_pair``
        (both lossless).
      pattern: the regular expression that cuts text into pieces, in tiktoken's dialect.
      tokens: the bytes of each ordinary token, by id; earlier ones are merged first within a piece that is no token.
      special_tokens: names of the special tokens, the three markers among them.
      eos_token: name of the end-of-sequence token: a special token, or one of the symbols.
      splits: regular expressions that cut text before ``pattern`` does, one after the other, in the dialect of the
        package ``regex`` (`coconut.tokenizers.splits`).
      special_ids: ids of the special tokens, where they do not simply follow the ordinary ones.
      spelled: special tokens that text may spell, such as ``<think>``: those a real model's vocabulary adds, but does
        not call special. They are cut out before anything else.
      leading: special tokens that the vocabulary wants before a text; questions get them, steps and answers do not.
      normalization: ``NFC`` where text is normalized before it is cut; it then survives the round trip normalized.

    Raises:
      CoconutError: if the fields do not describe a usable vocabulary.
    """

    kind: str
    pattern: str
    tokens: tuple[bytes, ...] = dataclasses.field(repr=False)  # Too many to read in an error message.
    special_tokens: tuple[str, ...]
    eos_token: str
    splits: tuple[str, ...] = ()
    special_ids: tuple[int, ...] = ()
    spelled: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    normalization: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise CoconutError(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")
        if self.normalization not in NORMALIZATIONS:
            raise CoconutError(f"normalization: {self.normalization!r} is none of {NORMALIZATIONS}")
        if not self.pattern:
            raise CoconutError("pattern: an empty pattern matches no text")
        if not self.tokens or b"" in self.tokens:
            raise CoconutError("tokens: there is none, or one is empty")
        for name, items in (("tokens", self.tokens), ("special_tokens", self.special_tokens)):
            if len(set(items)) < len(items):
                repeated = next(item for index, item in enumerate(items) if item in items[:index])
                raise CoconutError(f"{name}: {_printable(repeated)!r} stands there twice")
        if self.special_ids:
            within = all(0 <= special_id < self.vocab_size for special_id in self.special_ids)
            if not within or not len(set(self.special_ids)) == len(self.special_ids) == len(self.special_tokens):
                raise CoconutError(
                    f"special_ids: {len(self.special_tokens)} different ones are needed within "
                    f"0 .. {self.vocab_size - 1}: {self.special_ids!r:.80}"
                )
        for field in ("spelled", "leading"):
            for name in getattr(self, field):
                if name not in self.special_tokens:
                    raise CoconutError(f"{field}: {name!r} is no special token")
        for marker in MARKERS:
            if marker in self.spelled:
                raise CoconutError(f"spelled: text may not spell the marker {marker!r}")
            if marker not in self.special_tokens:
                raise CoconutError(f"special_tokens: the marker {marker!r} is missing from {self.special_tokens!r}")
        for name in self.special_tokens:
            if not name or "\ufffd" in without_surrogates(name):
                raise CoconutError(f"special_tokens: {name!r} is empty or no valid text")
            if name.encode("utf-8") in self._ids:
                raise CoconutError(f"special_tokens: {name!r} is also an ordinary token, so text could spell it")
        if self.eos_token not in self.special_tokens and utf8(self.eos_token) not in self._ids:
            raise CoconutError(f"eos_token: {self.eos_token!r} is neither a special token nor an ordinary one")
        if self.eos_token in MARKERS:
            raise CoconutError(f"eos_token: {self.eos_token!r} is a marker")
        # tiktoken falls back to single bytes and panics where one is missing: make sure that it never has to.
        if self.kind == "symbol":
            if self.pattern != SYMBOL_PATTERN:
                raise CoconutError(f"pattern: a symbol vocabulary has {SYMBOL_PATTERN!r}, not {self.pattern!r}")
            if self.normalization or self.spelled or self.splits:
                raise CoconutError("normalization, spelled, splits: a symbol vocabulary has none of them")
            for token in self.tokens:
                text = token.decode("utf-8", "replace")
                if text.split() != [text] or text.encode("utf-8") != token:
                    raise CoconutError(f"tokens: symbol {_printable(token)!r} holds white space or is no UTF-8")
        else:
            may_lack = _NOT_IN_TEXT if self.kind == "byte_pair" else frozenset()
            for value in sorted(self._missing - may_lack):
                raise CoconutError(f"tokens: a {self.kind} vocabulary needs every single byte; {value} is missing")
            for token in self.tokens if self._missing else ():
                if not self._missing.isdisjoint(token):
                    raise CoconutError(f"tokens: {_printable(token)!r} has a byte that is no token")
        try:
            _ = self.encoding  # Built now, so that a bad pattern is reported where it came from.
        except BaseException as error:
            if not (isinstance(error, ValueError) or _is_panic(error)):
                raise
            raise CoconutError(f"pattern: {self.pattern!r} is no valid regular expression: {error}") from error
        for pattern in self.splits:
            compile_split(pattern)

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        taken = set(self._special_ids.values())
        free = (token_id for token_id in range(self.vocab_size) if token_id not in taken)
        return dict(zip(self.tokens, free, strict=True))

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        ids = self.special_ids or range(len(self.tokens), self.vocab_size)
        return dict(zip(self.special_tokens, ids, strict=True))

    @functools.cached_property
    def _missing(self) -> frozenset[int]:
        """The bytes that are no token."""
        return frozenset(value for value, byte in enumerate(SINGLE_BYTES) if byte not in self._ids)

    def can_spell(self, text: str) -> bool:
        """Whether it has tokens for all of a text; a ``byte_pair`` vocabulary may have none for control characters."""
        return self.kind == "symbol" or self._missing.isdisjoint(utf8(without_surrogates(text)))

    @functools.cached_property
    def _bytes_by_id(self) -> list[bytes]:
        special = {name.encode("utf-8"): token_id for name, token_id in self._special_ids.items()}
        ids = self._ids | special
        return sorted(ids, key=ids.__getitem__)

    @functools.cached_property
    def _spelled_pattern(self) -> re.Pattern[str] | None:
        # Of two names that start at the same place the longer one counts.
        names = sorted(self.spelled, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The `tiktoken.Encoding`, for code that wants one. It knows nothing of ``splits`` and ``spelled``."""
        return tiktoken.Encoding(
            f"coconut-{self.kind}",
            pat_str=self.pattern,
            mergeable_ranks=self._ids,
            special_tokens=self._special_ids,
            explicit_n_vocab=self.vocab_size,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokens) + len(self.special_tokens)

    @property
    def start_latent_id(self) -> int:
        """Id of the marker before the first thought."""
        return self._special_ids[START_LATENT]

    @property
    def latent_id(self) -> int:
        """Id that stands where a thought goes."""
        return self._special_ids[LATENT]

    @property
    def end_latent_id(self) -> int:
        """Id of the marker after the last thought."""
        return self._special_ids[END_LATENT]

    @property
    def eos_id(self) -> int:
        """Id that ends a sequence; also the padding."""
        special_id = self._special_ids.get(self.eos_token)
        return self._ids[utf8(self.eos_token)] if special_id is None else special_id

    @property
    def leading_ids(self) -> list[int]:
        """Ids of the special tokens before a text."""
        return [self._special_ids[name] for name in self.leading]

    def token_ids(self) -> dict[bytes, int]:
        """The ordinary tokens and their ids."""
        return dict(self._ids)

    def special_token_ids(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return dict(self._special_ids)

    def encode(self, text: str) -> list[int]:
        """Cuts text into token ids, without EOS; the name of a special token is cut like any other text.

        Only the names in ``spelled`` become the token of that name.

        Raises:
          CoconutError: for a symbol that a ``symbol`` vocabulary does not know, with the nearest that it does; for a
            character that a vocabulary has no tokens for; or the pattern leaves out a part of the text, or cannot be
            followed on it.
        """
        if self.kind == "symbol":
            symbols = text.split()
            for symbol in symbols:
                if utf8(symbol) not in self._ids:
                    known = [token.decode("utf-8") for token in self.tokens]
                    nearest = difflib.get_close_matches(symbol, known, n=1, cutoff=0.0)[0]
                    raise CoconutError(f"unknown symbol {symbol!r}; the nearest known one is {nearest!r}")
            # Joined again because Python counts a few control characters as white space that tiktoken does not.
            text = " ".join(symbols)
        if not self.normalization and not self.spelled and not self.splits:
            return self._cut(text)
        text = without_surrogates(text)
        # Names first, then the normalization: a character behind a name must not change it.
        pieces = self._spelled_pattern.split(text) if self._spelled_pattern else [text]
        ids = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self._special_ids[piece])
            else:
                piece = unicodedata.normalize("NFC", piece) if self.normalization else piece
                for part in split_text(piece, self.splits):
                    ids += self._cut(part)
        return ids

    def _cut(self, text: str) -> list[int]:
        """Ids of a text without names. A pattern leaves out what it does not match, and tiktoken says nothing."""
        if self._missing and not self.can_spell(text):
            unknown = next(character for character in text if not self.can_spell(character))
            raise CoconutError(f"the vocabulary has no token for the character {unknown!r} of {text!r:.80}")
        try:
            ids = self.encoding.encode_ordinary(text)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise CoconutError(f"the pattern {self.pattern!r:.200} fails on {text!r:.80}: {error}") from error
        if self.kind != "symbol":
            kept = sum(map(len, map(self._bytes_by_id.__getitem__, ids)))
            if kept != len(without_surrogates(text).encode()):
                raise CoconutError(f"the pattern {self.pattern!r:.200} drops text of {text!r:.80}")
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Joins tokens (symbols by single spaces); special ones appear by name, bytes that are no UTF-8 as U+FFFD.

        Raises:
          CoconutError: for an id outside ``0 .. vocab_size - 1``.
        """
        pieces = [self._bytes(token_id) for token_id in ids]
        return (b" " if self.kind == "symbol" else b"").join(pieces).decode("utf-8", "replace")

    def token(self, token_id: SupportsIndex) -> str:
        """One token for people to read: control characters and bytes that are no UTF-8 are escaped.

        Raises:
          CoconutError: for an id outside ``0 .. vocab_size - 1``.
        """
        return _printable(self._bytes(token_id))

    def _bytes(self, token_id: SupportsIndex) -> bytes:
        token_id = operator.index(token_id)
        if not 0 <= token_id < self.vocab_size:
            raise CoconutError(f"token id {token_id} is out of range 0 .. {self.vocab_size - 1}")
        return self._bytes_by_id[token_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 over everything that decides which ids a text gets."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode("ascii")).hexdigest()

    def _content(self) -> dict[str, Any]:
        content = {
            "kind": self.kind,
            "pattern": self.pattern,
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
            "special_tokens": list(self.special_tokens),
            "eos_token": self.eos_token,
        }
        # What real models need besides is left out where it says nothing, so that a file written before there was
        # such a field keeps its fingerprint.
        real = ((name, getattr(self, name)) for name in _REAL)
        return content | {name: value if isinstance(value, str) else list(value) for name, value in real if value}

    def to_json(self) -> dict[str, Any]:
        """The tokenizer as a JSON object (tokens in base 64), its fingerprint included."""
        return {**self._content(), "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> "Tokenizer":
        """The inverse of `to_json`.

        Args:
          content: the parsed JSON object.
          where: what it was read from, for error messages.

        Raises:
          CoconutError: for a missing, mistyped or inconsistent field, or a fingerprint that does not match.
        """
        for field in _FIELDS:
            if field not in content and field not in _REAL:
                raise CoconutError(f"{where}: the field {field!r} is missing")
            item, kind = _FIELDS[field]
            values = content.get(field, [])
            if kind == "a string":
                values = [values] if field in content else []
            if not isinstance(values, list) or not all(type(value) is item for value in values):
                raise CoconutError(f"{where}: {field} must be {kind}, not {content[field]!r:.80}")
        try:
            tokenizer = cls(
                kind=content["kind"],
                pattern=content["pattern"],
                tokens=tuple(base64.b64decode(token, validate=True) for token in content["tokens"]),
                special_tokens=tuple(content["special_tokens"]),
                eos_token=content["eos_token"],
                special_ids=tuple(content.get("special_ids", ())),
                splits=tuple(content.get("splits", ())),
                spelled=tuple(content.get("spelled", ())),
                leading=tuple(content.get("leading", ())),
                normalization=content.get("normalization", ""),
            )
        except CoconutError as error:
            raise CoconutError(f"{where}: {error}") from error
        except ValueError as error:
            raise CoconutError(f"{where}: tokens holds a string that is no base 64: {error}") from error
        if tokenizer.fingerprint != content["fingerprint"]:
            raise CoconutError(
                f"{where}: fingerprint is {content['fingerprint']!r:.80}, but the content gives "
                f"{tokenizer.fingerprint!r}: it was changed or damaged after it was written"
            )
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer to a JSON file, whole or not at all; a file that stood there is replaced.

        Raises:
          OSError: if the file cannot be written; one that stood there stays as it was.
        """
        path = Path(path)
        # Beside the file, because only a rename within one file system is atomic.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(self.to_json(), file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a file that `save` wrote.

        Raises:
          CoconutError: if the file is missing, is no JSON, or fails a check of `from_json`.
        """
        try:
            content = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise CoconutError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
        except ValueError as error:
            raise CoconutError(f"{path}: not a JSON file: {error}") from error
        if not isinstance(content, dict):
            raise CoconutError(f"{path}: a tokenizer is a JSON object, not {content!r:.80}")
        return cls.from_json(content, str(path))


def utf8(text: str) -> bytes:
    """The bytes of text; a lone surrogate gives bytes that are no UTF-8 and so equal no valid token."""
    return text.encode("utf-8", "surrogatepass")


def without_surrogates(text: str) -> str:
    """Text as tiktoken reads it: surrogate pairs joined, lone surrogates turned into U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_panic(error: BaseException) -> bool:
    """Whether Rust gave up. Its exception is no `Exception`, and its class can be imported from nowhere."""
    return type(error).__name__ == "PanicException"


def _printable(token: bytes | str) -> str:
    text = token if isinstance(token, str) else token.decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
