"""Interventions on thoughts: against one question at a time, unpadded columns, every pass over the whole row."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions, thoughts_of_questions
from coconut.evaluation.choices import choose, with_other_option
from coconut.evaluation.interventions import ALTERATIONS, Surroundings, check_interventions, mean_thoughts
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.methods import METHODS
from coconut.methods.method import Method
from coconut.model import Model
from coconut.tasks import get_task
from coconut.tokenizers import SYMBOLS, TokenizedExample, encode_example, symbol_tokenizer
from tests.tiny_models import GPT2_STYLE, quick_compilation, quick_jit, random_decoder
from tests.tiny_pages import placing_at

# Questions of 3, 2, 1 and no steps, and so of as many thoughts; two of them are the same question.
EXAMPLES = [
    dataclasses.replace(example, steps=example.steps[: 3 - index % 4])
    for index, example in enumerate(get_task("small_graphs").generate(14, 0, config="e8"))
]
EXAMPLES[4] = EXAMPLES[0]
COUNTS = [len(example.steps) for example in EXAMPLES]
QUESTIONS = [example.question for example in EXAMPLES]
TOKENIZER = symbol_tokenizer(sorted({symbol for x in EXAMPLES for symbol in f"{x.question} [A]".split()}))
TOKENIZED = [encode_example(TOKENIZER, example, SYMBOLS) for example in EXAMPLES]
CONFIG = dataclasses.replace(GPT2_STYLE, vocab_size=TOKENIZER.vocab_size, num_layers=1, max_positions=64)
# Attention and MLPs are strong, so that other thoughts give other answers.
STRONG = lambda path, leaf: 4 * leaf if ".kernel" in jax.tree_util.keystr(path) else leaf
DECODER = jax.tree_util.tree_map_with_path(STRONG, random_decoder(CONFIG, seed=3))
MODEL = Model(DECODER, {"feedback": Identity()})
NEW_TOKENS = 3
SETTINGS = AnswerConfig(batch_size=4, sampling=SamplingConfig(max_new_tokens=NEW_TOKENS))
PLACING = placing_at(TOKENIZER, CurriculumConfig(max_latent_stage=3, pad_latent_to_max=False), 4)
CHANGING = ("zero", "noise", "mean", "other", "permuted")


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


@quick_jit
def logits_of(embedded: jax.Array, length: jax.Array) -> jax.Array:
    """Of a row whose first columns are used."""
    columns = jnp.arange(embedded.shape[0])[None]
    hidden, _ = MODEL.decoder.trunk(embedded[None], positions=columns, valid=columns < length, past=())
    return MODEL.decoder.unembed(hidden)[0]


def embedded(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(MODEL.decoder.tokens.embedding[...])[np.asarray(ids, int)]


def row_of(example: TokenizedExample, inputs: np.ndarray) -> np.ndarray:
    markers = embedded([TOKENIZER.start_latent_id]), embedded([TOKENIZER.end_latent_id])
    return np.concatenate([embedded(example.question), markers[0], inputs, markers[1]])


def logits_behind(row: np.ndarray) -> np.ndarray:
    padded = np.zeros((CONFIG.max_positions, CONFIG.embed_dim), np.float32)
    padded[: len(row)] = row
    return np.asarray(logits_of(padded, len(row)))[: len(row)]


def slow_answer(example: TokenizedExample, inputs: np.ndarray) -> str:
    row, written = row_of(example, inputs), []
    for _ in range(NEW_TOKENS):
        token = int(logits_behind(row)[-1, : TOKENIZER.vocab_size].argmax())
        if token == TOKENIZER.eos_id:
            break
        written.append(token)
        row = np.concatenate([row, embedded([token])])
    return TOKENIZER.decode(written)


def slow_choice(index: int, inputs: np.ndarray) -> bool:
    scores = []
    for option in (EXAMPLES[index], with_other_option(EXAMPLES[index])):
        encoded = encode_example(TOKENIZER, option, SYMBOLS)
        row = np.concatenate([row_of(encoded, inputs), embedded(encoded.answer)])
        likely = jax.nn.log_softmax(logits_behind(row)[-len(encoded.answer) - 1 : -1])
        scores.append(float(likely[np.arange(len(encoded.answer)), encoded.answer].sum()))
    return scores[0] > scores[1]


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
        least = 2 if name == "permuted" else 1
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
            assert new["noise"] is not None and new["mean"] is not None
            np.testing.assert_allclose(norm(new["noise"]), norm(own), rtol=1e-5)
            for k, thought in enumerate(new["mean"]):
                expected = sum(other[k] for other in thoughts if len(other) > k) / sum(count > k for count in COUNTS)
                np.testing.assert_allclose(thought, expected, rtol=1e-5, atol=1e-6)
        if new["permuted"] is not None:
            assert sorted(map(tuple, new["permuted"].tolist())) == sorted(map(tuple, own.tolist()))


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
    with pytest.raises(CoconutError, match="row 1: 3 inputs are given in the place of 2 thoughts"):
        answered([thoughts[0], thoughts[0], *thoughts[2:]])
    with pytest.raises(CoconutError, match="feeds no thoughts back"):
        thoughts_of_questions(MODEL, TOKENIZER, METHODS["cot"], PLACING, TOKENIZED, SETTINGS)
    with pytest.raises(CoconutError, match="no question of the validation split has one"):
        mean_thoughts([np.zeros((0, 4), np.float32)])
    # A question with more thoughts than any of those the mean is taken from.
    short = Surroundings(questions=QUESTIONS, mean=mean_thoughts(thoughts)[:2])
    assert [new is not None for new in ALTERATIONS["mean"](thoughts, short)] == [0 < count < 3 for count in COUNTS]
