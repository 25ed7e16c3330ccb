"""PonderNet's distribution and the losses after each number of thoughts, against obvious loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout_batch
from coconut.losses import language_loss
from coconut.methods import METHODS
from coconut.methods.method import LossContext
from coconut.methods.ponder import (
    PonderOptions,
    divergence,
    losses_by_count,
    make_halt,
    prior_distribution,
    stopping_distribution,
)
from coconut.model import Model
from coconut.pages import Markers, Placing, with_thoughts
from coconut.tokenizers import TokenizedExample
from tests.official_methods import aligned
from tests.tiny_models import LLAMA_STYLE, quick_jit, random_decoder

COUNTS = np.asarray([3, 2, 1])


def test_distributions_equal_obvious_loops() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 3))
    with jax.enable_x64(True):
        p = np.asarray(stopping_distribution(jnp.asarray(logits), jnp.asarray(COUNTS)))
        q = np.asarray(prior_distribution(PonderOptions(prior_mean=2.0), 3, jnp.asarray(COUNTS)))
        uniform = np.asarray(prior_distribution(PonderOptions(prior="uniform"), 3, jnp.asarray(COUNTS)))
        far = np.asarray(divergence(jnp.asarray(p), jnp.asarray(q)))
    for row, count in enumerate(COUNTS):
        left, expected, geometric = 1.0, np.zeros(3), np.zeros(3)
        for k in range(count):
            stop = 1.0 if k == count - 1 else 1 / (1 + np.exp(-logits[row, k]))
            expected[k], left = left * stop, left * (1 - stop)
            geometric[k] = 0.5**k if k == count - 1 else 0.5 ** (k + 1)
        np.testing.assert_allclose(p[row], expected, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(q[row], geometric, rtol=1e-6)
        np.testing.assert_allclose(uniform[row, :count], 1 / count, rtol=1e-6)
        own = sum(expected[k] * np.log(expected[k] / geometric[k]) for k in range(count))
        np.testing.assert_allclose(far[row], own, rtol=1e-5, atol=1e-7)


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int32)


EXAMPLES = [
    TokenizedExample(question=ids(1, 2, 3), steps=(ids(5),), answer=ids(13, 4, 0), answer_prefix=1),
    TokenizedExample(question=ids(2), steps=(ids(7),), answer=ids(13, 0)),
]


def batch_of(thoughts: int | None = None):
    curriculum = CurriculumConfig(max_latent_stage=3)
    placing = Placing(
        curriculum=curriculum, stage=0, options=PonderOptions(), markers=Markers(start=9, latent=10, end=11)
    )
    pages = [METHODS["ponder"].pages["main"](one, placing) for one in EXAMPLES]
    pages = pages if thoughts is None else [with_thoughts(page, thoughts) for page in pages]
    return aligned(pages, pad_id=0, latent_id=10)


@pytest.mark.slow
def test_losses_after_each_number_equal_rollouts_of_that_number() -> None:
    decoder, batch = random_decoder(LLAMA_STYLE), batch_of()
    roll_out = lambda decoder, batch: rollout_batch(decoder, Identity(), batch, every_hidden=True)
    model = Model(decoder, {"feedback": Identity()})
    mean = lambda model, batch: losses_by_count(model, batch, roll_out(model.decoder, batch)).mean(0)
    found = quick_jit(mean)(model, batch)

    def alone(decoder, batch):
        rows = [jax.tree.map(lambda x, row=row: x[row : row + 1], batch) for row in range(2)]
        return sum(language_loss(decoder, row, roll_out(decoder, row))[0].mean() for row in rows) / 2

    for count in (1, 2, 3):
        expected, gradient = quick_jit(jax.value_and_grad(alone))(decoder, batch_of(count))
        np.testing.assert_allclose(float(found[count - 1]), float(expected), rtol=1e-5)
        if count == 2:
            ours = quick_jit(jax.grad(lambda model: mean(model, batch)[1]))(model)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), ours.decoder, gradient)


@pytest.mark.slow
def test_certain_heads_give_the_loss_of_their_number() -> None:
    decoder, batch, options = random_decoder(LLAMA_STYLE), batch_of(), PonderOptions(prior_weight=0.0)
    halt = make_halt(options, decoder.config, jax.random.key(0))["halt"]
    context = LossContext(options=options)
    loss = quick_jit(
        lambda model: METHODS["ponder"].loss(model, {"main": batch}, context).terms["language"].ratio.mean()
    )
    for bias, count in ((50.0, 0), (-50.0, 2)):
        certain = jax.tree.map(lambda x, bias=bias: jnp.full_like(x, bias) if x.ndim == 0 else x, halt)
        model = Model(decoder, {"feedback": Identity(), "halt": certain})
        each = losses_by_count(model, batch, rollout_batch(decoder, Identity(), batch, every_hidden=True))
        np.testing.assert_allclose(float(loss(model)), float(each.mean(0)[count]), rtol=1e-5)
