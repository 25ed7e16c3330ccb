"""Probes against the same numbers computed the obvious way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.analysis.probes import belief_over_nodes, node_token_ids, thought_neighbors
from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.latent.rollout import rollout
from coconut.methods import get_method
from coconut.tokenizers import SYMBOLS, TEXT, word_tokenizer
from coconut.types import Graph, Language, Latent
from tests.tiny_pages import placing_at

MAX_THOUGHTS = 2


@functools.partial(jax.jit, static_argnames="schedule")
def next_token(decoder, schedule, tokens):
    positions, valid = jnp.arange(tokens.shape[1])[None], jnp.ones(tokens.shape, bool)
    output = rollout(decoder, schedule, tokens=tokens, positions=positions, valid=valid)
    return jax.nn.softmax(decoder.unembed(output.last[0]))


def direct_belief(subject, method: str, count: int, forced: list[int]) -> np.ndarray:
    """One row, unpadded, through the rollout of training."""
    tokenizer = subject.tokenizer
    prompt, suffix = [*subject.tokenized.question, tokenizer.start_latent_id], [tokenizer.end_latent_id, *forced]
    tokens = jnp.asarray([[*prompt, *[tokenizer.latent_id] * count, *suffix]])
    if method == "pause" or not count:
        schedule = (Language(tokens.shape[1]),)
    else:
        schedule = (Language(len(prompt)), Latent(count), Language(len(suffix)))
    probabilities = np.asarray(next_token(subject.model.decoder, schedule, tokens), np.float64)
    nodes = probabilities[[tokenizer.encode(symbol)[0] for symbol in subject.graph.symbols]]
    return nodes / nodes.sum()


def belief(subject, method: str, **options) -> np.ndarray:
    model, tokenizer, example, tokenized, _ = subject
    options = {"max_thoughts": MAX_THOUGHTS, **options}
    placing = placing_at(tokenizer, CurriculumConfig(), 0)
    return belief_over_nodes(model, tokenizer, get_method(method), placing, example, tokenized, SYMBOLS, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "forced"), [("coconut", None), ("coconut", ""), ("pause", "")])
def test_belief_equals_a_rollout_of_each_number_of_thoughts(subject, method, forced):
    found = belief(subject, method, forced=forced)
    assert found.shape == (MAX_THOUGHTS + 1, len(subject.graph.symbols))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    ids = subject.tokenizer.encode("[A]" if forced is None else forced)
    expected = np.stack([direct_belief(subject, method, count, ids) for count in range(MAX_THOUGHTS + 1)])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # Otherwise the comparison could not tell one number of thoughts from another.
    assert np.abs(np.diff(expected, axis=0)).max(1).min() > 1e-3


def test_belief_refuses_what_it_cannot_read(subject):
    model, tokenizer, example, tokenized, _ = subject
    method, placing = get_method("coconut"), placing_at(tokenizer, CurriculumConfig(), 0)
    with pytest.raises(CoconutError, match="no graph"):
        bare = dataclasses.replace(example, graph=None)
        belief_over_nodes(model, tokenizer, method, placing, bare, tokenized, SYMBOLS, 1)
    with pytest.raises(CoconutError, match="1 thoughts: the method writes this question without a block of thoughts"):
        belief(subject, "no_cot")
    assert belief(subject, "no_cot", max_thoughts=0).shape == (1, len(subject.graph.symbols))
    with pytest.raises(CoconutError, match="max_thoughts = -1"):
        belief(subject, "coconut", max_thoughts=-1)
    # 24 edge tokens, 6 of the frame, 2 markers, and the answer's prefix.
    with pytest.raises(CoconutError, match=r"max_positions = 48: a question of 31 tokens, 16 thoughts .* need 49"):
        belief(subject, "coconut", max_thoughts=16)
    with pytest.raises(CoconutError, match=r"'lempus' is \d tokens"):
        graph = Graph(symbols=("lempus",), edges=(), root=0, target=0, negative=0)
        node_token_ids(word_tokenizer(TEXT.texts([example])), graph)


def test_neighbors_are_inner_products_and_cosines(subject):
    model, tokenizer, *_ = subject
    ids = node_token_ids(tokenizer, subject.graph)
    table = np.asarray(model.decoder.tokens.embedding[...])
    thoughts = np.stack([3 * table[ids[4]], -table[ids[0]]])
    expected = [[np.dot(thought, table[node]) for node in ids] for thought in thoughts]
    np.testing.assert_allclose(thought_neighbors(model, thoughts, ids), expected, rtol=1e-5)
    cosine = thought_neighbors(model, thoughts, ids, measure="cosine")
    np.testing.assert_allclose([cosine[0, 4], cosine[1, 0]], [1, -1], rtol=1e-5)
    assert np.abs(cosine).max() <= 1 + 1e-5
    with pytest.raises(CoconutError, match="out of range"):
        thought_neighbors(model, thoughts, [tokenizer.vocab_size])
