"""A random number of thoughts: uniform from the least to the stage's own, which is also what a batch has room for."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.methods.random_thoughts import RandomThoughtsOptions
from coconut.pages import Thoughts
from coconut.pipeline import BatchSource, PipelineConfig
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.types import Think
from tests.tiny_pages import placing_at

TOKENIZER = symbol_tokenizer([str(number) for number in range(16)])
CURRICULUM = CurriculumConfig(max_latent_stage=2, c_thought=2)
METHOD = METHODS["random_thoughts"]


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def counts(stage: int, least: int, draws: int = 60) -> dict[int, int]:
    example = TokenizedExample(question=ids(1), steps=(ids(2), Think(3), ids(4), ids(5)), answer=ids(6))
    drawn: Counter[int] = Counter()
    for i in range(draws):
        placing = placing_at(
            TOKENIZER, CURRICULUM, stage, options=RandomThoughtsOptions(least=least), draw=(i + 0.5) / draws
        )
        first, *others = (part for part in METHOD.pages["main"](example, placing) if isinstance(part, Thoughts))
        # They stand for all of the stage's steps, and blocks of the data stay as they are.
        assert len(first.stands_for) == min(stage, 3) and [block.count for block in others] == [3]
        drawn[first.count] += 1
    return dict(drawn)


@pytest.mark.parametrize(
    "stage,least,expected",
    [
        (0, 1, {0: 60}),
        (1, 0, {0: 20, 1: 20, 2: 20}),
        (1, 1, {1: 30, 2: 30}),
        (2, 1, dict.fromkeys(range(1, 5), 15)),
        (3, 0, dict.fromkeys(range(5), 12)),
        (1, 9, {2: 60}),
    ],
)
def test_every_number_is_as_likely_as_another(stage: int, least: int, expected: dict[int, int]) -> None:
    assert counts(stage, least) == expected


def test_rows_of_a_batch_differ_and_fit() -> None:
    examples = [TokenizedExample(question=ids(1), steps=(ids(2), ids(3)), answer=ids(4, i)) for i in range(12)]

    def batch(method: str, **settings: Any) -> Any:
        placing = placing_at(TOKENIZER, CURRICULUM, 3, **settings)
        return BatchSource(examples, TOKENIZER, METHODS[method], placing, PipelineConfig(batch_size=12), seed=0)[0][
            "main"
        ]

    random, plain = batch("random_thoughts", options=RandomThoughtsOptions()), batch("coconut")
    assert random.schedule == plain.schedule
    numbers = (random.tokens == TOKENIZER.latent_id).sum(1)
    assert len(set(numbers.tolist())) > 1 and min(numbers) >= 1 and max(numbers) <= 4
    thoughts = plain.tokens == TOKENIZER.latent_id
    assert (random.tokens[~thoughts] == plain.tokens[~thoughts]).all()


def test_a_least_number_below_0_is_an_error() -> None:
    with pytest.raises(CoconutError, match=r"RandomThoughtsOptions\.least = -1: must be at least 0"):
        RandomThoughtsOptions(least=-1)
