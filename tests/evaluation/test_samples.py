"""Samples of questions: their draws are their own, greedy ones are plain answers, and what cannot differ is refused."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.evaluation.beams import BeamSearch
from coconut.evaluation.samples import Sample, SampleConfig, SampleDrawing, first_finish, likelihood
from coconut.evaluation.subject import Subject
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.latent.policies.config import PolicyConfig
from coconut.latent.scorer import LatentScorer, ScoreHead
from coconut.latent.thinkers import Sweeps
from coconut.methods import METHODS
from coconut.methods.ponder import LinearHalt, PonderOptions
from coconut.model import Model
from coconut.tasks import Task
from coconut.tokenizers import TextFormat, TokenizedExample, symbol_tokenizer
from coconut.types import Example
from tests.tiny_models import LLAMA_STYLE, quick_compilation, quick_options, random_decoder
from tests.tiny_pages import placing_at

TOKENIZER = symbol_tokenizer([str(number) for number in range(19)])
CURRICULUM = CurriculumConfig(max_latent_stage=2)
CONFIG = dataclasses.replace(LLAMA_STYLE, num_layers=1, vocab_size=TOKENIZER.vocab_size)
RNG = np.random.default_rng(4)
HALT = LinearHalt(
    kernel=nnx.Param(jnp.asarray(RNG.normal(size=CONFIG.embed_dim), jnp.float32)), bias=nnx.Param(jnp.zeros(()))
)
DECODER = random_decoder(CONFIG, seed=5)
TASK = Task(name="firsts", extract_answer=lambda text: text.split(" ")[0])
"""The first symbol written is the answer."""
EXAMPLES = [Example(question=f"{index}", steps=("1", "2"), answer=f"{3 * index}") for index in range(5)]
TOKENIZED = [
    TokenizedExample(
        question=RNG.integers(0, 19, 2 + index % 3).astype(np.int32),
        steps=(np.zeros(1, np.int32),) * 2,
        answer=np.zeros(1, np.int32),
    )
    for index in range(5)
]
GAUSSIAN = PolicyConfig(kind="gaussian", options={"share": 0.5})
GAUSSIAN_WITH_STOP = dataclasses.replace(GAUSSIAN, learnt_stop=True, least=1)
LEARNT_STOP = PolicyConfig(learnt_stop=True, least=1)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    """Also what is compiled ahead of its calls."""
    compile_lowered = functools.partialmethod(jax.stages.Lowered.compile, compiler_options=quick_options())
    with quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_lowered)
        yield


def subject(method: str = "coconut", *, halts: bool = False) -> Subject:
    options = PonderOptions() if method == "ponder" else None
    return Subject(
        model=Model(DECODER, {"feedback": Identity(), **({"halt": HALT} if halts else {})}),
        tokenizer=TOKENIZER,
        method=METHODS[method],
        placing=placing_at(TOKENIZER, CURRICULUM, CURRICULUM.final_stage, options=options),
        task=TASK,
        text_format=TextFormat(),
    )


def drawing(
    method: str = "coconut", *, halts: bool = False, temperature: float = 1.0, **settings: Any
) -> SampleDrawing:
    sampling = SamplingConfig(max_new_tokens=4, temperature=temperature)
    config = SampleConfig(**{"count": 2, "batch_size": 4, "sampling": sampling, **settings})
    return SampleDrawing(subject(method, halts=halts), EXAMPLES, TOKENIZED, config)


def sample(**values: Any) -> Sample:
    whole = {"example": 0, "number": 0, "text": "", "answer": "", "right": False, "thoughts": 2, "new_tokens": 1}
    return Sample(**{**whole, "drawn_tokens": 2, "passes": 4, "log_probs": {"tokens": -1.0}, "ended": True, **values})


def test_the_first_samples_are_the_same_whatever_follows_and_whatever_a_batch_holds() -> None:
    common: dict[str, Any] = {"halts": True, "policy": GAUSSIAN_WITH_STOP, "thoughts": 3}
    alone = drawing(count=2, batch_size=4, **common)
    many = drawing(count=5, batch_size=3, **common)
    # Two questions of two samples at once; of five samples three and two, one question at a time.
    assert (alone.rows, many.rows) == (4, 3)
    batches: list[int] = []
    few, more = alone.draw(batches.append), many.draw()
    assert batches == [2, 2, 1]
    assert few.seconds > 0 and more.seconds > 0
    for index, (first, all_five) in enumerate(zip(few.samples, more.samples, strict=True)):
        assert [own.number for own in all_five] == list(range(5))
        assert {own.example for own in all_five} == {index}
        for own, again in zip(first, all_five, strict=False):
            assert again.log_probs == pytest.approx(own.log_probs, rel=1e-4, abs=1e-5)
            assert again == dataclasses.replace(own, log_probs=again.log_probs)
    samples = [own for question in more.samples for own in question]
    # Each draws its own thoughts, stops and tokens.
    assert {tuple(own.log_probs) for own in samples} == {("stops", "thoughts", "tokens")}
    assert len({own.log_probs["stops"] for own in samples}) == 25
    assert len({own.text for own in samples}) > 10
    # The head decides between the least and the most thoughts.
    assert {own.thoughts for own in samples} == {1, 2, 3}
    for own in samples:
        example = EXAMPLES[own.example]
        assert own.passes == 1 + own.thoughts + own.new_tokens
        assert own.answer == own.text.split(" ")[0] and own.right == (own.answer == example.answer)
    assert 0 < sum(own.ended for own in samples) < 25


@pytest.mark.parametrize(
    ("method", "thoughts"),
    [
        ("no_cot", None),
        pytest.param("coconut", 3, marks=pytest.mark.slow),
        pytest.param("pause", None, marks=pytest.mark.slow),
    ],
)
def test_one_greedy_sample_is_the_plain_answer(method: str, thoughts: int | None) -> None:
    common: dict[str, Any] = {"thoughts": thoughts, "forced": "7 8", "batch_size": 2}
    found = drawing(method, temperature=0.0, count=1, **common).draw().samples
    sampling = SamplingConfig(max_new_tokens=4)
    answers = list(answer_questions(*subject(method).asked, TOKENIZED, AnswerConfig(sampling=sampling, **common)))
    assert len(found) == len(answers) == 5
    for (own,), answer in zip(found, answers, strict=True):
        shared = ("example", "text", "new_tokens", "thoughts", "ended", "passes")
        assert {name: getattr(own, name) for name in shared} == {name: getattr(answer, name) for name in shared}
        assert own.text.startswith("7 8") and own.drawn_tokens == own.new_tokens - 2 + own.ended
    assert {own.thoughts for (own,) in found} == {{"coconut": 3, "pause": 2, "no_cot": 0}[method]}


def test_scores() -> None:
    drawn = [sample(log_probs={"tokens": -6.0}, drawn_tokens=4), sample(log_probs={"tokens": -1.0}, drawn_tokens=1)]
    assert likelihood(drawn) == [-1.5, -1.0]
    finishing = [sample(passes=5), sample(passes=2, ended=False), sample(passes=3)]
    assert first_finish(finishing) == [-5.0, -math.inf, -3.0]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("coconut", {"temperature": 0.0}, "temperature = 0: PolicyConfig.kind = 'deterministic' draws nothing either"),
        ("coconut", {"temperature": 0.0, "policy": GAUSSIAN, "thoughts": 0}, "draws nothing either with 0 thoughts"),
        ("no_cot", {"policy": GAUSSIAN}, "'no_cot' makes no thoughts of its own at stage"),
        ("pause", {"policy": GAUSSIAN}, "'pause' makes no thoughts of its own at stage"),
        ("no_cot", {"thoughts": 2}, "2 thoughts: the method writes this question without a block"),
        ("ponder", {}, "'ponder' opens or ends blocks by itself"),
        ("coconut", {"policy": LEARNT_STOP}, "learnt_stop = True: needs a part named 'halt'"),
        ("coconut", {"policy": PolicyConfig(kind="gated_token")}, "needs FeedbackConfig.kind = 'gated'"),
        (
            "coconut",
            {"policy": PolicyConfig(kind="gaussian", options={"learnt": True})},
            "needs a part named 'policy'",
        ),
        ("coconut", {"sampling": SamplingConfig(max_new_tokens=40, temperature=1.0)}, "max_positions = 32"),
        ("coconut", {"count": 0}, "SampleConfig.count = 0"),
        ("coconut", {"batch_size": 0}, "SampleConfig.batch_size = 0"),
        ("coconut", {"thoughts": -1}, "SampleConfig.thoughts = -1"),
        ("coconut", {"thoughts": 1, "policy": PolicyConfig(learnt_stop=True, least=2)}, "least PolicyConfig.least = 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError) as caught:
        drawing(method, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("settings", [{"policy": LEARNT_STOP}, {"thoughts": 2}])
def test_a_block_that_a_method_ends_itself_ends_by_its_head_or_by_count(settings: dict[str, Any]) -> None:
    assert drawing("ponder", halts=True, **settings).rows == 4


SCORER = LatentScorer(DECODER, ScoreHead(nnx.Param(jnp.ones(CONFIG.embed_dim))))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("coconut", {}, "SampleConfig.policy: PolicyConfig.kind = 'deterministic' draws no thoughts"),
        ("coconut", {"policy": GAUSSIAN_WITH_STOP}, "PolicyConfig.learnt_stop = True: sums of scores"),
        ("coconut", {"policy": GAUSSIAN, "thoughts": 1}, "thoughts = 1: a scorer knows the number of thoughts it was"),
        ("no_cot", {"policy": GAUSSIAN}, "'no_cot' makes no thoughts of its own at stage"),
        ("sweeps", {"policy": GAUSSIAN}, "makes all thoughts of a block together"),
    ],
)
def test_scores_and_searches_that_cannot_be(method: str, settings: dict[str, Any], message: str) -> None:
    config = SampleConfig(**{"count": 2, "sampling": SamplingConfig(max_new_tokens=4), **settings})
    who = subject("coconut" if method == "sweeps" else method)
    if method == "sweeps":
        who = dataclasses.replace(who, method=dataclasses.replace(who.method, think=lambda options: Sweeps(count=2)))
    for make in (
        lambda: SampleDrawing(who, EXAMPLES, TOKENIZED, config, SCORER),
        lambda: BeamSearch(who, EXAMPLES, TOKENIZED, config, SCORER, 2),
    ):
        with pytest.raises(CoconutError, match=message):
            make()


def test_no_questions_and_several_blocks_are_refused() -> None:
    config = SampleConfig(count=2)
    with pytest.raises(CoconutError, match="candidates = 0: must be at least 1"):
        BeamSearch(subject(), EXAMPLES, TOKENIZED, config, SCORER, 0)
    with pytest.raises(CoconutError, match="no questions to draw samples of"):
        SampleDrawing(subject(), [], [], config)
    one = subject()
    write = one.method.pages["main"]

    def write_twice(example: TokenizedExample, placing: Any) -> Any:
        *front, last = write(example, placing)
        return (*front, *front[1:], last)

    twice = dataclasses.replace(one, method=dataclasses.replace(one.method, pages={"main": write_twice}))
    with pytest.raises(CoconutError, match="writes 2 blocks of thoughts before an answer"):
        SampleDrawing(twice, EXAMPLES, TOKENIZED, config)
    with pytest.raises(CoconutError, match="writes 2 blocks of thoughts before an answer"):
        BeamSearch(twice, EXAMPLES, TOKENIZED, dataclasses.replace(config, policy=GAUSSIAN), SCORER, 2)
