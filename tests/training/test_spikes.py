"""Steps whose gradient is far longer than those before it: which they are, and what becomes of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.losses import Loss, Ratio
from coconut.methods import METHODS
from coconut.methods.method import LossContext, Views
from coconut.model import Model
from coconut.training.spikes import LEAST_DEVIATION, NORMAL, SpikeConfig, SpikeWindow, judge
from coconut.training.step import skipped_of
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import LANGUAGE, assert_same_run, interrupt_at, lines_of, skipped_steps, trained

RULE = SpikeConfig(window=8, deviations=3.0, most_in_a_row=2)


def spikes_of(norms: np.ndarray, rule: SpikeConfig) -> list[bool]:
    """The rule, one norm after the other, with a list."""
    window: list[float] = []
    found: list[bool] = []
    for norm in map(float, np.log(norms)):
        last = window[-rule.window :]
        above = False
        if len(last) == rule.window:
            median = np.median(last)
            deviation = max(NORMAL * np.median(np.abs(np.asarray(last) - median)), LEAST_DEVIATION)
            above = norm - median > rule.deviations * deviation
        spike = above and found[-rule.most_in_a_row :] != [True] * rule.most_in_a_row
        found.append(bool(spike))
        if not spike:
            window = [norm] if above else [*window, norm]
    return found


def test_the_rule_is_that_of_a_list_of_norms() -> None:
    draw = np.random.default_rng(0)
    norms = np.exp(draw.normal(0.0, 0.3, 300)).astype(np.float32)
    norms[draw.choice(300, 30, replace=False)] *= 50
    norms[150:] *= 100  # What goes on is no spike.
    norms[220:230] = 1.0  # Nor is what is short.

    def step(window: SpikeWindow, norm: jax.Array) -> tuple[SpikeWindow, jax.Array]:
        spike, window = judge(window, norm, RULE)
        return window, spike

    _, found = jax.lax.scan(step, SpikeWindow.fresh(RULE.window), jnp.asarray(norms))
    expected = spikes_of(norms, RULE)
    assert found.tolist() == expected
    assert not any(expected[: RULE.window]) and 20 < sum(expected) < 80 and expected[150:153] == [True, True, False]


def test_a_step_of_several_updates_is_skipped_if_one_is_not_finite_or_all_are_spikes() -> None:
    def skipped(flags: int, spikes: int) -> float:
        ratio = lambda total: Ratio(jnp.asarray(float(total)), jnp.asarray(3.0))
        return float(skipped_of({"skipped": ratio(flags), "spikes": ratio(spikes)}, 3).mean())

    assert [skipped(0, 0), skipped(1, 1), skipped(2, 2), skipped(3, 3), skipped(2, 1), skipped(1, 0)] == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]


@pytest.fixture
def one_long_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss of the batches that hold example 3 a hundred times what it is."""
    method = METHODS["no_cot"]

    def loss(model: Model, views: Views, context: LossContext) -> Loss:
        terms, metrics = method.loss(model, views, context)
        factor = jnp.where((views["main"].examples == 3).any(), 100.0, 1.0)
        ratio = terms["language"].ratio
        longer = terms["language"]._replace(ratio=ratio._replace(total=ratio.total * factor))
        return Loss({"language": longer}, metrics)

    monkeypatch.setitem(METHODS, "no_cot", dataclasses.replace(method, loss=loss))


@pytest.mark.usefixtures("compiled_once", "one_long_gradient")
@pytest.mark.slow
def test_a_run_skips_spikes_and_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"log_every": 1, "curriculum": {"steps_per_stage": 20}, **LANGUAGE}
    rule = SpikeConfig(window=8, deviations=8.0)
    config = tiny_run(spikes=rule, **changes)
    trained(config, tmp_path / "whole")
    events = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    skips = [event for event in events if event["kind"] == "skip"]
    assert {event["why"] for event in skips} == {"is a spike"}
    assert [event["step"] for event in skips] == skipped_steps(tmp_path / "whole")
    # An example is in one batch of an epoch of six, and each stage fills its window first.
    assert skips and all(3 in event["examples"] and (event["step"] - 1) % 20 >= rule.window for event in skips)
    with monkeypatch.context() as patched:
        interrupt_at(patched, skips[0]["step"] - 3)
        trained(config, tmp_path / "stopped")
    trained(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    # Without the rule it is another run.
    trained(tiny_run(**changes), tmp_path / "without")
    assert not skipped_steps(tmp_path / "without")
    assert lines_of(tmp_path / "without", "train")[-1]["loss"] != lines_of(tmp_path / "whole", "train")[-1]["loss"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 7}, r"SpikeConfig\.window = 7: must be at least 8"),
        ({"deviations": 0.0}, r"SpikeConfig\.deviations = 0\.0: must be positive"),
        ({"most_in_a_row": 0}, r"SpikeConfig\.most_in_a_row = 0: must be at least 1"),
        ({"most_in_a_row": 10}, r"SpikeConfig\.most_in_a_row = 10: must be below .* RunConfig\.max_skipped_steps = 10"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        tiny_run(spikes=SpikeConfig(**fields))
