"""Text to token ids and back, without the network.

A `Tokenizer` is plain data (a pattern, the bytes of each token, the names of the special tokens) from which a
`tiktoken.Encoding` is built. Three constructors make one of a task's own text: `symbol_tokenizer`, `word_tokenizer`
and `byte_pair_tokenizer`. `load_tokenizer` and `gpt2_tokenizer` read those of published models, and
`huggingface_files` writes any of them for Hugging Face's libraries. Each has an end-of-sequence token, which is also
the padding, and the three markers of a latent block. Text never turns into a marker: only the special ids, placed by
the batching code, mean one.

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
from coconut.tokenizers.export import huggingface_files
from coconut.tokenizers.pretrained import MarkerPlace, gpt2_tokenizer, load_tokenizer
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
    "MarkerPlace",
    "TextFormat",
    "TokenizedExample",
    "Tokenizer",
    "byte_pair_tokenizer",
    "encode_example",
    "gpt2_tokenizer",
    "huggingface_files",
    "load_tokenizer",
    "symbol_tokenizer",
    "validate_ids",
    "word_tokenizer",
]
