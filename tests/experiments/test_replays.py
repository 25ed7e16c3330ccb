"""The benchmark of replays knows every policy, and measures what it says."""

import pytest

from coconut.latent.policies.config import POLICIES
from experiments.benchmarks import replays
from tests.tiny_models import quick_compilation


def test_every_kind_of_policy_is_measured():
    found = replays.policies()

    assert {policy.kind for policy, _ in found.values()} == set(POLICIES)
    assert any(policy.learnt_stop for policy, _ in found.values())


@pytest.mark.slow
def test_an_update_says_how_its_thoughts_came_about_and_what_it_takes():
    known = {name: own for name, own in replays.policies().items() if name in ("deterministic", "gaussian")}
    with quick_compilation():
        found = replays.measure(replays.SMOKE, 2, 1, known)["policies"]

    assert {name: own["replay"] for name, own in found.items()} == {
        "deterministic": "one after the other",
        "gaussian": "one parallel pass",
    }
    assert found["gaussian"]["update_over_gaussian"]["ratio"] == 1
    for own in found.values():
        assert 0 < own["values"]["temporary_bytes"] < own["update"]["temporary_bytes"]
        assert own["sample"]["median_seconds"] > 0
