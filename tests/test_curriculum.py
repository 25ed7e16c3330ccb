"""The curriculum to the letter of Hao et al. 2024 and its official code: plans, drawn stages, and how a stage ends."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.curriculum import (
    CurriculumConfig,
    Replacement,
    draw_stage,
    drawable_stages,
    has_learnt,
    replace_steps,
    stage_steps,
)
from coconut.errors import CoconutError


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Turns the tests' own type checks off: a user meets the message of the dataclass itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


small = st.integers(0, 5)
steps_counts = st.integers(0, 8)
stages = st.integers(0, 8)
unit = st.floats(0, 1, exclude_max=True)
curricula = st.builds(
    CurriculumConfig,
    c_thought=small,
    max_latent_stage=small,
    pad_latent_to_max=st.booleans(),
    uniform_prob=st.sampled_from((0.0, 0.3, 1.0)),
    uniform_stages=st.sampled_from(("all", "reached")),
)
by_thoughts = st.builds(
    CurriculumConfig,
    c_thought=st.integers(1, 4),
    max_latent_stage=small,
    stage_adds=st.just("thought"),
    uniform_prob=st.just(1.0),
    uniform_stages=st.sampled_from(("all", "reached")),
    stage_weights=st.sampled_from(("equal", "rising")),
)


@given(config=curricula, stage=stages, num_steps=steps_counts)
def test_up_to_the_last_latent_stage_a_stage_swaps_as_many_steps_for_thoughts(config, stage, num_steps):
    replaced = replace_steps(config, min(stage, config.max_latent_stage), num_steps)
    stage = min(stage, config.max_latent_stage)
    assert replaced.skipped == min(stage, num_steps)
    # Also for an example that has fewer steps than that.
    assert replaced.thoughts == stage * config.c_thought


@given(config=curricula, beyond=st.integers(1, 5), num_steps=steps_counts)
def test_past_it_every_step_is_skipped_and_padding_decides_on_the_thoughts(config, beyond, num_steps):
    replaced = replace_steps(config, config.max_latent_stage + beyond, num_steps)
    assert replaced.skipped == num_steps
    if config.pad_latent_to_max:
        assert replaced.thoughts == config.c_thought * config.max_latent_stage
    else:
        assert replaced.thoughts == config.c_thought * min(num_steps, config.max_latent_stage)


def test_the_papers_own_numbers():
    prosqa = CurriculumConfig()
    assert [replace_steps(prosqa, stage, 4) for stage in (0, 1, 4, 5, 6, 7)] == [
        Replacement(0, 0),
        Replacement(1, 1),
        Replacement(4, 4),
        Replacement(4, 5),
        Replacement(4, 6),
        Replacement(4, 6),
    ]
    gsm8k = CurriculumConfig(c_thought=2, max_latent_stage=3, epochs_per_stage=3.0)
    assert [replace_steps(gsm8k, stage, 5) for stage in (1, 3, 4)] == [
        Replacement(1, 2),
        Replacement(3, 6),
        Replacement(5, 6),
    ]
    assert replace_steps(dataclasses.replace(gsm8k, pad_latent_to_max=False), 4, 2) == Replacement(2, 4)
    assert (gsm8k.final_stage, gsm8k.max_thoughts) == (4, 6)
    assert dataclasses.replace(gsm8k, last_stage=2).final_stage == 2


@given(config=curricula, stage=stages, num_steps=steps_counts, uniform=unit, choice=unit)
def test_an_examples_stage_is_the_runs_or_drawn(config, stage, num_steps, uniform, choice):
    drawn = draw_stage(config, stage, num_steps, uniform, choice)
    last = num_steps if config.uniform_stages == "all" else stage
    if uniform >= config.uniform_prob:
        assert drawn == stage
    else:
        assert drawn == int(choice * (last + 1))
        assert 0 <= drawn <= last
    # The shape of a batch is made for these.
    assert drawn in {stage, *drawable_stages(config, stage, num_steps)}


@given(stage=stages, num_steps=steps_counts, uniform=unit, choice=unit)
def test_probability_0_never_draws_and_1_always_does(stage, num_steps, uniform, choice):
    never, always = CurriculumConfig(uniform_prob=0.0), CurriculumConfig(uniform_prob=1.0)
    assert draw_stage(never, stage, num_steps, uniform, choice) == stage
    assert list(drawable_stages(never, stage, num_steps)) == []
    assert draw_stage(always, stage, num_steps, uniform, choice) == int(choice * (num_steps + 1))


@pytest.mark.parametrize("uniform_stages,expected", [("all", {0, 1, 2, 3}), ("reached", {0, 1, 2, 3, 4, 5})])
def test_every_stage_of_the_range_can_be_drawn(uniform_stages, expected):
    config = CurriculumConfig(uniform_prob=1.0, uniform_stages=uniform_stages)
    draws = [draw_stage(config, 5, 3, 0.0, i / 600) for i in range(600)]
    assert set(draws) == expected
    assert {draws.count(stage) for stage in expected} == {600 // len(expected)}


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_stage_mixing_draws_an_earlier_or_equal_stage_with_a_probability_that_rises(stage):
    mixing = CurriculumConfig(uniform_prob=1.0, uniform_stages="reached", stage_weights="rising")
    total = (stage + 1) * (stage + 2) // 2
    draws = Counter(draw_stage(mixing, stage, 3, 0.5, i / (20 * total)) for i in range(20 * total))
    assert draws == {i: 20 * (i + 1) for i in range(stage + 1)}
    # The largest draw there is.
    assert draw_stage(mixing, stage, 3, 0.5, math.nextafter(1.0, 0.0)) == stage


@given(config=by_thoughts, num_steps=steps_counts, stage=st.integers(0, 30), choice=unit)
def test_stages_that_add_a_thought_meet_those_that_add_a_step_at_each_whole_step(config, num_steps, stage, choice):
    whole = dataclasses.replace(config, stage_adds="step")
    for step in range(config.max_latent_stage + 1):
        assert replace_steps(config, step * config.c_thought, num_steps) == replace_steps(whole, step, num_steps)
    assert config.latent_stages == config.max_thoughts == config.final_stage - 1
    assert replace_steps(config, config.final_stage, num_steps) == replace_steps(whole, whole.final_stage, num_steps)
    assert draw_stage(config, stage, num_steps, 0.0, choice) in drawable_stages(config, stage, num_steps)


def test_a_thought_takes_its_share_of_a_step():
    three = CurriculumConfig(c_thought=3, max_latent_stage=2, stage_adds="thought", uniform_prob=1.0)
    third = Fraction(1, 3)
    replaced = [replace_steps(three, stage, 4) for stage in range(9)]
    assert [one.thoughts for one in replaced] == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert [one.skipped + one.share for one in replaced] == [i * third for i in range(7)] + [4, 4]
    # An example of one step has nothing left to share.
    assert replace_steps(three, 4, 1) == Replacement(1, 4)
    # Every stage up to the one that replaces both steps.
    assert drawable_stages(three, 1, 2) == range(7)
    assert stage_steps(three, 7, 10) == 50


def test_a_stage_lasts_epochs_or_steps_and_the_last_one_longer():
    epochs = CurriculumConfig(epochs_per_stage=2.5, max_latent_stage=2, last_stage_factor=3.0)
    assert [stage_steps(epochs, stage, 10) for stage in range(4)] == [25, 25, 25, 75]
    steps = CurriculumConfig(epochs_per_stage=None, steps_per_stage=7, last_stage=1, last_stage_factor=2.0)
    assert [stage_steps(steps, stage, 10) for stage in range(2)] == [7, 14]
    # However small the share of an epoch, a stage takes a step.
    assert stage_steps(CurriculumConfig(epochs_per_stage=0.001), 0, 10) == 1


def test_the_stage_a_run_begins_with_may_last_longer():
    larger = CurriculumConfig(epochs_per_stage=1, max_latent_stage=2, first_stage_factor=3.0)
    assert [stage_steps(larger, stage, 10) for stage in range(4)] == [30, 10, 10, 10]
    # It is the first of the run, not the stage of number 0.
    later = dataclasses.replace(larger, first_stage=1)
    assert [stage_steps(later, stage, 10) for stage in range(1, 4)] == [30, 10, 10]


def test_the_last_stage_takes_the_epochs_that_the_earlier_ones_leave():
    prosqa = CurriculumConfig(total_epochs=50)
    assert [stage_steps(prosqa, stage, 140) for stage in range(8)] == 7 * [700] + [2100]
    # A method of one stage trains as long as the others.
    assert stage_steps(dataclasses.replace(prosqa, last_stage=0), 0, 140) == 7000
    # Shares of an epoch are rounded stage by stage; their sum is still that of the run.
    odd = CurriculumConfig(max_latent_stage=2, epochs_per_stage=0.5, first_stage_factor=3.0, total_epochs=5)
    assert [stage_steps(odd, stage, 7) for stage in range(4)] == [10, 4, 4, 17]


def test_a_metric_ends_a_stage_past_its_bound_only():
    assert not has_learnt(CurriculumConfig(), {"loss": 0.0})
    below = CurriculumConfig(advance_metric="loss", advance_below=0.5)
    assert [has_learnt(below, {"loss": value}) for value in (0.4, 0.5, 0.6, float("nan"))] == [True] + 3 * [False]
    above = CurriculumConfig(advance_metric="accuracy", advance_above=0.5)
    assert [has_learnt(above, {"accuracy": value}) for value in (0.4, 0.5, 0.6, float("nan"))] == [
        False,
        False,
        True,
        False,
    ]
    with pytest.raises(CoconutError, match="advance_metric = 'loss' is none of accuracy, first_loss"):
        has_learnt(below, {"first_loss": 0.1, "accuracy": 1.0})


@pytest.mark.parametrize(
    "field,value",
    [
        ("c_thought", -1),
        ("c_thought", 1.5),
        ("c_thought", 2**31),
        ("max_latent_stage", 2**31),
        ("max_latent_stage", -2),
        ("uniform_prob", 1.01),
        ("uniform_prob", -0.01),
        ("uniform_prob", float("nan")),
        ("uniform_stages", "some"),
        ("stage_weights", "falling"),
        ("stage_adds", "token"),
        ("reset_optimizer", "always"),
        ("last_stage", -1),
        ("last_stage", 1.5),
        ("last_stage", 2**31),
        ("epochs_per_stage", 0.0),
        ("epochs_per_stage", float("inf")),
        ("first_stage_factor", 0.0),
        ("last_stage_factor", -1.0),
        ("total_epochs", -2.0),
        ("total_epochs", 35),
        ("advance_window", 0),
        ("advance_metric", "loss"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(unchecked_types: None, field: str, value: Any):
    with pytest.raises(CoconutError) as error:
        CurriculumConfig(**{field: value})
    assert f"CurriculumConfig.{field} = {value!r}" in str(error.value)


@pytest.mark.parametrize(
    "field,values",
    [
        ("steps_per_stage", {"epochs_per_stage": 2.0, "steps_per_stage": 3}),
        ("steps_per_stage", {"epochs_per_stage": None}),
        ("steps_per_stage", {"epochs_per_stage": None, "steps_per_stage": 0}),
        ("total_epochs", {"total_epochs": 50, "last_stage_factor": 3.0}),
        ("total_epochs", {"total_epochs": 50, "epochs_per_stage": None, "steps_per_stage": 3}),
        ("stage_weights", {"stage_weights": "rising"}),
        ("stage_adds", {"stage_adds": "thought", "c_thought": 0}),
        # Looking at each of so many stages took for ever.
        ("max_latent_stage", {"stage_adds": "thought", "c_thought": 9999, "max_latent_stage": 9999, "total_epochs": 9}),
        ("advance_metric", {"advance_below": 0.5}),
        ("advance_metric", {"advance_metric": "loss", "advance_below": 0.5, "advance_above": 0.6}),
    ],
)
def test_values_that_do_not_go_together_are_named(field: str, values: dict[str, Any]):
    with pytest.raises(CoconutError) as error:
        CurriculumConfig(**values)
    assert f"CurriculumConfig.{field} = {values.get(field)!r}" in str(error.value)
