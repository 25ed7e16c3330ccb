"""CoLaR's compression against an obvious loop; its loss without compression against chain of thought."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.gaussian import GaussianHead
from coconut.latent.rollout import rollout_batch
from coconut.losses import language_loss
from coconut.methods import METHODS
from coconut.methods.colar import ColarOptions, compress_chains
from coconut.methods.method import LossContext
from coconut.model import Model
from coconut.pages import Markers, Placing
from coconut.tokenizers import TokenizedExample
from coconut.types import IGNORED_LABEL
from tests.official_methods import aligned
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder

MARKERS = Markers(start=9, latent=10, end=11)


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int32)


EXAMPLES = [
    TokenizedExample(question=ids(1, 2, 3), steps=(ids(5, 6), ids(7, 8, 12)), answer=ids(13, 4, 0), answer_prefix=1),
    TokenizedExample(question=ids(2), steps=(ids(7),), answer=ids(13, 0)),
    TokenizedExample(question=ids(1, 2), steps=(), answer=ids(13, 5, 0)),
]


@pytest.fixture(scope="module")
def batch():
    placing = Placing(curriculum=CurriculumConfig(), stage=0, options=ColarOptions(), markers=MARKERS)
    return aligned([METHODS["colar"].pages["main"](one, placing) for one in EXAMPLES], pad_id=0, latent_id=10)


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(GPT2_STYLE)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_groups_equal_an_obvious_loop(size, batch, decoder) -> None:
    packed = compress_chains(decoder, jax.tree.map(jnp.asarray, batch), jnp.asarray(size), jax.random.key(3))
    table = np.asarray(decoder.tokens.embedding[...])
    for row, example in enumerate(EXAMPLES):
        chain = [token for step in example.steps for token in np.asarray(step)]
        groups = [chain[start : start + size] for start in range(0, len(chain), size)]
        answer = example.answer.tolist()
        texts = [[token] for token in (*example.question.tolist(), 9)] + groups + [[11]] + [[token] for token in answer]
        inputs = [table[text].sum(0) / np.sqrt(len(text)) for text in texts]
        used, front = len(texts), len(example.question) + 1
        assert np.asarray(packed.valid[row]).tolist() == [True] * used + [False] * (packed.valid.shape[1] - used)
        np.testing.assert_allclose(packed.inputs[row, :used], inputs, rtol=1e-5, atol=1e-6)
        assert packed.positions[row, :used].tolist() == list(range(used))
        labels = np.asarray(packed.labels[row])
        assert (labels[:front] == IGNORED_LABEL).all() and labels[front + len(groups) : used].tolist() == [11, *answer]
        assert all(label in text for label, text in zip(labels[front:], groups, strict=False))
        assert np.flatnonzero(packed.thoughts[row]).tolist() == list(range(front, front + len(groups) + 1))
        assert np.flatnonzero(packed.answers[row]).tolist() == list(range(used - len(answer), used))


def test_groups_of_one_are_chain_of_thought(batch, decoder) -> None:
    head = GaussianHead(decoder.config, 8, factor=0.5, rngs=nnx.Rngs(0))
    model = Model(decoder, {"feedback": head})
    context = LossContext(options=ColarOptions(latent=0.0))
    found = quick_jit(lambda model, batch: METHODS["colar"].loss(model, {"main": batch}, context).metrics)(model, batch)
    output = quick_jit(lambda decoder, batch: rollout_batch(decoder, Identity(), batch))(decoder, batch)
    expected, _ = language_loss(decoder, batch, output)
    np.testing.assert_allclose(float(found["loss"].mean()), float(expected.mean()), rtol=1e-5)


@pytest.mark.slow
def test_the_head_draws_what_comes_next(batch, decoder) -> None:
    """Its error is that of the mean where nothing is drawn, by a loop."""
    head = GaussianHead(decoder.config, 8, factor=0.5, rngs=nnx.Rngs(0))
    context = LossContext(options=ColarOptions())
    loss = METHODS["colar"].loss(Model(decoder, {"feedback": head}), {"main": batch}, context)
    packed = compress_chains(decoder, jax.tree.map(jnp.asarray, batch), jnp.asarray(1), None)
    hidden, _ = decoder.trunk(packed.inputs, positions=packed.positions, valid=packed.valid)
    errors = []
    for row in range(len(EXAMPLES)):
        columns = np.flatnonzero(packed.thoughts[row])
        mean, deviation = head.distribution(decoder, hidden[row, columns - 1])
        assert (deviation > 0).all()
        errors.append(np.square(np.asarray(mean) - np.asarray(packed.inputs)[row, columns] / 0.5).mean())
    np.testing.assert_allclose(float(loss.terms["latent"].ratio.mean()), np.mean(errors), rtol=1e-5)
    drawn = head(decoder, hidden[:, 0], keys=jax.random.split(jax.random.key(0), 3))
    assert np.abs(np.asarray(drawn - head(decoder, hidden[:, 0]))).max() > 0.01


def test_another_feedback_is_an_error(batch, decoder) -> None:
    with pytest.raises(CoconutError, match=r"FeedbackConfig\.kind = 'gaussian'"):
        METHODS["colar"].loss(Model(decoder, {"feedback": Identity()}), {"main": batch}, LossContext())
