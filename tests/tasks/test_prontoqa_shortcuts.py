"""Shortcuts of ProntoQA: by hand, and on the official questions."""

import pytest

from coconut.errors import CoconutError
from coconut.tasks import prontoqa
from coconut.tasks.ontology import read_question
from coconut.tasks.prontoqa_shortcuts import RULES, shortcut_accuracies, statistics
from coconut.types import Example


def question(context: str, query: str) -> str:
    return f"{context} True or false: {query}"


TWICE = "Impuses are wumpuses. Every rompus is red. Wumpuses are not red. Max is an impus."


@pytest.mark.parametrize(
    ("context", "query", "verdicts"),
    [
        (TWICE, "Max is red.", (False, True, True, True)),
        (TWICE, "Max is not red.", (True, False, False, True)),
        ("Impuses are red. Rompuses are not red. Max is shy.", "Max is red.", (None, True, True, True)),
        ("Impuses are red. Max is shy.", "Max is not shy.", (None, None, False, True)),
    ],
)
def test_rules_by_hand(context, query, verdicts):
    asked = read_question(question(context, query))
    assert tuple(rule(asked) for rule in RULES.values()) == verdicts
    example = Example(question=question(context, query), steps=(), answer="True")
    points = [{True: 1.0, False: 0.0, None: 0.5}[verdict] for verdict in verdicts]
    assert [accuracy.value for accuracy in shortcut_accuracies([example]).values()] == points


def test_statistics_by_hand():
    measured = statistics([Example(question=question(TWICE, "Max is not red."), steps=(), answer="True")])
    assert {name: dict(marginal.counts) for name, marginal in measured.items()} == {
        "facts and rules": {4: 1},
        "is-a facts and rules": {2: 1},
        "property rules": {2: 1},
        "concepts": {3: 1},
        "rules with the queried property": {2: 1},
        "negated property rules": {1: 1},
        "negated queries": {1: 1},
        "answers that are True": {1: 1},
    }


@pytest.mark.slow
def test_the_official_questions_need_no_deduction(shared_data):
    official = prontoqa.load(shared_data / "prontoqa_5hop_0shot_random.json")
    measured = statistics(official)
    assert {name: marginal.mean for name, marginal in measured.items() if len(marginal.counts) == 1} == {
        "facts and rules": 25,
        "is-a facts and rules": 13,
        "property rules": 12,
        "concepts": 14,
        "rules with the queried property": 2,
    }
    theirs, ours = shortcut_accuracies(official), shortcut_accuracies(prontoqa.generate(2000, seed=0))
    for name, accuracy in theirs.items():
        assert abs(accuracy.value - ours[name].value) < 1.6 * (accuracy.half_width + ours[name].half_width) + 1e-9
    assert theirs["the property's concept named in more sentences"].value == 1
    assert abs(theirs["always True"].value - 0.5) < 0.02


def test_nothing_to_measure_is_an_error():
    for function in (statistics, shortcut_accuracies):
        with pytest.raises(CoconutError, match="no examples"):
            function([])
        with pytest.raises(CoconutError, match="not a ProntoQA question"):
            function([Example(question="What is 2 + 2?", steps=(), answer="4")])
