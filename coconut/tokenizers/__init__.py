"""Text to token ids and back, without the network.

A `Tokenizer` is plain data (a pattern, the bytes of each token, the names of the special tokens) from which a
`tiktoken.Encoding` is built. Three constructors make one: `symbol_tokenizer`, `word_tokenizer` and
`byte_pair_tokenizer`; each adds an end-of-sequence token, which is also the padding, and the three markers of a
latent block. Text never turns into a marker: only the special ids, placed by the batching code, mean one.

`encode_example` is the one place where an example of a task becomes ids, by a `TextFormat`.
"""

from coconut.tokenizers.examples import (
    SYMBOLS,
    TEXT,
    TextFormat,
    TokenizedExample,
    encode_example,
    validate_ids,
)
from coconut.tokenizers.tokenizer import END_LATENT, KINDS, LATENT, MARKERS, START_LATENT, Tokenizer
from coconut.tokenizers.vocabularies import (
    SYMBOL_EOS,
    TEXT_EOS,
    byte_pair_tokenizer,
    symbol_tokenizer,
    word_tokenizer,
)

__all__ = [
    "END_LATENT",
    "KINDS",
    "LATENT",
    "MARKERS",
    "START_LATENT",
    "SYMBOLS",
    "SYMBOL_EOS",
    "TEXT",
    "TEXT_EOS",
    "TextFormat",
    "TokenizedExample",
    "Tokenizer",
    "byte_pair_tokenizer",
    "encode_example",
    "symbol_tokenizer",
    "validate_ids",
    "word_tokenizer",
]
