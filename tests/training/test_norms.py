"""The norms of thoughts and token embeddings, the alert when they part, and how alike thoughts are."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout_batch
from coconut.losses import thought_metrics
from coconut.training.config import RunConfig
from coconut.training.norms import NormAlert
from coconut.types import Language, Latent, ModelOutput
from tests.tiny_models import quick_jit, random_decoder
from tests.tiny_runs import tiny_run
from tests.training.test_step import BATCH, CONFIG


def test_neighbours_stand_in_one_block() -> None:
    # The first row's cosines are 1 within the first block and 0 in the second; between the blocks it is -1. The others
    # have no two thoughts in one block, or one that is nothing.
    first, second = np.zeros((2, 3, 2, 4), np.float32)
    first[:, :, 0], second[0, 0, 0], second[0, 1, 1] = 2.0, -1.0, 3.0
    second[2] = 0.0
    used = np.asarray([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1]], bool)
    valid = np.ones((3, 6), bool)
    valid[:, [1, 2, 4, 5]] = used
    schedule = (Language(1), Latent(2), Language(1), Latent(2))
    batch = dataclasses.replace(BATCH, schedule=schedule, tokens=jnp.zeros((3, 6), int), valid=jnp.asarray(valid))
    nothing = jnp.zeros((3, 0, 4))
    thoughts = (jnp.asarray(first), jnp.asarray(second))
    output = ModelOutput(hidden=None, predictors=nothing, thoughts=thoughts, past=(), last=nothing.sum(1))
    cosine = thought_metrics(random_decoder(dataclasses.replace(CONFIG, embed_dim=4)), batch, output)["thought_cosine"]
    assert (float(cosine.total), float(cosine.weight)) == (1.0, 3.0)


@pytest.mark.slow
def test_norms_are_means_over_valid_columns() -> None:
    decoder = random_decoder(CONFIG, seed=2)
    output = quick_jit(lambda decoder: rollout_batch(decoder, Identity(), BATCH))(decoder)
    (thoughts,) = map(np.asarray, output.thoughts)
    # Unused columns hold zeros, which count as thoughts of no length if they count at all.
    used = np.asarray(BATCH.valid)[:, 5:7]
    assert 0 < used.sum() < used.size
    metrics = thought_metrics(decoder, BATCH, output)
    assert float(metrics["thought_norm"].weight) == used.sum()
    assert float(metrics["thought_norm"].mean()) == pytest.approx(
        np.linalg.norm(thoughts, axis=-1)[used].mean(), rel=1e-5
    )
    language = np.asarray(BATCH.valid).copy()
    language[:, 5:7] = False
    table = np.linalg.norm(np.asarray(decoder.tokens.embedding[...]), axis=-1)
    assert float(metrics["token_norm"].mean()) == pytest.approx(
        table[np.asarray(BATCH.tokens)[language]].mean(), rel=1e-5
    )
    cosines = [
        float(np.dot(*row) / np.prod(np.linalg.norm(row, axis=-1))) for row in thoughts[used.all(1)].astype(np.float64)
    ]
    assert 0 < len(cosines) < used.any(1).sum() and float(metrics["thought_cosine"].weight) == len(cosines)
    assert float(metrics["thought_cosine"].mean()) == pytest.approx(np.mean(cosines), rel=1e-5)
    # No gradient flows through them, not even a zero one made of NaN: unused thoughts are zero.
    gradient = jax.grad(lambda decoder: thought_metrics(decoder, BATCH, output)["token_norm"].total)(decoder)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    without = dataclasses.replace(BATCH, schedule=(Language(15),))
    assert thought_metrics(decoder, without, dataclasses.replace(output, thoughts=())) == {}


def test_the_alert_warns_once_a_crossing(caplog: pytest.LogCaptureFixture) -> None:
    alert = NormAlert(4.0)
    ratios = [1.0, 3.9, 4.1, 100.0, 4.0, 0.26, 0.24, float("nan"), 0.25, float("inf")]
    outside = [False, False, True, True, False, False, True, True, False, True]
    with caplog.at_level(logging.WARNING):
        for step, (ratio, expected) in enumerate(zip(ratios, outside, strict=True)):
            assert alert.look({"thought_norm": 2.0 * ratio, "token_norm": 2.0}, step) == {"norm_alert": expected}
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 2", "step 6", "step 9"]
    assert "thoughts, 8.2, is 4.1 times that of token embeddings, 2: outside [1/4, 4]" in caplog.records[0].getMessage()
    # Nothing to look at, or nobody who asked.
    assert alert.look({"loss": 1.0}, 10) == {}
    assert NormAlert(None).look({"thought_norm": 1e9, "token_norm": 1.0}, 0) == {}


@pytest.mark.parametrize(
    ("field", "value"), [("norm_alert_factor", 1.0), ("norm_alert_factor", float("inf")), ("max_skipped_steps", 0)]
)
def test_a_value_out_of_range_is_named_with_its_field(field: str, value: float) -> None:
    with pytest.raises(CoconutError) as error:
        tiny_run(**{field: value})
    assert f"{RunConfig.__name__}.{field} = {value!r}" in str(error.value)
