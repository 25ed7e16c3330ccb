"""Two checkouts take turns, on a benchmark of two lines."""

import json
from pathlib import Path

import pytest

from coconut.errors import CoconutError
from experiments.benchmarks import two_checkouts

BENCHMARK = """
import json, sys, time
from experiments.benchmarks import timing

def main(arguments):
    calls = []
    wait = lambda name, seconds: lambda: (calls.append(name), time.sleep(seconds))
    if arguments == ["--fail"]:
        raise SystemExit(1)
    seconds = timing.interleave({"quick": wait("quick", 0.001), NAME: wait(NAME, SECONDS)}, 99, title="")
    print(json.dumps({"calls": calls, "counted": {name: len(x) for name, x in seconds.items()}}))
"""


def checkout(folder: Path, name: str, seconds: float) -> Path:
    package = folder / "experiments" / "benchmarks"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "timing.py"):
        file.touch()
    (package / "waiting.py").write_text(BENCHMARK.replace("NAME", repr(name)).replace("SECONDS", str(seconds)))
    return folder


def test_what_both_have_is_timed_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = checkout(tmp_path / "before", "slow", 0.01), checkout(tmp_path / "after", "slow", 0.05)
    options = ["--before", str(before), "--after", str(after), "--benchmark", "waiting", "--repeats", "2"]
    two_checkouts.main([*options, "--output", str(tmp_path / "result.json"), "--"])
    result = json.loads((tmp_path / "result.json").read_text())["cases"]["waiting"]
    assert result["variants"]["slow"]["before"]["min_seconds"] >= 0.01
    assert result["variants"]["slow"]["after"]["min_seconds"] >= 0.05
    assert {"after_over_before", "after_over_before_lower_quartile"} < result["variants"]["slow"].keys()
    for side in ("before", "after"):
        # Twice in a row, in one round that does not count and two that do, every second one backwards.
        order = ["quick", "quick", "slow", "slow"]
        assert result[side] == {"calls": [*order, *order[::-1], *order], "counted": {"quick": 2, "slow": 2}}
    other = checkout(tmp_path / "other", "another", 0.0)
    found = two_checkouts.compare(before, other, "waiting", [], 1)
    assert list(found["variants"]) == ["quick"]
    with pytest.raises(CoconutError, match="its benchmark ended before its variants were timed"):
        two_checkouts.compare(before, other, "waiting", ["--fail"], 1)
