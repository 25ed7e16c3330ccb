"""Evaluation: every example counts once, tokens are counted as the paper counts them, and the interval is Wilson's."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.evaluate import Evaluation, evaluate, wilson_interval
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.methods import METHODS
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.tasks import Task
from coconut.tokenizers import TEXT, encode_example, word_tokenizer
from coconut.types import Example
from tests.tiny_models import quick_compilation
from tests.tiny_pages import placing_at

EXAMPLES = [
    Example(question=f"Is {name} a cat?", steps=("Sure.", "It is."), answer="no, never" if index in (1, 4) else "yes")
    for index, name in enumerate(("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus"))
]
TOKENIZER = word_tokenizer(TEXT.texts(EXAMPLES))
TOKENIZED = [encode_example(TOKENIZER, example, TEXT) for example in EXAMPLES]
QUESTION = len(TOKENIZED[0].question)
WRITTEN = TOKENIZER.encode("### yes")
CURRICULUM = CurriculumConfig(max_latent_stage=2)
POSITIONS = 32


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def model_that_writes(tokens: list[int], *, first: int) -> Model:
    """A model that predicts ``tokens`` one after the other from position ``first`` on, and EOS everywhere else.

    It sees its position alone: a thought may be anything.
    """
    config = DecoderConfig(
        vocab_size=TOKENIZER.vocab_size,
        num_layers=1,
        embed_dim=POSITIONS,
        num_heads=1,
        mlp_dim=1,
        max_positions=POSITIONS,
        tied_head=False,
    )
    head = np.zeros((POSITIONS, TOKENIZER.vocab_size), np.float32)
    predicted = dict(enumerate(tokens, first))
    for position in range(POSITIONS):
        head[position, predicted.get(position, TOKENIZER.eos_id)] = 1.0
    fixed = {
        ".positions.embedding": 1e4 * np.eye(POSITIONS, dtype=np.float32),
        ".norm.scale": np.ones(POSITIONS, np.float32),
        ".head.kernel": head,
    }

    def value(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return jnp.asarray(
            next((v for key, v in fixed.items() if name.startswith(key)), np.zeros(leaf.shape)), leaf.dtype
        )

    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return Model(jax.tree_util.tree_map_with_path(value, abstract), {"feedback": Identity()})


def evaluated(model: Model, method: str, **settings: Any) -> tuple[Evaluation, list[tuple[int, str, bool]], list[int]]:
    """The evaluation, what was recorded of each example, and the rows of each batch."""
    records, rows = [], []
    config = AnswerConfig(**{"batch_size": 3, "sampling": SamplingConfig(max_new_tokens=6), **settings})
    result = evaluate(
        model,
        TOKENIZER,
        METHODS[method],
        placing_at(TOKENIZER, CURRICULUM, CURRICULUM.final_stage),
        Task(name="cats"),
        EXAMPLES,
        TOKENIZED,
        config,
        advance=rows.append,
        record=lambda answer, right: records.append((answer.example, answer.text, right)),
    )
    return result, records, rows


def test_a_batch_has_no_more_rows_than_there_are_questions():
    model = model_that_writes(WRITTEN, first=QUESTION + 3)
    result, records, rows = evaluated(model, "coconut", batch_size=10**12)
    assert rows == [len(EXAMPLES)] and (result, records) == evaluated(model, "coconut")[:2]


@pytest.mark.parametrize(
    "method,columns,thoughts,counted_thoughts",
    [("coconut", 4, 2, 2), ("pause", 4, 2, 0), ("no_cot", 0, 0, 0)],
)
def test_every_example_counts_once_and_tokens_as_in_the_paper(method, columns, thoughts, counted_thoughts):
    """``columns`` stand between question and answer: two markers and two fillers, or nothing."""
    assert {len(example.question) for example in TOKENIZED} == {QUESTION}
    model = model_that_writes(WRITTEN, first=QUESTION + columns - 1)
    result, records, rows = evaluated(model, method)
    # Seven rows in batches of three: the last batch's two empty rows are no examples.
    assert rows == [3, 3, 1]
    assert records == [(index, "### yes", index not in (1, 4)) for index in range(7)]
    assert (result.examples, result.correct, result.ended) == (7, 5, 1.0)
    assert result.accuracy == 5 / 7
    # EOS, markers and pause tokens do not count; thoughts do.
    assert result.tokens == len(WRITTEN) + counted_thoughts
    assert result.thoughts == thoughts
    content = result.to_json()
    assert content["accuracy"] == 5 / 7
    assert content["interval_95"] == list(wilson_interval(5, 7))
    assert set(content) == {"accuracy", "interval_95", *(field.name for field in dataclasses.fields(Evaluation))}


def test_thoughts_removed_and_forced_text_and_no_end():
    model = model_that_writes(WRITTEN, first=QUESTION + 3)
    # Without its thoughts the model stands two positions before the answer, and ends at once.
    result, records, _ = evaluated(model, "coconut", thoughts=0)
    assert (result.correct, result.tokens, result.thoughts) == (0, 0, 0)
    assert {text for _, text, _ in records} == {""}
    # Forced tokens are part of the answer, and count.
    forced = TOKENIZER.decode(WRITTEN[:1])
    model = model_that_writes(WRITTEN[1:], first=QUESTION + 4)
    result, records, _ = evaluated(model, "coconut", forced=forced)
    assert {text for _, text, _ in records} == {"### yes"}
    assert (result.correct, result.tokens) == (5, len(WRITTEN) + 2)
    # A row that meets the limit has not ended by itself.
    result, _, _ = evaluated(model_that_writes(WRITTEN[:1] * 6, first=QUESTION + 3), "coconut")
    assert (result.ended, result.tokens) == (0.0, 6 + 2)


@pytest.mark.parametrize(
    "successes,trials,low,high",
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    # Failures are successes of the other kind.
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_no_questions_are_an_error():
    with pytest.raises(CoconutError, match="no questions"):
        evaluate(
            model_that_writes([], first=0),
            TOKENIZER,
            METHODS["coconut"],
            placing_at(TOKENIZER, CURRICULUM, 0),
            Task(name="cats"),
            [],
            [],
            AnswerConfig(),
        )
