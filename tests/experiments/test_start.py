"""The benchmark of starts runs, on sizes that say nothing about speed."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import start


@pytest.mark.slow
def test_each_kind_of_start_is_measured(tmp_path: Path) -> None:
    start.main(["--smoke", "--repeats", "1", "--output", str(tmp_path / "start.json")])
    (case,) = json.loads((tmp_path / "start.json").read_text())["cases"].values()
    assert case["nothing is kept"]["median_seconds"] > 0 and case["warm_ratio"]["ratio"] > 0
