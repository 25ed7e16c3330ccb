"""The tokenizer: plain data, its checks, its file, and the `tiktoken.Encoding` built from it."""

import base64
import dataclasses
import difflib
import functools
import hashlib
import json
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import tiktoken

from coconut.types import CoconutError

START_LATENT = "<|start-latent|>"
LATENT = "<|latent|>"
END_LATENT = "<|end-latent|>"
MARKERS = (START_LATENT, LATENT, END_LATENT)

KINDS = ("symbol", "word", "byte_pair")

SYMBOL_PATTERN = r"\S+"

SINGLE_BYTES = tuple(bytes([value]) for value in range(256))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A vocabulary and the rule that cuts text into it.

    Token ``i`` has the bytes ``tokens[i]``; the special tokens follow in their order. Ids are therefore exactly
    ``0 .. vocab_size - 1``.

    Attributes:
      kind: ``symbol`` (symbols between white space, which itself carries no token), ``word`` or ``byte_pair``
        (both lossless).
      pattern: the regular expression that cuts text into pieces, in tiktoken's dialect.
      tokens: the bytes of each ordinary token, by id; earlier ones are merged first within a piece that is no token.
      special_tokens: names of the special tokens, the three markers among them.
      eos_token: name of the end-of-sequence token: a special token, or one of the symbols.

    Raises:
      CoconutError: if the fields do not describe a usable vocabulary.
    """

    kind: str
    pattern: str
    tokens: tuple[bytes, ...] = dataclasses.field(repr=False)  # Too many to read in an error message.
    special_tokens: tuple[str, ...]
    eos_token: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise CoconutError(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")
        if not self.pattern:
            raise CoconutError("pattern: an empty pattern matches no text")
        if not self.tokens or b"" in self.tokens:
            raise CoconutError("tokens: there is none, or one is empty")
        for name, items in (("tokens", self.tokens), ("special_tokens", self.special_tokens)):
            if len(set(items)) < len(items):
                repeated = next(item for index, item in enumerate(items) if item in items[:index])
                raise CoconutError(f"{name}: {_printable(repeated)!r} stands there twice")
        for marker in MARKERS:
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
            for token in self.tokens:
                text = token.decode("utf-8", "replace")
                if text.split() != [text] or text.encode("utf-8") != token:
                    raise CoconutError(f"tokens: symbol {_printable(token)!r} holds white space or is no UTF-8")
        else:
            for value, byte in enumerate(SINGLE_BYTES):
                if byte not in self._ids:
                    raise CoconutError(f"tokens: a {self.kind} vocabulary needs every single byte; {value} is missing")
        try:
            _ = self.encoding  # Built now, so that a bad pattern is reported where it came from.
        except ValueError as error:
            raise CoconutError(f"pattern: {self.pattern!r} is no valid regular expression: {error}") from error

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens)}

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        return {name: len(self.tokens) + offset for offset, name in enumerate(self.special_tokens)}

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The `tiktoken.Encoding`, for code that wants one."""
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

    def encode(self, text: str) -> list[int]:
        """Cuts text into token ids, without EOS; the name of a special token is cut like any other text.

        Raises:
          CoconutError: for a symbol that a ``symbol`` vocabulary does not know, with the nearest that it does.
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
        return self.encoding.encode_ordinary(text)

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
        if token_id < len(self.tokens):
            return self.tokens[token_id]
        return self.special_tokens[token_id - len(self.tokens)].encode("utf-8")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 over everything that decides which ids a text gets."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode("ascii")).hexdigest()

    def _content(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
            "special_tokens": list(self.special_tokens),
        }

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
        for field in (*(field.name for field in dataclasses.fields(cls)), "fingerprint"):
            if field not in content:
                raise CoconutError(f"{where}: the field {field!r} is missing")
            values = content[field] if field.endswith("tokens") else [content[field]]
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                kind = "a list of strings" if field.endswith("tokens") else "a string"
                raise CoconutError(f"{where}: {field} must be {kind}, not {content[field]!r:.80}")
        try:
            tokenizer = cls(
                kind=content["kind"],
                pattern=content["pattern"],
                tokens=tuple(base64.b64decode(token, validate=True) for token in content["tokens"]),
                special_tokens=tuple(content["special_tokens"]),
                eos_token=content["eos_token"],
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


def _printable(token: bytes | str) -> str:
    text = token if isinstance(token, str) else token.decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
