"""What is fed back: values against numpy, gradients against autodiff and the obvious loop, the same when generating."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback, FeedbackConfig, Norm, make_feedback
from coconut.latent.gated import Gate
from coconut.latent.generate import prefill, think_on
from coconut.models.decoder import Decoder
from coconut.types import Language, Latent
from tests.latent.slow_rollout import (
    IN_FLOAT64,
    ONE_BLOCK,
    ONE_BLOCK_LENGTHS,
    assert_close,
    library,
    make_rows,
    slow_loop,
    weighed,
)
from tests.tiny_models import GPT2_STYLE, quick_compilation, quick_jit, random_decoder

CONFIG = dataclasses.replace(GPT2_STYLE, num_layers=1, **IN_FLOAT64)
KEY = jax.random.key(0)
OTHERS = ["scale", "match_norm", "norm", "mixture", "gated"]


def setup(kind: str) -> tuple[Decoder, Feedback]:
    """A decoder, and a feedback no parameter of which is at a special value."""
    feedback = make_feedback(FeedbackConfig(kind=kind, factor=0.7), CONFIG, KEY)
    rng = np.random.default_rng(1)
    return random_decoder(CONFIG), jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape)), feedback)


@pytest.mark.parametrize("kind", ["scale", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS[1:])])
def test_gradients_are_those_of_the_slow_loop_and_of_autodiff(kind: str) -> None:
    """With a row that thinks nothing, and one that only fills the batch, whose hidden states are zero."""
    with jax.enable_x64(True):
        decoder, feedback = setup(kind)
        rows = make_rows(ONE_BLOCK, [*ONE_BLOCK_LENGTHS, [0, 0, 0]], CONFIG)
        rows = dataclasses.replace(rows, last=rows.last.at[-1].set(0.0))

        def derive(way: str) -> Any:
            def loss(decoder: Decoder, feedback: Feedback) -> tuple[jax.Array, jax.Array]:
                if way == "slow":
                    seen = slow_loop(decoder, feedback, rows, ONE_BLOCK)
                else:
                    seen = library(decoder, feedback, rows, ONE_BLOCK, way)  # pyright: ignore[reportArgumentType]
                return weighed(seen, rows, ONE_BLOCK), seen.thoughts

            return quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(decoder, feedback)

        (loss, thoughts), gradients = derive("slow")
        for leaf in jax.tree.leaves(gradients[1]):
            assert np.abs(leaf).min() > 1e-5
        assert np.linalg.norm(thoughts) > 1
        for way in ("implicit", "autodiff") if kind == "norm" else ("implicit",):
            (own_loss, own_thoughts), own_gradients = derive(way)
            assert_close((own_loss, own_thoughts), (loss, thoughts))
            assert_close(own_gradients, gradients)


def gated(shares: np.ndarray, table: np.ndarray) -> np.ndarray:
    """HRPO's thought of the likeliest token, by the formulas."""
    gate = make_feedback(FeedbackConfig(kind="gated", factor=0.5), CONFIG, KEY)
    assert isinstance(gate, Gate)
    through = lambda x, linear: 1 / (1 + np.exp(-(x @ linear.kernel[...] + linear.bias[...])))
    embedded = table[shares.argmax(-1)]
    soft = shares @ table / np.sqrt(np.square(shares).sum(-1, keepdims=True))
    kept = np.exp(-8 * np.log1p(np.exp(-np.asarray(gate.decay[...]))) * through(embedded, gate.reset))
    assert 0.98 < kept.min() < kept.max() < 1
    return kept * embedded + np.sqrt(1 - kept**2 + 1e-8) * through(embedded, gate.input) * soft


