"""Rows of several blocks: each equals the row alone, unpadded, in values and gradients, whatever stands beside it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.batching import page_shape
from coconut.curriculum import CurriculumConfig
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout_batch
from coconut.losses import scored_columns, token_losses
from coconut.methods import METHODS
from coconut.models.decoder import Decoder
from coconut.pages import Page
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.types import Batch, Latent, Think
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder
from tests.tiny_pages import aligned, placing_at

pytestmark = pytest.mark.slow

TOLERANCE = 1e-10
TOKENIZER = symbol_tokenizer([str(number) for number in range(19)])
CURRICULUM = CurriculumConfig(c_thought=2, max_latent_stage=3)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def pages() -> list[Page]:
    """Rows of two blocks, one, none, and a second one behind a step where others have their first."""
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, 19, length).astype(np.int32)

    def page(stage: int, *steps: int | Think) -> Page:
        parts = tuple(step if isinstance(step, Think) else draw(step) for step in steps)
        example = TokenizedExample(question=draw(1 + len(steps)), steps=parts, answer=draw(2))
        return METHODS["interleaved"].pages["main"](example, placing_at(TOKENIZER, CURRICULUM, stage))

    return [page(2, 1, 2, 1, 1), page(1, 2, 1, 2), page(0, 2, 1), page(2, 1), page(0, 1, Think(1), 2, Think(3))]


def test_each_row_equals_the_row_alone() -> None:
    decoder = random_decoder(dataclasses.replace(GPT2_STYLE, num_layers=1, param_dtype="float64"))
    rows = pages()
    batch = aligned([*rows, None], page_shape(rows), TOKENIZER)
    assert sum(isinstance(span, Latent) for span in batch.schedule) == 2
    # A weight for each label of each row, in the order in which the row has them.
    rng = np.random.default_rng(1)
    most = max(int((row >= 0).sum()) for row in batch.labels)
    weights = rng.normal(size=(len(rows) + 1, most))

    def derive(batch: Batch, weights: np.ndarray) -> tuple[Any, Any]:
        placed = np.zeros(batch.labels.shape)
        for row, labels in enumerate(batch.labels):
            own = np.flatnonzero(labels >= 0)
            placed[row, own] = weights[row, : len(own)]
        chosen = scored_columns(jnp.asarray(placed), batch.schedule)
        # No label has been left out of the scored columns.
        assert (chosen != 0).sum() == (placed != 0).sum()

        placed_batch = jax.tree.map(jnp.asarray, batch)

        def loss(decoder: Decoder) -> tuple[Any, Any]:
            output = rollout_batch(decoder, Identity(), placed_batch)
            labels = scored_columns(placed_batch.labels, batch.schedule)
            losses = token_losses(decoder.unembed(output.predictors), labels)
            return jnp.sum(losses * chosen), (jnp.sum(losses * chosen, 1), output.last)

        (_, seen), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(decoder)
        return seen, gradients

    (losses, last), gradients = derive(batch, weights)
    total = jax.tree.map(jnp.zeros_like, gradients)
    for index, page in enumerate(rows):
        alone = aligned([page], page_shape([page]), TOKENIZER)
        assert alone.valid.all()
        (own_losses, own_last), own_gradients = derive(alone, weights[index : index + 1])
        np.testing.assert_allclose(own_losses[0], losses[index], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(own_last[0], last[index], rtol=TOLERANCE, atol=TOLERANCE)
        total = jax.tree.map(jnp.add, total, own_gradients)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(total), strict=True
    ):
        assert np.linalg.norm(ours - theirs) <= TOLERANCE * max(float(np.linalg.norm(theirs)), 0.1), path
        assert ".key.bias" in jax.tree_util.keystr(path) or np.linalg.norm(theirs) > 1e-2
