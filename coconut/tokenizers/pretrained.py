"""Tokenizers of published models: GPT-2, Llama 3, Qwen 2.5 and 3, SmolLM, and others of byte-level byte pairs.

Each becomes a `Tokenizer` with the three latent markers, either behind the model's last id or in the place of special
tokens that its makers left unused. Behind the last id the model's embedding may have to grow: GPT-2 has 50,257 rows
for as many ids, Llama 3 128,256. Qwen's embedding is larger than its tokenizer from the start (151,936 rows or more
for 151,665 ids), so its markers fit. `Tokenizer.vocab_size` is the number of rows that are needed.

Ids equal those of Hugging Face's library for text that spells no special token, with two known exceptions: its NFC is
that of Unicode 9, ours is Python's, so a combining mark younger than that may be ordered otherwise among others. And a
control character that a vocabulary has no token for, as SmolLM's has for some, is an error here, where that library
leaves it out.
"""

import base64
import itertools
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tiktoken

from coconut.errors import CoconutError
from coconut.tokenizers.settings import Settings, read_bytes, read_json, read_settings, with_settings
from coconut.tokenizers.tokenizer import MARKERS, Tokenizer
from coconut.tokenizers.tokenizer_json import (
    GPT2_PATTERN,
    Vocabulary,
    read_added_tokens,
    read_tokenizer_json,
    vocabulary_ids,
)

