"""Scores of every policy, gradients of expected rewards against brute force, and what configs refuse."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.policies.config import POLICIES, PolicyConfig, PolicyKind, make_policy, register_policy
from coconut.latent.policies.own_thoughts import Deterministic
from coconut.latent.policies.stopping import stop_log_probs
from coconut.latent.policies.tokens import GumbelMixture, GumbelMixtureOptions
from coconut.latent.thinkers import OneByOne
from tests.latent.sampled import POLICY_CONFIGS, VOCAB, parts_for, questions, sampler_of, with_learnt_stop
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder

TINY = dataclasses.replace(GPT2_STYLE, param_dtype="float64", num_layers=1, embed_dim=8, num_heads=1)
MANY = 3000


@pytest.fixture(scope="module", autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def direction(tree, seed=0):
    """A direction in which to move all parameters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def scores_of(config, *, batch, count=MANY):
    """Of many samples of one question: the derivative of each one's log-probability along a direction, and rewards."""
    decoder = random_decoder(TINY)
    parts = parts_for(config, decoder, halts=config.learnt_stop)
    model, keys = (decoder, parts), jax.random.split(jax.random.key(0), count)

    @quick_jit
    def run(model, tangent):
        make = lambda model: sampler_of(config, *model, think=OneByOne(gradient="autodiff"))
        samples, written = make(model).sample(model[0], batch, keys, count)

        def log_prob(model):
            actions = make(model).replay(model[0], samples)
            return sum(draws.log_probs.sum(1) for draws in actions.values())

        _, scores = jax.jvp(log_prob, (model,), (tangent,))
        return scores, samples, written

    scores, samples, written = run(model, direction(model))
    return np.asarray(scores), samples, written


ALL = [(name, False) for name in POLICY_CONFIGS if name != "dropout_afresh"] + [("deterministic", True)]


@pytest.mark.parametrize(("name", "learnt_stop"), ALL)
def test_the_score_has_mean_zero_and_is_not_zero(name, learnt_stop):
    config = POLICY_CONFIGS[name]
    config = with_learnt_stop(config) if learnt_stop else config

    scores, _, _ = scores_of(config, batch=questions((2,)))

    assert scores.std() > 0.1
    assert abs(scores.mean()) < 4 * scores.std() / np.sqrt(len(scores))


@pytest.mark.parametrize("one_sided", [False, True])
def test_one_sided_noise_is_no_policy_gradient(one_sided):
    """Latent-GRPO's: the derivative of a score's density, ``1 - e^-d``, is negative for no d >= 0."""
    decoder = random_decoder(TINY)
    options = {"top_k": 4, "scores": "all", **({"one_sided": True, "least_noise": -1.5} if one_sided else {})}
    policy = GumbelMixture(options=GumbelMixtureOptions(**options))
    hidden = jnp.tile(jnp.asarray(np.random.default_rng(0).normal(size=8)), (MANY, 1))
    _, record = policy.sample(decoder, hidden, jax.random.split(jax.random.key(0), MANY))

    scores = np.asarray(jax.grad(lambda hidden: policy.log_prob(decoder, hidden, record).sum())(hidden))

    away = np.abs(scores.mean(0)) / (scores.std(0) / np.sqrt(MANY))
    assert (away.max() > 20) if one_sided else (away.max() < 4)


def test_the_bounded_gradient_keeps_values_and_the_sign():
    """For d < 0 and no positive advantage the derivative ``1 - e^-d`` becomes ``e^d - 1``."""
    decoder = random_decoder(TINY)
    options = {"top_k": 3, "scores": "all", "bounded_gradient": True}
    plain, bounded = (
        GumbelMixture(options=GumbelMixtureOptions(**{**options, "bounded_gradient": on})) for on in (False, True)
    )
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8)))
    _, record = plain.sample(decoder, hidden, jax.random.split(jax.random.key(0), 1))
    likely = jnp.take_along_axis(jax.nn.log_softmax(decoder.unembed(hidden)), record.ids, -1)
    record = record._replace(scores=likely + jnp.asarray([[-0.7, 0.4, -0.1]]))

    for advantage, mirrored in ((1.0, [False, False, False]), (-1.0, [True, False, True])):
        given = jnp.asarray([advantage])
        log_prob = lambda h, given=given: bounded.log_prob(decoder, h, record, given).sum()
        value, slope = jax.value_and_grad(log_prob)(hidden)
        distance = np.asarray([-0.7, 0.4, -0.1])
        expected = np.where(mirrored, np.exp(distance) - 1, 1 - np.exp(-distance))
        by_token = jax.jacobian(
            lambda h: jnp.take_along_axis(jax.nn.log_softmax(decoder.unembed(h)), record.ids, -1)[0]
        )(hidden)

        assert value == pytest.approx(float(plain.log_prob(decoder, hidden, record)[0]), abs=1e-12)
        np.testing.assert_allclose(slope, np.einsum("k,kbd->bd", expected, by_token), atol=1e-12)


