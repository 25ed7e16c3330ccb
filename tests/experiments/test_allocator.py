"""The benchmark of memory that stays runs, on sizes that say nothing about speed."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import allocator


@pytest.mark.slow
def test_both_sides_are_measured(tmp_path: Path) -> None:
    allocator.main(["--smoke", "--repeats", "1", "--case", "training_a", "--output", str(tmp_path / "found.json")])
    case = json.loads((tmp_path / "found.json").read_text())["cases"]["training_a"]
    assert case["ratio"] > 0 and min(case[side]["peak_bytes"] for side in ("kept", "given back")) > 1e8
