"""Blocks before the answer that the model itself ends, and soft thinking, against what is known beforehand."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions
from coconut.evaluation.reading import open_last_block
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.soft_thinking import SoftThinkingConfig
from coconut.latent.swi_reasoning import SwiReasoningConfig
from coconut.methods import METHODS
from coconut.model import Model
from coconut.models.decoder import Decoder
from coconut.pages import Text, Thoughts
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from tests.tiny_models import LLAMA_STYLE, quick_compilation, random_decoder
from tests.tiny_pages import placing_at

TOKENIZER = symbol_tokenizer([str(number) for number in range(19)])
CONFIG = dataclasses.replace(LLAMA_STYLE, num_layers=1, vocab_size=TOKENIZER.vocab_size)
CURRICULUM = CurriculumConfig(max_latent_stage=4)
LIMIT = 6


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """A stop head that reads one direction."""

    direction: Array

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        del decoder
        return hidden @ self.direction


DIRECTION = jnp.asarray(np.random.default_rng(4).normal(size=CONFIG.embed_dim), jnp.float32)


def without_start(decoder: Decoder) -> Decoder:
    """The decoder, to which the start marker is never likely: a row that cannot think writes it as text."""
    decoder.head.kernel[...] = decoder.head.kernel[...].at[:, TOKENIZER.start_latent_id].set(0.0)
    return decoder


MODEL = Model(without_start(random_decoder(CONFIG, seed=5)), {"feedback": Identity(), "halt": Probe(DIRECTION)})
DRAW = np.random.default_rng(1)
QUESTIONS = [
    TokenizedExample(
        question=DRAW.integers(0, 19, 2 + index % 3).astype(np.int32),
        steps=(np.zeros(1, np.int32),) * 2,
        answer=np.zeros(1, np.int32),
    )
    for index in range(5)
]


def answers(method: str = "coconut", stage: int = CURRICULUM.final_stage, **settings: Any) -> list[Answer]:
    config = AnswerConfig(
        **{"batch_size": 3, "sampling": SamplingConfig(max_new_tokens=LIMIT), "keep_thoughts": True, **settings}
    )
    placing = placing_at(TOKENIZER, CURRICULUM, stage)
    return list(answer_questions(MODEL, TOKENIZER, METHODS[method], placing, QUESTIONS, config))


def assert_same(ours: Answer, theirs: Answer) -> None:
    """The same but for rounding of the thoughts."""
    assert ours.thought_inputs is not None and theirs.thought_inputs is not None
    np.testing.assert_allclose(ours.thought_inputs, theirs.thought_inputs, rtol=0, atol=1e-5)
    # What stands behind a block whose end nobody knows is read token by token.
    assert ours.passes >= theirs.passes
    # So its columns are among those that the model chose, or was made to read.
    assert ours.chosen[len(ours.chosen) - len(theirs.chosen) :] == theirs.chosen
    apart = {"thought_inputs": None, "passes": 0, "chosen": ()}
    assert dataclasses.replace(ours, **apart) == dataclasses.replace(theirs, **apart)


@pytest.mark.parametrize("forced", ["", pytest.param("3 4", marks=pytest.mark.slow)])
def test_a_block_that_a_head_ends_equals_one_of_that_many_thoughts(forced: str) -> None:
    halted = answers(halting=HaltingConfig(stop="cumulative", threshold=0.8, most=4, room=4), forced=forced)
    numbers = {answer.thoughts for answer in halted}
    assert len(numbers) > 1 and any(len(answer.text) > len(forced) for answer in halted)
    for count in numbers:
        for ours, theirs in zip(halted, answers(thoughts=count, forced=forced), strict=True):
            if ours.thoughts == count:
                assert ours.turns[0] == count and ours.text.startswith(forced)
                assert_same(ours, theirs)


def test_only_a_last_block_with_thoughts_is_left_open() -> None:
    front, behind = Text(np.asarray([1, 2], np.int32)), Text(np.asarray([3], np.int32))
    assert open_last_block((front,)) is None
    assert open_last_block((front, Thoughts(0), behind)) is None  # a stage that was trained without thoughts
    page, ids = open_last_block((front, Thoughts(1), behind, Thoughts(2), behind, behind)) or ((), np.zeros(0))
    assert page == (front, Thoughts(1), behind) and ids.tolist() == [3, 3]


@pytest.mark.parametrize("stop_at", [(), ("7",)])
def test_soft_thinking_with_one_token_is_greedy_decoding(stop_at: tuple[str, ...]) -> None:
    """The chain that is thought and the text behind it are the text of plain decoding, wherever thinking stops."""
    most = 3
    soft = SoftThinkingConfig(top_k=1, cold_entropy=None, most=most, stop_at=stop_at)
    plain = answers("cot", sampling=SamplingConfig(max_new_tokens=LIMIT + most))
    seen = answers("cot", soft_thinking=soft)
    assert {answer.thoughts for answer in seen} >= {most}
    for ours, theirs in zip(seen, plain, strict=True):
        chain = f"{ours.soft_text} {ours.text}".split()
        assert chain == theirs.text.split()[: len(chain)] and len(chain) >= min(theirs.new_tokens, LIMIT)
        assert len(ours.soft_text.split()) == ours.thoughts
        assert not set(stop_at) & set(ours.soft_text.split())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"thoughts": 2}, r"AnswerConfig\.thoughts = 2: soft_thinking says itself"),
        ({"halting": HaltingConfig()}, r"AnswerConfig\.halting = .*: soft_thinking says itself"),
        (
            {"soft_thinking": SwiReasoningConfig(), "forced": "3"},
            r"AnswerConfig\.forced = '3': SwiReasoning has no place",
        ),
        ({"method": "coconut"}, r"AnswerConfig\.soft_thinking: the method writes blocks of thoughts of its own"),
        ({"end": "1 2"}, r"SoftThinkingConfig\.end = '1 2': the tokenizer makes 2 tokens of it, not one"),
        ({"stop_at": ("1 2",)}, r"HaltingConfig\.texts = '1 2': the tokenizer makes 2 tokens"),
    ],
)
def test_what_cannot_be_thought_softly_is_an_error(settings: dict[str, Any], message: str) -> None:
    fields = {name: settings.pop(name) for name in ("end", "stop_at") if name in settings}
    with pytest.raises(CoconutError, match=message):
        answers(**{"method": "cot", "soft_thinking": SoftThinkingConfig(**fields), **settings})