# --- The gradient of an expected reward ---------------------------------------------------------------------------


def reward_of(tokens, thoughts):
    """Something that depends on what was written and on how long was thought."""
    return jnp.where(tokens[..., 0] % 2 == 0, 1.0, 0.0) - 0.2 * thoughts


def estimate(config, batch, *, rewards):
    """The derivative of the expected reward by scores, with the mean reward as the baseline, and its standard error."""
    scores, samples, written = scores_of(config, batch=batch, count=6 * MANY)
    values = np.asarray(rewards(samples, written))
    products = (values - values.mean()) * scores
    return products.mean(), products.std() / np.sqrt(len(products))


@pytest.mark.slow
def test_the_gradient_of_drawn_tokens_and_stops_is_that_of_all_trajectories():
    """Two thoughts of one token each, a stop before each of them, one token written: every trajectory is enumerated."""
    config = PolicyConfig(kind="drawn_tokens", options={"count": 1}, learnt_stop=True)
    decoder, batch = random_decoder(TINY), questions((2,))
    parts = parts_for(config, decoder, halts=True)
    model = (decoder, parts)

    def expected_reward(model):
        """The sum over thoughts, stops and first tokens of probability times reward, by whole passes."""
        decoder, parts = model
        question = decoder.embed(jnp.asarray(batch.tokens[0, :5][batch.valid[0, :5]]))
        end = decoder.embed(jnp.asarray(batch.tokens[0, -1:]))

        def last_states(inputs):
            rows, T = inputs.shape[:2]
            place = {"positions": jnp.tile(jnp.arange(T), (rows, 1)), "valid": jnp.ones((rows, T), bool)}
            return decoder.trunk(inputs, **place)[0][:, -1]

        total = 0.0
        for count in range(3):
            ids = np.asarray(list(itertools.product(range(VOCAB), repeat=count)), np.int32).reshape(VOCAB**count, count)
            inputs = jnp.tile(question, (len(ids), 1, 1))
            probability = jnp.ones(len(ids))
            for step in range(count + 1):
                hidden = last_states(inputs)
                if step < 2:
                    stop = jax.nn.sigmoid(parts["halt"](decoder, hidden))
                    probability *= stop if step == count else 1 - stop
                if step < count:
                    own = jnp.asarray(ids[:, step])
                    likely = jax.nn.softmax(decoder.unembed(hidden)[:, :VOCAB])
                    probability *= jnp.take_along_axis(likely, own[:, None], 1)[:, 0]
                    inputs = jnp.concatenate([inputs, decoder.embed(own)[:, None]], 1)
            inputs = jnp.concatenate([inputs, jnp.tile(end, (len(ids), 1, 1))], 1)
            written = jax.nn.softmax(decoder.unembed(last_states(inputs))[:, :VOCAB] / 1.3)
            rewards = reward_of(jnp.arange(VOCAB)[:, None], count)
            total += jnp.sum(probability * (written @ rewards))
        return total

    _, exact = quick_jit(lambda model, v: jax.jvp(expected_reward, (model,), (v,)))(model, direction(model))
    # Only the first token is looked at: what is written behind it has a score of mean zero beside it.
    found, error = estimate(config, batch, rewards=lambda samples, written: reward_of(written.tokens, written.thoughts))

    assert abs(exact) > 10 * error
    assert abs(found - exact) < 4 * error


@pytest.mark.slow
def test_the_gradient_of_gaussian_thoughts_is_that_through_the_noise():
    """The same noise under moved parameters: the pathwise derivative of the expected reward, another estimate."""
    config, batch = POLICY_CONFIGS["gaussian"], questions((2,))
    decoder = random_decoder(TINY)
    parts = parts_for(config, decoder)
    count = 6 * MANY
    keys = jax.random.split(jax.random.key(1), count)

    def expected_by_noise(model):
        """Of each noise, the expectation over the first token."""
        decoder, parts = model
        policy = make_policy(config, decoder, parts, vocab_size=VOCAB)
        place = lambda T: {"positions": jnp.tile(jnp.arange(T), (count, 1)), "valid": jnp.ones((count, T), bool)}
        inputs = jnp.tile(decoder.embed(jnp.asarray(batch.tokens[:1, :5])), (count, 1, 1))
        for step in range(2):
            hidden = decoder.trunk(inputs, **place(inputs.shape[1]))[0][:, -1]
            thought, _ = policy.sample(decoder, hidden, jax.vmap(jax.random.fold_in, (0, None))(keys, step))
            inputs = jnp.concatenate([inputs, thought[:, None]], 1)
        inputs = jnp.concatenate(
            [inputs, jnp.tile(decoder.embed(jnp.asarray(batch.tokens[:1, -1:])), (count, 1, 1))], 1
        )
        hidden = decoder.trunk(inputs, **place(inputs.shape[1]))[0][:, -1]
        written = jax.nn.softmax(decoder.unembed(hidden)[:, :VOCAB] / 1.3)
        return written @ reward_of(jnp.arange(VOCAB)[:, None], 2)

    model = (decoder, parts)
    _, by_noise = quick_jit(lambda model, v: jax.jvp(expected_by_noise, (model,), (v,)))(model, direction(model))
    by_noise = np.asarray(by_noise)
    found, error = estimate(config, batch, rewards=lambda samples, written: reward_of(written.tokens, written.thoughts))

    error = np.hypot(error, by_noise.std() / np.sqrt(count))
    assert abs(by_noise.mean()) > 4 * error
    assert abs(found - by_noise.mean()) < 4 * error


