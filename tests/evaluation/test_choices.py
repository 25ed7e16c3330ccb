"""Choosing between two options: against one option at a time, unpadded, by the decoder's own log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.choices import choose, with_other_option
from coconut.latent.rollout import rollout
from coconut.methods import get_method
from coconut.model import make_model
from coconut.models.config import DecoderConfig
from coconut.tasks import get_task
from coconut.tokenizers import SYMBOLS, encode_example, symbol_tokenizer
from coconut.types import Example, Language, Latent
from tests.tiny_pages import placing_at


def test_the_other_option_replaces_the_target_alone() -> None:
    text = get_task("prosqa").generate(5, 0)
    for example in text:
        assert example.graph is not None
        other = with_other_option(example).answer
        root, negative = (example.graph.symbols[node] for node in (example.graph.root, example.graph.negative))
        assert other == f"{root} is a {negative}."
    with pytest.raises(CoconutError, match="graph"):
        with_other_option(Example(question="1 + 1", steps=(), answer="2"))


@pytest.mark.slow
def test_choices_are_those_of_one_option_at_a_time() -> None:
    examples = get_task("small_graphs").generate(7, 0, config="e8")
    symbols = sorted({symbol for example in examples for symbol in f"{example.question} [A]".split()})
    tokenizer = symbol_tokenizer(symbols)
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=16, num_heads=2, max_positions=64)
    model = make_model(config, jax.random.key(3))
    schedule = (Language(31), Latent(2), Language(4, 3))

    @jax.jit
    def log_probability(tokens):
        positions = jnp.arange(tokens.shape[1])[None]
        valid = jnp.ones(tokens.shape, bool)
        output = rollout(model.decoder, schedule, tokens=tokens, positions=positions, valid=valid)
        scores = jax.nn.log_softmax(model.decoder.unembed(output.predictors))
        return jnp.take_along_axis(scores, tokens[:, -3:, None], -1).sum()

    expected = 0
    for example in examples:
        scores = []
        for option in (example, with_other_option(example)):
            encoded = encode_example(tokenizer, option, SYMBOLS)
            start, end = [tokenizer.start_latent_id], [tokenizer.end_latent_id]
            row = np.concatenate([encoded.question, start, [tokenizer.latent_id] * 2, end, encoded.answer])
            scores.append(float(log_probability(jnp.asarray(row[None], jnp.int32))))
        expected += scores[0] > scores[1]
    assert 0 < expected < len(examples)
    method, placing = get_method("coconut"), placing_at(tokenizer, CurriculumConfig(max_latent_stage=2), 2)
    # A batch is never larger than what there is to choose between.
    for thoughts, batch_size in ((2, 4), (None, 10**12)):
        chosen = choose(model, tokenizer, method, placing, examples, SYMBOLS, thoughts=thoughts, batch_size=batch_size)
        assert chosen.sum() == expected
