"""Interventions on thoughts: against one question at a time, unpadded columns, every pass over the whole row."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer, answer_questions, thoughts_of_questions
from coconut.evaluation.choices import choose
from coconut.evaluation.interventions import (
    ALTERATIONS,
    Surroundings,
    at_thoughts,
    check_interventions,
    mean_thoughts,
    without_directions,
)
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.methods import METHODS
from coconut.methods.method import Method
from coconut.tokenizers import SYMBOLS
from tests.one_question_at_a_time import (
    COUNTS,
    EXAMPLES,
    MODEL,
    PLACING,
    QUESTIONS,
    SETTINGS,
    TOKENIZED,
    TOKENIZER,
    slow_answer,
    slow_choice,
)
from tests.tiny_models import quick_compilation

CHANGING = ("zero", "noise", "mean", "mean_of_all", "other", "permuted", "repeated")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def answered(inputs: Sequence[np.ndarray] | None, method: Method = METHODS["coconut"]) -> list[Answer]:
    return list(answer_questions(MODEL, TOKENIZER, method, PLACING, TOKENIZED, SETTINGS, inputs=inputs))


@pytest.fixture(scope="module")
def plain(compiled_quickly: None) -> list[Answer]:
    return answered(None)


def thoughts_of(answers: Sequence[Answer]) -> list[np.ndarray]:
    return [answer.thought_inputs for answer in answers if answer.thought_inputs is not None]


def altered(name: str, thoughts: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    return ALTERATIONS[name](thoughts, Surroundings(questions=QUESTIONS, mean=mean_thoughts(thoughts), seed=3))


@pytest.mark.parametrize("think", (OneByOne(), pytest.param(Sweeps(count=1), marks=pytest.mark.slow)))
def test_what_is_intact_is_answered_as_before(think: Thinker, plain: list[Answer]) -> None:
    method = dataclasses.replace(METHODS["coconut"], think=lambda options: think)
    plain = plain if think == OneByOne() else answered(None, method)
    thoughts = thoughts_of(plain)
    assert [len(own) for own in thoughts] == COUNTS
    again = answered(thoughts, method)
    for before, after in zip(plain, again, strict=True):
        kept = dataclasses.asdict(after) | {"thought_inputs": None}
        assert kept == dataclasses.asdict(before) | {"thought_inputs": None}
        np.testing.assert_array_equal(before.thought_inputs, after.thought_inputs)
    # Whoever wants the thoughts alone gets the same ones.
    alone = thoughts_of_questions(MODEL, TOKENIZER, method, PLACING, TOKENIZED, SETTINGS)
    for first, second in zip(thoughts, alone, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.slow
def test_what_is_intact_is_chosen_as_before(plain: list[Answer]) -> None:
    chosen = [
        choose(MODEL, TOKENIZER, METHODS["coconut"], PLACING, EXAMPLES, SYMBOLS, inputs=inputs, batch_size=4)
        for inputs in (None, thoughts_of(plain))
    ]
    assert chosen[0].tolist() == chosen[1].tolist() and 0 < chosen[0].sum() < len(EXAMPLES)


@pytest.mark.parametrize("name", ("zero", "other", "permuted"))
def test_answers_and_choices_are_those_of_one_question_at_a_time(name: str, plain: list[Answer]) -> None:
    thoughts = thoughts_of(plain)
    inputs = [own if new is None else new for own, new in zip(thoughts, altered(name, thoughts), strict=True)]
    texts = [answer.text for answer in answered(inputs)]
    assert texts == [slow_answer(example, own) for example, own in zip(TOKENIZED, inputs, strict=True)]
    assert texts != [answer.text for answer in plain]
    chosen = choose(MODEL, TOKENIZER, METHODS["coconut"], PLACING, EXAMPLES, SYMBOLS, inputs=inputs, batch_size=4)
    assert chosen.tolist() == [slow_choice(index, own) for index, own in enumerate(inputs)]


def test_each_alteration_is_what_it_says(plain: list[Answer]) -> None:
    thoughts = thoughts_of(plain)
    results = {name: altered(name, thoughts) for name in CHANGING}
    for name, result in results.items():
        least = 2 if name in ("permuted", "repeated") else 1
        assert [new is not None for new in result] == [count >= least for count in COUNTS], name
        for own, new in zip(thoughts, result, strict=True):
            if new is not None:
                assert (new.shape, new.dtype) == (own.shape, own.dtype)
                assert not np.array_equal(new, own)
        # The seed decides.
        again = altered(name, thoughts)
        assert all(np.array_equal(a, b) for a, b in zip(result, again, strict=True) if a is not None and b is not None)
    norm = lambda x: np.linalg.norm(x, axis=-1)
    for index, own in enumerate(thoughts):
        new = {name: result[index] for name, result in results.items()}
        if new["zero"] is not None:
            assert not new["zero"].any()
            assert new["noise"] is not None and new["mean"] is not None and new["mean_of_all"] is not None
            np.testing.assert_allclose(norm(new["noise"]), norm(own), rtol=1e-5)
            for thought in new["mean_of_all"]:
                np.testing.assert_allclose(thought, sum(x.sum(0) for x in thoughts) / sum(COUNTS), rtol=1e-5, atol=1e-6)
            for k, thought in enumerate(new["mean"]):
                expected = sum(other[k] for other in thoughts if len(other) > k) / sum(count > k for count in COUNTS)
                np.testing.assert_allclose(thought, expected, rtol=1e-5, atol=1e-6)
        if new["repeated"] is not None:
            np.testing.assert_array_equal(new["repeated"], own[[0, *range(len(own) - 1)]])
        if new["permuted"] is not None:
            assert sorted(map(tuple, new["permuted"].tolist())) == sorted(map(tuple, own.tolist()))


def test_some_thoughts_are_altered_alone_where_there_are_all_of_them(plain: list[Answer]) -> None:
    thoughts = thoughts_of(plain)
    surroundings = Surroundings(questions=QUESTIONS, mean=mean_thoughts(thoughts), seed=3)
    for name in CHANGING:
        for numbers in ((2,), (1, 3)):
            found = at_thoughts(ALTERATIONS[name], numbers)(thoughts, surroundings)
            whole = ALTERATIONS[name](thoughts, surroundings)
            places = np.asarray(numbers) - 1
            for own, new, all_altered in zip(thoughts, found, whole, strict=True):
                if len(own) <= places.max() or (name == "permuted" and len(numbers) == 1):
                    assert new is None
                    continue
                assert new is not None and all_altered is not None
                others = np.delete(np.arange(len(own)), places)
                np.testing.assert_array_equal(new[others], own[others])
                # In another order among themselves: two can only change places.
                expected = own[places[::-1]] if name == "permuted" else all_altered[places]
                np.testing.assert_array_equal(new[places], expected)
    # Before the first one there is none that could be repeated.
    assert not any(new is not None for new in at_thoughts(ALTERATIONS["repeated"], (1,))(thoughts, surroundings))


def test_thoughts_lose_their_part_in_some_directions(plain: list[Answer]) -> None:
    thoughts = thoughts_of(plain)
    directions = np.random.default_rng(0).standard_normal((2, thoughts[0].shape[1]))
    directions[1] += directions[0]
    for own, new in zip(
        thoughts, without_directions(directions)(thoughts, Surroundings(questions=QUESTIONS)), strict=True
    ):
        if new is None:
            assert not len(own)
            continue
        np.testing.assert_allclose(new @ directions.T, 0, atol=1e-5)
        # What was taken lies in them.
        coefficients = np.linalg.lstsq(directions.T, (own - new).T)[0]
        np.testing.assert_allclose(directions.T @ coefficients, (own - new).T, atol=1e-5)
    with pytest.raises(CoconutError, match=r"directions of the lengths \[0.0\]: each must be finite, and none zero"):
        without_directions(np.zeros((1, 4)))


def test_nobody_gets_the_thoughts_of_the_same_question() -> None:
    for seed in range(20):
        questions = list("aabcdefghij")
        thoughts = [np.full((2, 1), index, np.float32) for index in range(len(questions))]
        given = ALTERATIONS["other"](thoughts, Surroundings(questions=questions, seed=seed))
        donors = [int(new[0, 0]) for new in given if new is not None]
        # Each gives and gets once.
        assert sorted(donors) == list(range(len(questions)))
        assert all(questions[donor] != own for donor, own in zip(donors, questions, strict=True))
    # Where most are one question, some of them get nothing.
    most = ALTERATIONS["other"](thoughts[:3], Surroundings(questions=["a", "a", "b"], seed=0))
    assert sum(new is None for new in most) == 1
    alone = ALTERATIONS["other"](thoughts[:1], Surroundings(questions=["a"]))
    assert alone == [None]


def test_what_cannot_be_altered_is_said(plain: list[Answer]) -> None:
    with pytest.raises(CoconutError, match="unknown intervention: 'zeros'; did you mean 'zero'"):
        check_interventions(["zeros"])
    thoughts = thoughts_of(plain)
    with pytest.raises(CoconutError, match="feeds no thoughts back"):
        thoughts_of_questions(MODEL, TOKENIZER, METHODS["cot"], PLACING, TOKENIZED, SETTINGS)
    with pytest.raises(CoconutError, match="no question of the validation split has one"):
        mean_thoughts([np.zeros((0, 4), np.float32)])
    # A question with more thoughts than any of those the mean is taken from.
    means = mean_thoughts(thoughts)
    short = Surroundings(questions=QUESTIONS, mean=means._replace(at_position=means.at_position[:2]))
    assert [new is not None for new in ALTERATIONS["mean"](thoughts, short)] == [0 < count < 3 for count in COUNTS]
