"""Results among top tokens, of thoughts made by hand."""

import numpy as np
import pytest

from coconut.analysis.gold_results import gold_results, gold_traces, result_tokens
from coconut.errors import CoconutError
from coconut.tokenizers import word_tokenizer
from coconut.types import Example, Graph, Think


def example(*steps: str | Think, answer: str = "5", graph: Graph | None = None) -> Example:
    return Example(question="?", steps=steps, answer=answer, graph=graph)


def test_results_of_steps():
    assert gold_results(example("<<48/2=24>>", Think(2), "<<24+1,000=1,024>>", "<<1024/4=256>>")) == ("24", "1024")
    assert gold_results(example("<<1+2=3>>", "<<3+2=5>>", "<<5*1=5>>", "<<5=5>>")) == ("3",)
    assert gold_results(example("<<1+2=3>>", "<<2+1=3>>", "no result", "<<3+2=5>>")) == ("3",)
    assert gold_results(example("<<1+2=3>>")) == () == gold_results(example())
    graph = Graph(symbols=("Tom", "lempus", "wumpus", "gorpus"), edges=(), root=0, target=3, negative=1)
    steps = ("Tom is a lempus.", "Every lempus is a wumpus.", "Every wumpus is a gorpus.")
    assert gold_results(example(*steps, answer="gorpus", graph=graph)) == ("lempus", "wumpus")


def test_a_result_is_one_token_or_not_counted():
    tokenizer = word_tokenizer(["24 24"])
    alone, spaced = tokenizer.encode("24"), tokenizer.encode(" 24")
    assert len(alone) == len(spaced) == 1 and alone != spaced
    assert result_tokens(tokenizer, ["24", "77777"]) == (frozenset({*alone, *spaced}), frozenset())


# Five tokens are results; 0 and 9 none. The first three questions have two thoughts, the fourth one, the fifth none.
TOPS = [
    np.asarray([[1, 0], [2, 0]]),
    np.asarray([[0, 9], [9, 3]]),
    np.asarray([[0, 9], [0, 9]]),
    np.asarray([[9, 4]]),
    np.zeros((0, 2), int),
]
GOLDS = [
    [frozenset({1}), frozenset({2, 12})],
    [frozenset({13, 3}), frozenset({5})],
    [frozenset({5})],
    [frozenset({4}), frozenset()],
    [frozenset({1})],
]
RIGHT = np.asarray([True, True, False, True, True])


def test_results_are_found_where_they_are():
    found = gold_traces(TOPS, GOLDS, RIGHT, resamples=10)
    own = found["all"].own
    # The last question has no thoughts, and the fourth question's second result no token.
    assert (own.complete.share, own.complete.number) == (0.5, 4)
    assert own.complete.low < 0.5 < own.complete.high
    assert own.results.number == 4 and own.results.mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    np.testing.assert_array_equal(own.by_thought.number, [[4, 2], [3, 2]])
    np.testing.assert_allclose(own.by_thought.mean, [[2 / 4, 0], [1 / 3, 1 / 2]])
    assert (found["right"].own.complete.share, found["right"].own.complete.number) == (2 / 3, 3)
    assert (found["wrong"].own.complete.share, found["wrong"].own.complete.number) == (0.0, 1)
    none = gold_traces(TOPS, GOLDS, np.ones(5, bool), resamples=10)["wrong"].own
    assert none.complete.number == none.results.number == 0 and np.isnan(none.complete.share)


def test_the_control_finds_what_is_likely_whatever_is_asked():
    # Every thought holds tokens 1 and 2: everybody's results are found with everybody. Without them only one's own are.
    golds = [[frozenset({1})], [frozenset({2})]] * 20
    always = gold_traces([np.asarray([[1, 2]])] * 40, golds, np.ones(40, bool), resamples=10)["all"]
    own = gold_traces([np.asarray([list(gold[0])]) for gold in golds], golds, np.ones(40, bool), resamples=10)["all"]
    assert always.own.complete.share == always.control.complete.share == own.own.complete.share == 1.0
    assert own.control.complete.share == 0.0
    # Who got the same result from another question has no control.
    assert 0 < own.control.complete.number < 40 == own.own.complete.number
    answers = [frozenset({2}), frozenset({1})] * 20
    assert (
        gold_traces([np.asarray([[1]])] * 40, golds, np.ones(40, bool), answers=answers)["all"].control.complete.number
        == 0
    )


def test_other_questions_are_refused():
    with pytest.raises(CoconutError, match="5 questions' thoughts, 4 results, 5 answers"):
        gold_traces(TOPS, GOLDS[:4], RIGHT)
    with pytest.raises(CoconutError, match="there are no questions"):
        gold_traces([], [], np.zeros(0, bool))