def test_what_each_kind_makes_of_a_hidden_state() -> None:
    with jax.enable_x64(True):
        decoder = random_decoder(CONFIG)
        hidden = (
            np.random.default_rng(2).normal(size=(3, 2, CONFIG.embed_dim)) * np.array([0.1, 1.0, 50.0])[:, None, None]
        )
        identity = make_feedback(FeedbackConfig(), CONFIG, KEY)
        norms = np.linalg.norm(hidden, axis=-1, keepdims=True)
        table = np.asarray(decoder.tokens.embedding[...])
        token_norm = np.linalg.norm(table, axis=-1).mean()
        logits = hidden @ table.T / 0.5
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        expected: dict[str, np.ndarray] = {
            "scale": 0.5 * hidden,
            "match_norm": 0.5 * token_norm * hidden / norms,
            "norm": 0.5 * CONFIG.embed_dim**0.5 * hidden / norms,
            "mixture": shares / shares.sum(-1, keepdims=True) @ table,
            "gated": gated(shares / shares.sum(-1, keepdims=True), table),
        }
        assert set(expected) == set(OTHERS)
        assert (identity(decoder, jnp.asarray(hidden)) == hidden).all()
        for kind, thought in expected.items():
            np.testing.assert_allclose(
                make_feedback(FeedbackConfig(kind=kind, factor=0.5), CONFIG, KEY)(decoder, jnp.asarray(hidden)),
                thought,
                rtol=1e-9,
            )
        # Each component has a scale of its own.
        scale = np.random.default_rng(3).normal(size=CONFIG.embed_dim)
        np.testing.assert_allclose(
            Norm(scale=jnp.asarray(scale))(decoder, jnp.asarray(hidden)), 2 * scale * expected["norm"], rtol=1e-9
        )


def test_the_matched_norm_follows_the_table_and_sends_it_no_gradient() -> None:
    """Tokens that the data never hold would drift: Adam makes steps of any gradient."""
    with jax.enable_x64(True):
        decoder = random_decoder(CONFIG)
        feedback = make_feedback(FeedbackConfig(kind="match_norm"), CONFIG, KEY)
        hidden = jnp.asarray(np.random.default_rng(2).normal(size=(2, CONFIG.embed_dim)))
        gradient = jax.grad(lambda decoder: feedback(decoder, hidden).sum())(decoder)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
        larger = jax.tree.map(lambda x: 3 * x, decoder)
        np.testing.assert_allclose(feedback(larger, hidden), 3 * feedback(decoder, hidden), rtol=1e-12)


# A gate reads embeddings, which were rounded before.
@pytest.mark.parametrize("kind", ["identity", *(kind for kind in OTHERS if kind != "gated")])
def test_thoughts_keep_the_dtype_of_hidden_states(kind: str) -> None:
    config = GPT2_STYLE
    decoder, feedback = random_decoder(config, dtype="bfloat16"), make_feedback(FeedbackConfig(kind=kind), config, KEY)
    hidden = jnp.asarray(100 * np.random.default_rng(2).normal(size=(2, config.embed_dim)), jnp.bfloat16)
    thought = feedback(decoder, hidden)
    assert thought.dtype == jnp.bfloat16
    # Rounded once, at the end.
    exact = feedback(random_decoder(GPT2_STYLE), hidden.astype(jnp.float32))
    np.testing.assert_array_equal(thought, exact.astype(jnp.bfloat16))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(feedback))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_generation_thinks_what_training_thinks(kind: str) -> None:
    with jax.enable_x64(True), quick_compilation():
        decoder, feedback = setup(kind)
        schedule = (Language(3), Latent(2), Language(1, 1))
        rows = make_rows(schedule, [[3, 2, 1], [2, 2, 1]], CONFIG)
        prefix = prefill(decoder, rows.tokens[:, :3], rows.valid[:, :3])
        _, thoughts = think_on(decoder, feedback, prefix, jnp.asarray([2, 2], jnp.int32), room=2)
        trained = quick_jit(lambda decoder, feedback: library(decoder, feedback, rows, schedule).thoughts)
        assert_close(thoughts, trained(decoder, feedback))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "normalise"}, "FeedbackConfig.kind = 'normalise'"),
        ({"kind": "scale", "factor": 0.0}, "FeedbackConfig.factor = 0.0: must be positive"),
        ({"kind": "norm", "factor": float("inf")}, "FeedbackConfig.factor = inf: must be positive"),
        # A factor that nothing reads.
        ({"factor": 2.0}, "FeedbackConfig.factor = 2.0: kind = 'identity' has none"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError) as error:
        FeedbackConfig(**values)
    assert message in str(error.value)
