"""What is read before answering is what training would have made of the same columns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.batching import page_shape
from coconut.curriculum import CurriculumConfig
from coconut.evaluation.reading import given_pages, latent_columns, read
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout_batch
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.methods import METHODS
from coconut.model import Model
from coconut.pages import count_thoughts
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.types import Latent, Think
from tests.tiny_models import GPT2_STYLE, quick_compilation, quick_jit, random_decoder
from tests.tiny_pages import aligned, placing_at

TOKENIZER = symbol_tokenizer([str(number) for number in range(19)])


def examples() -> list[TokenizedExample]:
    """Questions before two blocks of thoughts, one, and none."""
    draw = lambda length: np.random.default_rng(length).integers(0, 19, length).astype(np.int32)
    return [
        TokenizedExample(question=draw(2 + index), steps=(*blocks, draw(2)), answer=draw(1))
        for index, blocks in enumerate(((Think(1), Think(3)), (Think(2),), ()))
    ]


@pytest.mark.parametrize(
    "name,think,blocks",
    [
        pytest.param("cot", OneByOne(), 2, marks=pytest.mark.slow),
        pytest.param("coconut", OneByOne(), 3, marks=pytest.mark.slow),
        ("coconut", Sweeps(count=1), 3),
        ("pause", Sweeps(count=0), 0),
    ],
)
def test_reading_equals_the_rollout(name: str, think: Thinker, blocks: int) -> None:
    method = METHODS[name]
    model = Model(random_decoder(dataclasses.replace(GPT2_STYLE, num_layers=1)), {"feedback": Identity()})
    pages = given_pages(method, placing_at(TOKENIZER, CurriculumConfig(max_latent_stage=2), 1), examples())
    batch = aligned(pages, page_shape(pages), TOKENIZER, feeds_back=think != Sweeps(count=0))
    assert sum(isinstance(span, Latent) for span in batch.schedule) == blocks
    with quick_compilation():
        prefix, thoughts = read(model, batch, think, latent_id=TOKENIZER.latent_id)
        roll_out = quick_jit(lambda model, batch: rollout_batch(model.decoder, model.feedback, batch, think=think))
        output = roll_out(model, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(prefix.last, output.last, rtol=1e-4, atol=1e-5)
    assert np.asarray(prefix.length).tolist() == batch.valid.sum(1).tolist()
    assert len(thoughts) == len(output.thoughts) == blocks
    if not blocks:
        return
    inputs = np.concatenate(thoughts, 1)
    np.testing.assert_allclose(inputs, np.concatenate(output.thoughts, 1), rtol=1e-4, atol=1e-5)
    used = batch.valid[:, latent_columns(batch)]
    assert used.sum(1).tolist() == [count_thoughts(page) for page in pages]
    assert not inputs[~used].any()
