"""Rewards, advantages and objectives against tables and loops, and what configs refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.policies.config import PolicyConfig
from coconut.latent.sampling import Draws
from coconut.tasks import get_task
from coconut.training.reinforcement import (
    ReinforcementConfig,
    advantages,
    averaged,
    divergence,
    first_thoughts_that_count,
    surrogate,
    together,
)
from coconut.training.rewards import REWARDS, Sample, Setting, register_reward, score
from coconut.types import Example
from tests.tiny_runs import tiny_run

SETTING = Setting(task=get_task("gsm8k"), answer_prefix="### ", max_new_tokens=10)
EXAMPLE = Example(question="1 + 1?", steps=(), answer="2")


def samples_of(*rows, group=4):
    """Samples of (text, thoughts, new tokens, ended)."""
    return [
        Sample(example=EXAMPLE, question=i // group, text=text, thoughts=thoughts, new_tokens=tokens, ended=ended)
        for i, (text, thoughts, tokens, ended) in enumerate(rows)
    ]


SAMPLES = samples_of(
    ("### 2", 3, 2, True),
    ("### 2", 1, 8, True),
    ("### 3", 1, 9, True),
    ("2 ### 2 ### 2", 0, 10, False),
    # The second question, all of whose samples are right.
    *(("### 2", thoughts, 2, True) for thoughts in (4, 2, 2, 0)),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("answer", [1, 1, 0, 1, 1, 1, 1, 1]),
        ("format", [1, 1, 1, 0, 1, 1, 1, 1]),
        ("thoughts", [3, 1, 1, 0, 4, 2, 2, 0]),
        ("shorter", [0, 0, 0, 0, -0.5, 0, 0, 0.5]),
        ("overlong", [0, 0, -0.5, -1, 0, 0, 0, 0]),
    ],
)
def test_rewards(name, expected):
    assert REWARDS[name](SAMPLES, SETTING) == expected


def test_rewards_are_weighed():
    total, parts = score(SAMPLES, SETTING, {"answer": 1.0, "thoughts": -0.1})
    np.testing.assert_allclose(total, [0.7, 0.9, -0.1, 1.0, 0.6, 0.8, 0.8, 1.0])
    assert parts.keys() == {"answer", "thoughts"}


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], r"reward 'mine': gave values of shape \(1,\) for 8 samples"),
     ([1.0] * 3 + [float("nan")] * 5, "reward 'mine': gave nan for the text '2 ### 2 ### 2'")],
)  # fmt: skip
def test_a_reward_of_ones_own_has_to_give_a_finite_number_for_each_sample(values, message, monkeypatch):
    monkeypatch.setattr("coconut.training.rewards.REWARDS", dict(REWARDS))
    register_reward("mine", lambda samples, setting: values)
    with pytest.raises(CoconutError, match=message):
        score(SAMPLES, SETTING, {"mine": 1.0})
    with pytest.raises(CoconutError, match="registered already"):
        register_reward("mine", lambda samples, setting: [])


# --- Advantages ---------------------------------------------------------------------------------------------------


def test_advantages_of_each_kind():
    rewards = np.asarray([[1.0, 0.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3]])
    of = lambda kind: advantages(rewards, ReinforcementConfig(group=4, advantage=kind, advantage_epsilon=0.0))
    with np.errstate(invalid="ignore"):
        standardized, dead = of("standardized")
    np.testing.assert_allclose(standardized[0], np.asarray([0.75, -0.25, -0.25, -0.25]) / np.sqrt(3 / 16))
    np.testing.assert_allclose(of("centered")[0][0], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(of("leave_one_out")[0][0], [1.0, -1 / 3, -1 / 3, -1 / 3])
    assert dead.tolist() == [False, True]
    for kind in ("centered", "leave_one_out"):
        assert not of(kind)[0][1].any(), "rounding of a mean is no advantage"
    found, _ = advantages(rewards, ReinforcementConfig(group=4))
    assert not found[1].any()


def test_the_best_first_thought_of_a_group():
    advantage = np.asarray([[1.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    first = np.asarray([[-3.0, -2.0, -1.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    np.testing.assert_array_equal(first_thoughts_that_count(advantage, first), [[0, 1, 0, 0], [0, 0, 0, 0]])
    # One that thought nothing has no first thought.
    first[0, 1] = -np.inf
    np.testing.assert_array_equal(first_thoughts_that_count(advantage, first)[0], [1, 0, 0, 0])


# --- Objectives ---------------------------------------------------------------------------------------------------

LOG_RATIOS = np.log(np.asarray([[1.0, 1.5, 0.5, 5.0], [1.1, 0.9, 1.0, 1.0]]))
TAKEN = np.asarray([[True, True, True, True], [True, True, False, False]])


def surrogate_of(config, advantage):
    behaviour = np.full(LOG_RATIOS.shape, -1.0)
    spread = np.broadcast_to(np.asarray(advantage)[:, None], LOG_RATIOS.shape)
    log_probs, behaviour, taken, spread = map(jnp.asarray, (behaviour + LOG_RATIOS, behaviour, TAKEN, spread))
    return map(np.asarray, surrogate(log_probs, behaviour, taken, spread, config))


def test_ratios_are_clipped_where_they_would_gain():
    value, ratio, clipped = surrogate_of(ReinforcementConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0), [2.0, -2.0])
    np.testing.assert_allclose(ratio, np.exp(LOG_RATIOS), rtol=1e-6)
    np.testing.assert_allclose(value[0], [2.0, 2.6, 1.0, 2.6], rtol=1e-6)
    np.testing.assert_allclose(value[1], [-2.2, -1.8, -2.0, -2.0], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[0, 1, 0, 1], [0, 0, 0, 0]])

    value, _, clipped = surrogate_of(ReinforcementConfig(dual_clip=3.0), [-2.0, -2.0])
    np.testing.assert_allclose(value[0], [-2.0, -3.0, -1.6, -6.0], rtol=1e-6)
    np.testing.assert_array_equal(clipped[0], [0, 0, 1, 0])

    value, _, clipped = surrogate_of(ReinforcementConfig(clip_low=None, clip_high=None), [2.0, -2.0])
    np.testing.assert_allclose(value[0], [2.0, 3.0, 1.0, 10.0], rtol=1e-6)
    assert not clipped.any()


def test_a_ratio_of_the_sequence_is_the_geometric_mean_of_its_actions():
    config = ReinforcementConfig(ratio="sequence", clip_low=0.05, clip_high=0.05)
    value, ratio, _ = surrogate_of(config, [2.0, -2.0])
    means = [(1.5 * 0.5 * 5.0) ** 0.25, (1.1 * 0.9) ** 0.5]
    np.testing.assert_allclose(ratio, np.broadcast_to(np.asarray(means)[:, None], ratio.shape), rtol=1e-6)
    np.testing.assert_allclose(value[:, 0], [2 * 1.05, -2 * means[1]], rtol=1e-6)


def test_estimates_of_the_divergence():
    """k1 and k3 have the divergence as their mean over draws of the policy itself; k2 is half of a square."""
    own, reference = np.log([0.7, 0.2, 0.1]), np.log([0.5, 0.3, 0.2])
    exact = np.sum(np.exp(own) * (own - reference))
    of = lambda kind: np.asarray(divergence(jnp.asarray(own)[None], jnp.asarray(reference)[None], kind))[0]
    assert np.sum(np.exp(own) * of("k1")) == pytest.approx(exact, rel=1e-5)
    assert np.sum(np.exp(own) * of("k3")) == pytest.approx(exact, rel=1e-5)
    assert (of("k3") >= 0).all()
    np.testing.assert_allclose(of("k2"), 0.5 * (own - reference) ** 2, rtol=1e-5)


def test_gradients_of_the_divergence():
    """Over draws of the policy: of k1 and k2 its own, of k3 that of the divergence the other way round."""
    logits, reference = jnp.asarray([0.4, -0.3, 0.1]), jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    own = jax.nn.log_softmax(logits)

    def by_draws(kind):
        mean = lambda logits: jnp.sum(
            jnp.exp(own) * divergence(jax.nn.log_softmax(logits)[None], reference[None], kind)[0]
        )
        return jax.grad(mean)(logits)

    forward = jax.grad(lambda logits: jnp.sum(jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - reference)))(
        logits
    )
    backward = jax.grad(lambda logits: -jnp.sum(jnp.exp(reference) * jax.nn.log_softmax(logits)))(logits)
    assert np.abs(forward - backward).max() > 0.01
    for kind, expected in (("k1", forward), ("k2", forward), ("k3", backward)):
        np.testing.assert_allclose(by_draws(kind), expected, atol=1e-6)


def test_means_over_actions_and_samples():
    values, counted = np.asarray([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 99.0, 99.0], [7.0] * 4]), [True, True, False]
    taken = np.asarray([*TAKEN, [True] * 4])
    of = lambda **settings: averaged(
        jnp.asarray(values), jnp.asarray(taken), jnp.asarray(counted), ReinforcementConfig(**settings)
    )
    for settings, total, weight in (
        ({"average": "sample"}, 2.5 + 15.0, 2),
        ({"average": "action"}, 40.0, 6),
        ({"average": "constant", "constant": 4.0}, 2.5 + 7.5, 2),
    ):
        found = of(**settings)
        assert (float(found.total), float(found.weight)) == (pytest.approx(total), weight)


def test_kinds_of_actions_side_by_side():
    draws = lambda value, columns: Draws(jnp.full((2, columns), value), jnp.ones((2, columns), bool))
    actions = {"tokens": draws(1.0, 3), "thoughts": draws(2.0, 2), "stops": draws(3.0, 2)}
    found = together(actions, ReinforcementConfig(thoughts_factor=0.5))
    assert found["log_probs"][0].tolist() == [3, 3, 2, 2, 1, 1, 1]
    assert found["weights"][0].tolist() == [1, 1, 0.5, 0.5, 1, 1, 1]
    assert found["first"][0].tolist() == [False, False, True, False, False, False, False]


# --- Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 1}, "ReinforcementConfig.group = 1: must be at least 2"),
        ({"temperature": 0.0}, "ReinforcementConfig.temperature = 0.0: must be positive"),
        ({"rewards": {}}, "rewards = {}: there must be at least one"),
        ({"rewards": {"anwser": 1.0}}, "no reward is named 'anwser', did you mean 'answer'"),
        ({"rewards": {"answer": float("inf")}}, "the weight of 'answer' is inf"),
        ({"clip_low": None}, "clip_high = 0.2: clip_low = None: give both or none"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0: must be None or above 1"),
        ({"constant": 32.0}, "constant = 32.0"),
        ({"minibatches": 0}, "minibatches = 0: must be at least 1"),
        ({"advantage": "best"}, "ReinforcementConfig.advantage"),
        (
            {"best_first_thought": True},
            "best_first_thought = True: PolicyConfig.kind = 'deterministic' draws no thought",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(CoconutError, match=message):
        ReinforcementConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"minibatches": 3}, "minibatches = 3: with microbatches = 1 it must divide the samples of a step, 64"),
        ({}, {"kl_weight": 0.1}, "kl_weight = 0.1: needs a model that the run starts from"),
        ({}, {"policy": PolicyConfig(kind="gumbel")}, "draws around what FeedbackConfig.kind = 'mixture' thinks"),
        ({}, {"policy": PolicyConfig(learnt_stop=True)}, "learnt_stop = True: needs a RunConfig.halting"),
        ({"pipeline": {"length_buckets": (9,)}}, {"dead_groups": "resample"}, "dead_groups = 'resample': takes"),
        ({"curriculum": {"advance_metric": "loss", "advance_below": 1.0}}, {}, "advance_metric = 'loss': a run that"),
        ({"sampling": {"top_k": 3}}, {}, "top_k = 3: samples to learn from are drawn from all tokens"),
    ],
)
def test_runs_that_cannot_learn_from_rewards_so_are_refused(changes, settings, message):
    with pytest.raises(CoconutError, match=message):
        tiny_run(**changes, reinforcement=ReinforcementConfig(**settings))


def test_a_config_comes_back_from_json():
    from coconut.training.config import run_config_from_json, to_json

    config = tiny_run(
        reinforcement=dataclasses.replace(ReinforcementConfig(group=4, rewards={"answer": 1.0, "format": 0.1}))
    )
    assert run_config_from_json(to_json(config), "here") == config
