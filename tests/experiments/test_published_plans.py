"""The plans of experiments/benchmarks/plans.py, made again: minutes of two cores each, by ``pytest -m heavy``."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from coconut.commands.configuration import resolve_run
from experiments.benchmarks.plans import PLANS, make, plot_weak_scaling

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "plans"
LARGE = "llama-3.1-8b_v5p-4x4x4"


def check(content: dict, name: str) -> None:
    plan = content["plans"][0]
    assert plan["fits"] and 0 < plan["utilisation"] < 1
    if "generation" in content:
        assert content["generation"]["fits"]
    if name == LARGE:
        assert (plan["batch_size"], plan["columns"], plan["thoughts"]) == (512, 1_024, 6)
        assert plan["utilisation"] >= 0.45


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("name", PLANS)
def test_it_fits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    make(name, tmp_path)
    check(json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")), name)


@pytest.mark.parametrize("name", PLANS)
def test_what_is_recorded_is_what_the_command_plans(name: str) -> None:
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    check(content, name)
    assert "-dirty" not in content["provenance"]["commit"]
    flags, plan = PLANS[name], content["plans"][0]
    assert plan["topology"] == flags[flags.index("--topology") + 1]
    # A recipe that is planned as it is does not say its batch size again.
    files = [value for flag, value in itertools.pairwise(flags) if flag == "--gin_file"]
    bindings = [flag.removeprefix("--gin.") for flag in flags if flag.startswith("--gin.")]
    assert plan["batch_size"] == resolve_run(files, bindings).pipeline.batch_size
    assert plan["thoughts"] == int(flags[flags.index("--thoughts") + 1])


def test_weak_scaling_is_shown_from_4_to_512_chips() -> None:
    figure = plot_weak_scaling(RESULTS)
    chips, seconds = np.asarray(figure.axes[0].lines[0].get_data())
    assert chips.tolist() == [4, 8, 32, 64, 128, 512]
    assert (seconds > 0).all()
