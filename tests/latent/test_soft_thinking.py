"""Soft thoughts: the mixture against a loop over the vocabulary, its limits, and what is drawn."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback, draws
from coconut.latent.halting import HaltingConfig
from coconut.latent.soft_thinking import SoftThinking, SoftThinkingConfig, mixture
from tests.tiny_models import LLAMA_STYLE, quick_jit, random_decoder

CONFIG = dataclasses.replace(LLAMA_STYLE, num_layers=1)
DECODER = random_decoder(CONFIG, seed=3)
HIDDEN = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, CONFIG.embed_dim)), jnp.float32)
LOGITS = np.asarray(HIDDEN) @ np.asarray(DECODER.head.kernel[...])
EVERYTHING: dict[str, Any] = {"top_k": None, "top_p": 1.0, "min_p": 0.0, "keep": None}


def by_loop(logits: np.ndarray, config: SoftThinkingConfig) -> dict[int, float]:
    """What each token weighs, filter after filter."""
    shares = np.exp((logits - logits.max()) / config.temperature)
    shares /= shares.sum()
    left = {token: float(shares[token]) for token in np.argsort(-shares)}

    def renormalised(tokens: list[int]) -> dict[int, float]:
        total = sum(left[token] for token in tokens)
        return {token: left[token] / total for token in tokens}

    left = renormalised(list(left)[: config.top_k])
    kept, sum_so_far = [], 0.0
    for token, share in left.items():
        if sum_so_far < config.top_p:
            kept.append(token)
        sum_so_far += share
    left = renormalised(kept)
    left = renormalised([token for token, share in left.items() if share >= config.min_p * max(left.values())])
    return renormalised(list(left)[: config.keep])


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({"top_k": 6, "keep": None, "top_p": 1.0}, 6),
        ({"top_p": 0.6}, None),
        ({"min_p": 0.3, "temperature": 1.3}, None),
        ({"keep": 4, "min_p": 0.0, "top_p": 1.0, "top_k": None}, 4),
        (EVERYTHING, 20),
        ({}, None),
    ],
)
def test_a_soft_thought_is_the_mixture_of_a_loop(fields: dict[str, Any], kept: int | None) -> None:
    """Of the ids below 20 alone."""
    config = SoftThinkingConfig(**fields)
    made = quick_jit(SoftThinking(config=config, vocab_size=20))(DECODER, HIDDEN)
    table, sizes = np.asarray(DECODER.tokens.embedding[...]), set()
    for place in np.ndindex(2, 3):
        weights = by_loop(LOGITS[place][:20], config)
        expected = sum(weight * table[token] for token, weight in weights.items())
        np.testing.assert_allclose(made[place], expected, rtol=0, atol=2e-6)
        sizes.add(len(weights))
    assert sizes == {kept} if kept else len(sizes) > 1 or not fields


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"keep": 1}, {"temperature": 1e-4, **EVERYTHING}, {"top_p": 1e-9}])
def test_one_token_alone_is_its_embedding(fields: dict[str, Any]) -> None:
    made = quick_jit(SoftThinking(config=SoftThinkingConfig(**fields)))(DECODER, HIDDEN)
    np.testing.assert_array_equal(made, np.asarray(DECODER.tokens.embedding[...])[LOGITS.argmax(-1)])


@pytest.mark.slow
def test_gumbel_noise_draws_the_weights_of_each_place_alone() -> None:
    """At a low temperature of the noise it is a draw of one token (Gumbel's trick), as likely as the token was."""
    config = SoftThinkingConfig(noise="gumbel", noise_temperature=1e-3, temperature=1.0, top_k=5, min_p=0.0, top_p=1.0)
    feedback = SoftThinking(config=config)
    assert draws(feedback) and not draws(SoftThinking(config=SoftThinkingConfig())) and isinstance(feedback, Feedback)
    count = 4000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0, 0]), (count, CONFIG.vocab_size))
    mixed = quick_jit(mixture, static_argnums=1)
    weights, tokens = mixed(logits, config, jax.random.split(jax.random.key(0), count))
    shares, same = mixed(logits, dataclasses.replace(config, noise="none"))
    assert tokens is not None and same is not None and (tokens == same).all()
    # Four standard deviations of a mean of so many draws.
    np.testing.assert_allclose(weights.mean(0), shares[0], rtol=0, atol=4 * 0.5 / count**0.5)
    assert weights.max(-1).mean() > 0.99
    keys = jax.random.split(jax.random.key(1), (2, 3))
    think = quick_jit(lambda hidden, keys: feedback(DECODER, hidden, keys=keys))
    moved = think(HIDDEN[::-1], keys[::-1])
    np.testing.assert_allclose(think(HIDDEN, keys)[::-1], moved, rtol=0, atol=1e-6)
    assert np.abs(think(HIDDEN, keys[::-1]) - think(HIDDEN, keys)).max() > 1e-2
    with pytest.raises(CoconutError, match="noise = 'gumbel': draws, and was given no keys"):
        feedback(DECODER, HIDDEN)


def test_the_cold_stop_is_a_switch_of_its_own() -> None:
    cold = SoftThinkingConfig(most=9, stop_at=("#",), end="</think>").halting
    assert (cold.stop, cold.threshold, cold.patience, cold.temperature) == ("entropy", 0.01, 256, 0.6)
    assert (cold.tokens, cold.texts, cold.least, cold.most) == (("end", "eos"), ("#",), 0, 9)
    never = SoftThinkingConfig(most=9, cold_entropy=None).halting
    assert never == HaltingConfig(stop="token", tokens=("eos",), least=0, most=9, room=9)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("temperature", 0.0, "must be positive"),
        ("top_k", 0, "must be None or at least 1"),
        ("top_p", 1.5, "must be above 0"),
        ("min_p", -0.1, "must be between 0 and 1"),
        ("cold_entropy", 0.0, "must be None or positive"),
        ("cold_patience", 0, "must be at least 1"),
        ("noise", "dirichlet", r"must be typing\.Literal"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(CoconutError, match=rf"SoftThinkingConfig\.{field} = {value!r}: {message}"):
        SoftThinkingConfig(**{field: value})