# --- Stops, and configs -------------------------------------------------------------------------------------------


def test_probabilities_of_stops_are_those_of_the_number_of_thoughts():
    logits = np.asarray([[0.3, -1.0, 0.5]])
    p = 1 / (1 + np.exp(-logits[0]))
    by_count = [p[0], (1 - p[0]) * p[1], (1 - p[0]) * (1 - p[1]) * p[2], (1 - p[0]) * (1 - p[1]) * (1 - p[2])]

    for count, expected in enumerate(by_count):
        log_probs, decided = stop_log_probs(jnp.asarray(logits), jnp.asarray([count]), 0, 3)
        assert log_probs.sum() == pytest.approx(np.log(expected))
        assert decided.sum() == min(count + 1, 3)
    log_probs, decided = stop_log_probs(jnp.asarray(logits), jnp.asarray([2]), 1, jnp.asarray([2]))
    assert (float(log_probs.sum()), decided.sum()) == (pytest.approx(np.log(1 - p[1])), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gausian"}, "PolicyConfig.kind = 'gausian': did you mean 'gaussian'"),
        ({"kind": "gaussian", "options": {"shares": 1}}, "has no 'shares'; it has: share, learnt, over"),
        ({"kind": "gaussian", "options": {"share": 0.0}}, "GaussianNoiseOptions.share = 0.0: must be positive"),
        ({"kind": "gaussian", "options": {"over": "both"}}, "GaussianNoiseOptions.over"),
        ({"kind": "dropout", "options": {"rate": 1.0}}, "DropoutMasksOptions.rate = 1.0"),
        ({"kind": "drawn_tokens", "options": {"count": 0}}, "DrawnTokensOptions.count = 0"),
        (
            {"kind": "gumbel", "options": {"one_sided": True}},
            "GumbelMixtureOptions.one_sided = True: needs least_noise",
        ),
        ({"kind": "gumbel", "options": {"temperature": 0.0}}, "GumbelMixtureOptions.temperature = 0.0"),
        ({"kind": "gated_token", "options": {"temperature": 1.0}}, "has no 'temperature'; it has: none"),
        ({"least": 1}, "PolicyConfig.least = 1: means nothing without learnt_stop"),
    ],
)
def test_bad_policies_are_refused(settings, message):
    with pytest.raises(CoconutError, match=message):
        PolicyConfig(**settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PolicyConfig(kind="gaussian", options={"learnt": True}), "kind = 'gaussian': needs a part named 'policy'"),
        (PolicyConfig(kind="gated_token"), "needs FeedbackConfig.kind = 'gated'"),
        (PolicyConfig(kind="gaussian_head"), "needs FeedbackConfig.kind = 'gaussian'"),
        (PolicyConfig(learnt_stop=True), "learnt_stop = True: needs a part named 'halt'"),
    ],
)
def test_a_policy_that_needs_what_the_model_has_not_is_refused(config, message):
    decoder = random_decoder(TINY)
    with pytest.raises(CoconutError, match=message):
        make_policy(config, decoder, parts_for(PolicyConfig(), decoder))


def test_a_policy_of_ones_own_is_one_more_entry():
    kind = PolicyKind(make=lambda options, feedback, part, vocab_size: Deterministic(feedback=feedback))
    register_policy("mine", kind)
    try:
        decoder = random_decoder(TINY)
        assert isinstance(
            make_policy(PolicyConfig(kind="mine"), decoder, parts_for(PolicyConfig(), decoder)), Deterministic
        )
        with pytest.raises(CoconutError, match="registered already"):
            register_policy("mine", PolicyKind(make=kind.make))
    finally:
        del POLICIES["mine"]
