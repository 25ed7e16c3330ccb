"""Values against one token at a time, and what is made of values that were written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.analysis.probes import belief_over_nodes
from coconut.analysis.search_tree import (
    Candidates,
    candidates_at,
    cumulative_values,
    first_nodes,
    node_values,
    normalized,
    percentile_curves,
    text_values,
    values_by_height,
)
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.tasks.prosqa import parse_graph
from coconut.tokenizers import SYMBOLS, TEXT, word_tokenizer
from coconut.types import Example, Graph, Language, Latent
from tests.analysis.tiny_subject import asked_subject
from tests.tiny_models import quick_compilation, quick_jit, random_decoder

BARE = Example(question="Al is a lomp. Every lomp is a lu. Is Al a lu or wu?", steps=(), answer="Al is a lu.")
NAMES = parse_graph(BARE).symbols
QUESTION = Example(question=BARE.question, steps=(), answer=BARE.answer, graph=parse_graph(BARE))
"""Al -> lomp -> lu; "lomp" and "lu" begin alike."""
ROOM = 12
"""Tokens behind a block of thoughts in the slow version."""


@pytest.fixture(scope="module")
def asked():
    """A model that cuts every name into bytes."""
    tokenizer = word_tokenizer(["Is is a or Every Every ? .\n###"])
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        max_positions=96,
    )
    return asked_subject(Model(random_decoder(config), {"feedback": Identity()}), tokenizer, TEXT)


@functools.partial(quick_jit, static_argnames="schedule")
def next_token(decoder, schedule, tokens, valid):
    positions = jnp.arange(tokens.shape[1])[None]
    output = rollout(decoder, schedule, tokens=tokens, positions=positions, valid=valid)
    return jax.nn.softmax(decoder.unembed(output.last[0]))


def slow_value(asked, example: Example, thoughts: int, forced: list[int], name: list[int]) -> float:
    """Each token of a name by itself, behind a row of its own."""
    tokenizer, value = asked.tokenizer, 1.0
    prompt = [*asked.tokenize(example).question, tokenizer.start_latent_id, *[tokenizer.latent_id] * thoughts]
    spans = (Latent(thoughts),) if thoughts else ()
    schedule = (Language(len(prompt) - thoughts), *spans, Language(ROOM))
    for end, token in enumerate(name):
        behind = [tokenizer.end_latent_id, *forced, *name[:end]]
        row = [*prompt, *behind, *[tokenizer.eos_id] * (ROOM - len(behind))]
        valid = np.arange(len(row)) < len(prompt) + len(behind)
        value *= float(next_token(asked.model.decoder, schedule, jnp.asarray([row]), jnp.asarray([valid]))[token])
    return value


@pytest.mark.slow
def test_values_of_several_tokens_are_products_of_one_token_at_a_time(asked):
    names = {name: asked.tokenizer.encode(name) for name in NAMES}
    assert len(names["lomp"]) >= 3 and names["lomp"][0] == names["lu"][0]
    with quick_compilation():
        (found,) = node_values(asked, [QUESTION], (0, 2), forced="Every ", batch_size=4)
        encode = asked.tokenizer.encode
        forced = encode("Every")
        assert encode("Every lomp")[: len(forced)] == forced
        expected = [
            [slow_value(asked, QUESTION, k, forced, encode(f"Every {name}")[len(forced) :]) for name in NAMES]
            for k in (0, 2)
        ]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert (found < 0.2).all() and np.abs(found[0] / found[1] - 1).max() > 1e-2  # Thoughts matter to it.
    np.testing.assert_allclose(normalized(found).sum(1), 1)


@pytest.mark.slow
def test_values_of_one_token_are_the_beliefs_before_they_are_normalised(subject):
    model, tokenizer, example, tokenized, _ = subject
    asked = asked_subject(model, tokenizer, SYMBOLS)
    with quick_compilation():
        for forced in ("[A] ", ""):
            (values,) = node_values(asked, [example], range(3), forced=forced, batch_size=3)
            belief = belief_over_nodes(*asked.asked, example, tokenized, SYMBOLS, 2, forced=forced)
            np.testing.assert_allclose(normalized(values), belief, rtol=1e-4)
            assert (values.sum(1) < 0.99).all()  # Other tokens have a share, too.
        # Each question has rows of its own, and a batch that is not full changes nothing.
        both = node_values(asked, [example, example], (0, 2), batch_size=3)
        for own in both:
            np.testing.assert_allclose(own, values[[0, 2]], rtol=1e-5)
        step, answer = first_nodes(asked, example, (0, 2), batch_size=3)
        np.testing.assert_allclose(step, values[[0, 2]], rtol=1e-5)
        (prefix,) = text_values(asked, [example], [["[A]"]], (0, 2), batch_size=3)
        (behind,) = node_values(asked, [example], (0, 2), forced="[A] ", batch_size=3)
        np.testing.assert_allclose(answer, prefix * behind, rtol=1e-4)
        assert (answer.sum(1) + step.sum(1) <= 1).all()


def test_values_refuse(subject):
    model, tokenizer, example, *_ = subject
    asked = asked_subject(model, tokenizer, SYMBOLS)
    bare = Example(question=example.question, steps=(), answer="0")
    with pytest.raises(CoconutError, match="no graph to search"):
        node_values(asked, [bare], (0,))
    with pytest.raises(CoconutError, match="the tokens of '0' begin those of '0 1'"):
        text_values(asked, [bare], [["0", "0 1"]], (0,))
    with pytest.raises(CoconutError, match="the tokens of '' cannot be told"):
        text_values(asked, [bare], [[""]], (0,))
    with pytest.raises(CoconutError, match="texts of 0 questions do not fit 1"):
        text_values(asked, [bare], [], (0,))
    with pytest.raises(CoconutError, match=r"max_positions = 48: a question of 31 tokens, 17 thoughts .* need 49"):
        node_values(asked, [example], (17,))
    with pytest.raises(CoconutError, match="1 thoughts: the method writes this question without a block"):
        node_values(asked_subject(model, tokenizer, SYMBOLS, method="no_cot"), [example], (1,))


# --- Values written by hand -----------------------------------------------------------------------------------------

#   0 -> 1 -> 4 -> 6, 1 -> 3, 0 -> 2 -> 3, 2 -> 5 -> 7 -> 8, 9 -> 8 (another root); leaves 3, 6, 8; target 6.
GRAPH = Graph(
    symbols=tuple("abcdefghij"),
    edges=((0, 1), (1, 4), (4, 6), (1, 3), (0, 2), (2, 3), (2, 5), (5, 7), (7, 8), (9, 8)),
    root=0,
    target=6,
    negative=8,
)
VALUES = np.asarray([0.0, 0.6, 0.3, 0.1, 0.2, 0.4, 0.05, 0.0, 0.0, 0.9])


def test_candidates_are_the_nodes_of_a_level():
    assert candidates_at(GRAPH, VALUES, 0).nodes == (0,)
    first, second = candidates_at(GRAPH, VALUES, 1), candidates_at(GRAPH, VALUES, 2)
    assert (first.nodes, first.values.tolist(), first.leads) == ((1, 2), [0.6, 0.3], (True, False))
    assert (second.nodes, second.values.tolist(), second.leads) == ((3, 4, 5), [0.1, 0.2, 0.4], (False, True, False))
    assert candidates_at(GRAPH, VALUES, 3).leads == (True, False)
    assert candidates_at(GRAPH, VALUES, 5).nodes == ()
    with pytest.raises(CoconutError, match="3 values do not fit a graph of 10"):
        candidates_at(GRAPH, VALUES[:3], 1)


def test_cumulative_values_by_percentile():
    two = Candidates((1, 2), np.asarray([0.6, 0.3]), (True, False))
    three = Candidates((3, 4, 5), np.asarray([0.1, 0.2, 0.4]), (False, True, False))
    four = Candidates((3, 4, 5, 6), np.asarray([0.5, 0.1, 0.1, 0.3]), (False, True, False, False))
    sums = cumulative_values([two, three, four, Candidates((), np.zeros(0), ())])
    nan = np.nan
    np.testing.assert_allclose(sums, [[0.6, 0.9, nan], [0.4, 0.6, 0.7], [0.5, 0.8, 0.9], [nan, nan, nan]])
    # Of the two questions with three candidates, each curve sorted by itself.
    curves = percentile_curves(sums)
    np.testing.assert_allclose(curves.percentiles, [25, 75])
    np.testing.assert_allclose(curves.values, [[0.4, 0.5], [0.6, 0.8], [0.7, 0.9]])
    swapped = np.asarray([[0.1, 0.9], [0.2, 0.3], [0.15, 0.5]])
    np.testing.assert_allclose(percentile_curves(swapped).values, [[0.1, 0.15, 0.2], [0.3, 0.5, 0.9]])
    np.testing.assert_allclose(percentile_curves(swapped).percentiles, [100 / 6, 50, 500 / 6])
    assert percentile_curves(cumulative_values([two])).values.shape == (3, 0)
    with pytest.raises(CoconutError, match="top = 0"):
        cumulative_values([two], top=0)
    with pytest.raises(CoconutError, match="no questions"):
        cumulative_values([])


def test_values_by_both_heights():
    other = Graph(symbols=tuple("abcd"), edges=((0, 1), (0, 2), (2, 3)), root=0, target=3, negative=1)
    first = candidates_at(GRAPH, VALUES, 1)  # node 1: leads, heights 1 and 2; node 2: not, heights 1 and 3.
    second = candidates_at(other, np.asarray([0.0, 0.5, 0.2, 0.0]), 1)  # node 1: not, 0; node 2: leads, 1 and 1.
    by_shortest = values_by_height([GRAPH, other], [first, second], "shortest")
    right, wrong = by_shortest[True], by_shortest[False]
    assert (right.levels.tolist(), right.number.tolist(), right.questions.tolist()) == ([1], [2], [2])
    np.testing.assert_allclose(right.means, [0.4])
    # Two graphs: a resample has the one, the other, or both.
    np.testing.assert_allclose([right.low[0], right.high[0]], [0.2, 0.6])
    assert wrong.levels.tolist() == [0, 1]
    np.testing.assert_allclose(wrong.means, [0.5, 0.3])
    assert np.isnan(wrong.low).all() and np.isnan(wrong.high).all()  # One graph each.
    by_longest = values_by_height([GRAPH, other], [first, second], "longest")
    assert by_longest[True].levels.tolist() == [1, 2] and by_longest[False].levels.tolist() == [0, 3]
    np.testing.assert_allclose(by_longest[True].means, [0.2, 0.6])
    # Several candidates of one question count each, but are drawn together.
    twice = values_by_height([GRAPH, GRAPH], [first, candidates_at(GRAPH, VALUES, 2)], "shortest")
    assert (twice[False].number.tolist(), twice[False].questions.tolist()) == ([1, 1, 1], [1, 1, 1])
    with pytest.raises(CoconutError, match="1 graphs do not fit the candidates of 2"):
        values_by_height([GRAPH], [first, second], "shortest")