MarkerPlace = Literal["appended", "reserved"]
"""Where the latent markers get their ids: behind the last one, or on a model's reserved special tokens."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# Names as in the tokenizer.json of Llama 3.1 to 3.3, so that both files of a model give the same tokenizer. Llama 3.0
# called some of them reserved that have a use since; the ids of the others are the same.
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)

_RESERVED = re.compile(r"<\|reserved_special_token_(\d+)\|>")
# All texts that a pattern is tried on take a small part of a second together, unless it is made to take for ever.
_SECONDS = 20.0
# Every script's letters, digits, marks, spaces and punctuation begin below.
_PROBES = [chr(code) for code in range(0x3100)]


def load_tokenizer(path: str | Path, *, eos_token: str | None = None, markers: MarkerPlace = "appended") -> Tokenizer:
    """The tokenizer of a published model, from its files; nothing is downloaded.

    A folder is searched for ``tokenizer.json``; ``vocab.json`` and ``merges.txt`` (or ``encoder.json`` and
    ``vocab.bpe``, as OpenAI called them); ``tokenizer.model`` or ``original/tokenizer.model`` of Llama 3. A file is
    a ``tokenizer.json`` or a ``tokenizer.model``. A folder written from `huggingface_files` gives the same ids again.

    Args:
      path: the folder or the file.
      eos_token: name of the token that ends a sequence and pads; None for the one that ``tokenizer_config.json``,
        ``generation_config.json`` or ``config.json`` beside the vocabulary names (of several, the first).
      markers: ``appended`` puts the latent markers behind the last id, ``reserved`` on the first three
        ``<|reserved_special_token_N|>``. A vocabulary that has the markers keeps them where they are.

    Raises:
      CoconutError: a file is missing or malformed, declares something that is not honoured (another kind of model, a
        normalizer other than NFC, ...), or no end-of-sequence token is known. The message names file, field, value.
    """
    path = Path(path)
    try:
        file = path if path.is_file() else _find(path)
    except OSError as error:
        raise CoconutError(f"{path!s:.80}: cannot be looked at: {error.strerror}") from error
    # Meta's own file lies one folder below the settings.
    folder = file.parent.parent if file.parent.name == "original" else file.parent
    settings, default_eos = read_settings(folder), None
    if file.name in ("vocab.json", "encoder.json"):
        vocabulary, begin = _read_merges(file, settings)
        vocabulary = with_settings(vocabulary, settings, from_tokenizer_json=False, begin=begin)
    elif file.suffix == ".json":
        vocabulary = read_tokenizer_json(read_json(file, required=True), str(file), settings.added)
        vocabulary = with_settings(vocabulary, settings, from_tokenizer_json=True, begin=None)
    else:
        # `transformers` does not read this file: the special tokens are Meta's own, whatever lies beside it.
        vocabulary, default_eos = _read_ranks(file), "<|end_of_text|>"
    if eos_token is None:
        eos_token = _declared_eos(folder, settings, vocabulary) or default_eos
    if eos_token is None:
        raise CoconutError(
            f"{path}: no end-of-sequence token is known: neither tokenizer_config.json, generation_config.json nor "
            "config.json names one; pass eos_token"
        )
    return _tokenizer(vocabulary, eos_token, markers, str(file))


def gpt2_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """GPT-2's tokenizer.

    Args:
      path: a folder with its files (see `load_tokenizer`); None for what tiktoken has in its cache
        (``TIKTOKEN_CACHE_DIR``) or, if the network can be reached, downloads.

    Raises:
      CoconutError: it is nowhere to be had, or the folder's files are no good.
    """
    if path is not None:
        return load_tokenizer(path, eos_token="<|endoftext|>")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # Whatever the network, the cache or an incomplete installation raises.
        raise CoconutError(
            f"GPT-2's vocabulary is not in tiktoken's cache and cannot be downloaded ({type(error).__name__}: "
            f"{error!s:.200}). Fill the cache that TIKTOKEN_CACHE_DIR names, or pass a folder with vocab.json and "
            "merges.txt, or with tokenizer.json"
        ) from error
    # tiktoken's own pattern is an equivalent one that runs faster; ours is the published one, whatever the source.
    vocabulary = Vocabulary(ids=encoding._mergeable_ranks, special_ids=encoding._special_tokens, pattern=GPT2_PATTERN)
    return _tokenizer(vocabulary, "<|endoftext|>", "appended", "tiktoken's gpt2")


def _find(folder: Path) -> Path:
    """The file of a folder that holds the vocabulary."""
    pairs = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    single = (("tokenizer.model",), ("original/tokenizer.model",))
    for names in (*pairs, *single):
        if all((folder / name).is_file() for name in names):
            return folder / names[0]
    looked_for = ", ".join(" + ".join(names) for names in (*pairs, *single))
    missing = "holds no tokenizer" if folder.is_dir() else "there is no such file or folder"
    raise CoconutError(f"{folder}: {missing} (looked for {looked_for})")


def _read_merges(file: Path, settings: Settings) -> tuple[Vocabulary, str | None]:
    """A vocabulary from ``vocab.json`` and ``merges.txt``, and the token that its class puts before a text if told to.

    Which model's it is, ``tokenizer_class`` says, or else config.json.
    """
    config = read_json(file.parent / "config.json")
    model_class = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}.get(str(config.get("model_type")))
    kind = settings.fields.get("tokenizer_class") or config.get("tokenizer_class") or model_class or "GPT2Tokenizer"
    families = {
        "GPT2Tokenizer": (GPT2_PATTERN, "", "<|endoftext|>"),
        "Qwen2Tokenizer": (QWEN2_PATTERN, "NFC", None),
    }
    if not isinstance(kind, str) or kind.removesuffix("Fast") not in families:
        raise CoconutError(
            f"{settings.where}: tokenizer_class = {kind!r:.80}: of vocab.json and merges.txt only "
            f"{' and '.join(families)} are known"
        )
    pattern, normalization, begin = families[kind.removesuffix("Fast")]
    merges_file = file.with_name("merges.txt" if file.name == "vocab.json" else "vocab.bpe")
    lines = read_bytes(merges_file).decode("utf-8", "replace").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    ids = read_json(file, required=True)
    special, spelled = read_added_tokens(settings.added, normalization, settings.where)
    # What is neither a byte nor made by a merge was never cut from text: <|endoftext|> and its like.
    made = {line.replace(" ", "") for line in merges}
    special |= {token: token_id for token, token_id in ids.items() if len(token) > 1 and token not in made}
    vocabulary = Vocabulary(
        ids=vocabulary_ids(ids, merges, special, str(file)),
        special_ids=special,
        pattern=pattern,
        spelled=spelled,
        normalization=normalization,
    )
    return vocabulary, begin


def _read_ranks(file: Path) -> Vocabulary:
    """Llama 3's ``tokenizer.model``: a token in base 64 and its id on each line; the special tokens follow."""
    ids: dict[bytes, int] = {}
    # Not tiktoken.load: it keeps what it read by path, and would not see a file that has changed.
    for number, line in enumerate(read_bytes(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, token_id = line.split()
            ids[base64.b64decode(token, validate=True)] = int(token_id)
        except ValueError as error:
            raise CoconutError(
                f"{file}: line {number} is no token in base 64 and its id, as Llama 3 writes them "
                "(sentencepiece models are not supported)"
            ) from error
    special = {name: len(ids) + offset for offset, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    return Vocabulary(ids=ids, special_ids=special, pattern=LLAMA3_PATTERN, leading=LLAMA3_SPECIAL_TOKENS[:1])


def _declared_eos(folder: Path, settings: Settings, vocabulary: Vocabulary) -> str | None:
    if (name := settings.name("eos_token")) is not None:
        return name
    names = {token_id: name for name, token_id in vocabulary.special_ids.items()}
    for file in (folder / "generation_config.json", folder / "config.json"):
        declared = read_json(file).get("eos_token_id")
        token_id = declared[0] if isinstance(declared, list) and declared else declared
        if token_id is not None:
            if type(token_id) is not int or token_id not in names:
                raise CoconutError(f"{file}: eos_token_id = {declared!r:.80} is no special token of the vocabulary")
            return names[token_id]
    return None


def _tokenizer(vocabulary: Vocabulary, eos_token: str, markers: MarkerPlace, where: str) -> Tokenizer:
    special = _with_markers(vocabulary, eos_token, markers, where)
    by_id = {token_id: token for token, token_id in vocabulary.ids.items()}
    names = {token_id: name for name, token_id in special.items()}
    size = len(vocabulary.ids) + len(special)
    for token_id in range(size):
        if (token_id in by_id) == (token_id in names):
            state = "stands for two tokens" if token_id in by_id else "stands for no token"
            raise CoconutError(f"{where}: id {token_id} {state}; ids must be 0 .. {size - 1}")
    in_order = tuple(sorted(names))
    tokens = tuple(by_id[token_id] for token_id in sorted(by_id))
    try:
        tokenizer = Tokenizer(
            kind="byte_pair",
            pattern=vocabulary.pattern,
            splits=vocabulary.splits,
            tokens=tokens,
            special_tokens=tuple(names[token_id] for token_id in in_order),
            eos_token=eos_token,
            special_ids=() if in_order == tuple(range(len(tokens), size)) else in_order,
            spelled=vocabulary.spelled,
            leading=vocabulary.leading,
            normalization=vocabulary.normalization,
        )
    except CoconutError as error:
        raise CoconutError(f"{where}: {error}") from error
    end = time.thread_time() + _SECONDS  # of work: a machine with much else to do is no fault of the pattern
    patterns = "".join((*vocabulary.splits, vocabulary.pattern))
    for text in itertools.chain(_random_texts(patterns), _PROBES):
        if time.thread_time() > end:
            raise CoconutError(f"{where}: the pattern {patterns!r:.200} takes too long on texts as short as {text!r}")
        if not tokenizer.can_spell(text):
            continue
        try:
            tokenizer.encode(text)
        except CoconutError as error:
            raise CoconutError(f"{where}: {error}") from error
    return tokenizer


def _random_texts(pattern: str, count: int = 2000) -> Iterator[str]:
    """Short texts of letters, digits, marks, spaces and what the pattern itself is made of; always the same ones."""
    draw = random.Random(0)
    usual = "abstvmledrABZ éßЖ漢ひ한😀\u0301\u0915\u093f012345789٣²½'\u2019.,;-_#$(<|>\"\\ \t\n\r\u00a0\u3000\u200b\x00"
    own = "".join(dict.fromkeys(pattern))
    for _ in range(count):
        pool = draw.choice((usual, own, usual + own))
        few = draw.choices(pool, k=3)
        yield "".join(draw.choices(draw.choice((few, pool)), k=draw.randint(2, 8)))


def _with_markers(vocabulary: Vocabulary, eos_token: str, place: MarkerPlace, where: str) -> dict[str, int]:
    """The special tokens with the markers."""
    special = dict(vocabulary.special_ids)
    missing = [marker for marker in MARKERS if marker not in special]
    if place == "appended":
        first = 1 + max((*vocabulary.ids.values(), *special.values()), default=-1)
        return special | {marker: first + offset for offset, marker in enumerate(missing)}
    reserved = {int(match[1]): name for name in special if name != eos_token and (match := _RESERVED.fullmatch(name))}
    if len(reserved) < len(missing):
        raise CoconutError(
            f"{where}: markers = 'reserved': there are {len(reserved)} special tokens named "
            f"<|reserved_special_token_N|>, and {len(missing)} are needed"
        )
    for marker, number in zip(missing, sorted(reserved), strict=False):
        special[marker] = special.pop(reserved[number])
    return special
