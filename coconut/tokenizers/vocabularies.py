"""Vocabularies made here, of the symbols, words or byte pairs of a task's own text."""

import re
from collections.abc import Iterable, Iterator, Sequence

from coconut.errors import CoconutError
from coconut.tokenizers.byte_level import BYTE_OF, to_bytes
from coconut.tokenizers.tokenizer import (
    MARKERS,
    SINGLE_BYTES,
    SYMBOL_PATTERN,
    Tokenizer,
    utf8,
    without_surrogates,
)

SYMBOL_EOS = "<eos>"
TEXT_EOS = "<|endoftext|>"

# A word or a run of punctuation, each with the one space before it; any other white space alone. Every character
# matches one alternative, which is what makes the round trip lossless: tiktoken drops what its pattern skips.
_TEXT_PATTERN = r" ?\w+| ?[^\w\s]+|\s"


def symbol_tokenizer(symbols: Sequence[str]) -> Tokenizer:
    """A vocabulary of symbols that text separates by white space.

    Args:
      symbols: each symbol once; their ids are ``0, 1, ...`` in this order. ``<eos>``, if it is among them, is the EOS
        token, and text may then hold it; otherwise one is added that text cannot hold.

    Returns:
      The tokenizer; the markers follow the symbols.

    Raises:
      CoconutError: for no symbols, a repeated one, a marker, or one that is empty or holds white space.
    """
    if isinstance(symbols, str):
        raise CoconutError(f"symbols: pass a list of symbols, not one text: {symbols!r:.80}")
    return Tokenizer(
        kind="symbol",
        pattern=SYMBOL_PATTERN,
        tokens=tuple(utf8(symbol) for symbol in symbols),
        special_tokens=MARKERS if SYMBOL_EOS in symbols else (SYMBOL_EOS, *MARKERS),
        eos_token=SYMBOL_EOS,
    )


def word_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """A vocabulary of the words of a corpus.

    Each word and each run of punctuation, together with the single space before it if there is one, is one token, and
    so is a newline. What the corpus does not hold is spelled in known parts and single bytes, so any text
    survives the round trip.

    Args:
      corpus: texts as they will be encoded (see `TextFormat.texts`); their order does not matter.

    Raises:
      CoconutError: if the corpus is empty.
    """
    pieces = {piece for text in _texts(corpus) for piece in re.findall(_TEXT_PATTERN, text)}
    words = {piece.encode("utf-8") for piece in pieces}.difference(SINGLE_BYTES)
    return _text_tokenizer("word", (*SINGLE_BYTES, *sorted(words)))


def byte_pair_tokenizer(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-pair vocabulary trained on a corpus; the same corpus and size give the same vocabulary.

    Args:
      corpus: texts as they will be encoded (see `TextFormat.texts`).
      vocab_size: number of ids wanted, special tokens included. A small corpus may yield fewer.

    Raises:
      CoconutError: if the corpus is empty, ``vocab_size`` cannot hold the single bytes and the special tokens, or the
        package ``tokenizers`` is not installed.
    """
    try:
        import tokenizers as hf  # Lazy: only training needs it, using the result does not.
    except ImportError as error:
        raise CoconutError(
            "training a byte-pair vocabulary needs the package 'tokenizers': pip install 'coconut-jax[hf]'"
        ) from error

    smallest = len(SINGLE_BYTES) + len(MARKERS) + 1
    if vocab_size < smallest:
        raise CoconutError(f"vocab_size must be at least {smallest} (256 bytes and the special tokens): {vocab_size}")
    trained = hf.Tokenizer(hf.models.BPE())
    trained.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(_TEXT_PATTERN), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(BYTE_OF)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS) - 1, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(_texts(corpus), trainer)

    # The library's ids are the order in which tokens were made, which is tiktoken's rank.
    vocabulary = trained.get_vocab()
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    return _text_tokenizer("byte_pair", tuple(to_bytes(token) for token in in_order))


def _texts(corpus: Iterable[str]) -> Iterator[str]:
    if isinstance(corpus, str):
        raise CoconutError("corpus: pass a list of texts, not one text")
    empty = True
    for text in corpus:
        empty = empty and not text
        yield without_surrogates(text)
    if empty:
        raise CoconutError("corpus: there is no text to make a vocabulary from")


def _text_tokenizer(kind: str, tokens: tuple[bytes, ...]) -> Tokenizer:
    return Tokenizer(
        kind=kind, pattern=_TEXT_PATTERN, tokens=tokens, special_tokens=(TEXT_EOS, *MARKERS), eos_token=TEXT_EOS
    )
