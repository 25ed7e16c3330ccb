"""A tiny random model and one question for it."""

from typing import NamedTuple

import jax
import pytest

from coconut.model import Model, make_model
from coconut.models.config import DecoderConfig
from coconut.tasks import small_graphs
from coconut.tokenizers import SYMBOLS, TokenizedExample, Tokenizer, encode_example, symbol_tokenizer
from coconut.types import Example, Graph


class Subject(NamedTuple):
    model: Model
    tokenizer: Tokenizer
    example: Example
    tokenized: TokenizedExample
    graph: Graph


@pytest.fixture(scope="session")
def subject() -> Subject:
    example = small_graphs.generate(1, seed=3, config="e8")[0]
    assert example.graph is not None
    tokenizer = symbol_tokenizer(small_graphs.E8.vocabulary)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        max_positions=48,
        # Strong enough that a wrong position, a lost thought or a stray column changes the answer.
        embedding_stddev=0.5,
        kernel_stddev=0.5,
    )
    model = make_model(config, jax.random.key(0))
    return Subject(model, tokenizer, example, encode_example(tokenizer, example, SYMBOLS), example.graph)
