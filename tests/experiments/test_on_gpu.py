"""The program for a GPU, rehearsed on a CPU: parts are stopped, resumed and left out, and one that fails ends alone."""

import json
import time

import pytest

from coconut.errors import CoconutError
from experiments.on_gpu import __main__ as on_gpu
from experiments.on_gpu.record import DONE, FAILED, STOPPED, UNFINISHED, Record
from experiments.on_gpu.sides import compare


@pytest.fixture
def quick(monkeypatch):
    """Programs that are compiled fast, in the processes of the parts, too."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def read(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.mark.slow
def test_a_part_is_stopped_at_its_limit_and_the_others_run_and_are_not_made_again(tmp_path, quick, capsys):
    asked = ["--output", str(tmp_path), "--smoke", "--only", "training_step", "kernels", "--commit", "abc123"]
    limits = ["--limit", "training_step=0.5", "kernels=400", "--seconds", "500"]
    assert on_gpu.main([*asked, *limits]) == 1
    stopped, done = read(tmp_path, "training_step"), read(tmp_path, "kernels")
    assert stopped["state"] == STOPPED and not stopped["measurements"]
    assert done["state"] == DONE and not done["failed"]
    assert done["runs"][0]["provenance"]["commit"] == "abc123"
    assert set(done["measurements"]) == {
        "flash_attention, smoke, forward, float32",
        "flash_attention, smoke, backward, float32",
        "decode_attention, smoke, float32",
        "linear_cross_entropy, smoke, float32",
    }
    before = (tmp_path / "kernels.json").read_bytes()
    assert on_gpu.main([*asked, "--limit", "training_step=0.5", "kernels=0.5"]) == 1
    assert (tmp_path / "kernels.json").read_bytes() == before
    assert "=== kernels: done before" in capsys.readouterr().out


def test_no_time_left_begins_no_part(tmp_path, capsys):
    assert on_gpu.main(["--output", str(tmp_path), "--smoke", "--only", "memory", "--seconds", "1"]) == 1
    assert "memory: left for another time" in capsys.readouterr().out
    assert not (tmp_path / "memory.json").exists()


def test_a_record_keeps_what_it_has(tmp_path):
    """Stopped, resumed, failed and mended: each measurement is made once, and those behind a failure are made."""
    made = []

    def measurement(name, error=None):
        def measure(progress):
            made.append(name)
            progress({"half of": name})
            if error:
                raise error
            return {"value": name}

        return measure

    record = Record(tmp_path, "part", smoke=False)
    with pytest.raises(KeyboardInterrupt):
        record.measure({"a": measurement("a"), "b": measurement("b", KeyboardInterrupt())}, {"provenance": "first"})
    content = read(tmp_path, "part")
    assert content["state"] == UNFINISHED and content["measurements"]["a"]["value"] == "a"
    assert content["on the way"] == {"b": {"run": 0, "half of": "b"}}

    record = Record(tmp_path, "part", smoke=False)
    rest = {"a": measurement("a"), "b": measurement("b", ValueError("no such device")), "c": measurement("c")}
    record.measure(rest, {"provenance": "second"})
    content = read(tmp_path, "part")
    assert content["state"] == FAILED and content["failed"] == {"b": "ValueError: no such device"}
    assert content["measurements"]["c"]["run"] == 1

    Record(tmp_path, "part", smoke=False).measure({"b": measurement("b")}, {"provenance": "third"})
    content = read(tmp_path, "part")
    assert content["state"] == DONE and not content["failed"] and content["measurements"]["b"]["run"] == 2
    assert [run["provenance"] for run in content["runs"]] == ["first", "second", "third"]
    assert made == ["a", "b", "b", "c", "b"]
    with pytest.raises(CoconutError, match="another folder"):
        Record(tmp_path, "part", smoke=True)


@pytest.mark.slow
def test_a_side_that_does_not_run_is_named_and_slow_ones_are_compared_with_ours(monkeypatch):
    monkeypatch.setattr("experiments.on_gpu.sides.SLOW", 0.3)
    calls = {"ours": 0, "fast": 0, "slow": 0}

    def side(name, seconds):
        def call():
            calls[name] += 1
            time.sleep(seconds)

        return lambda: (call, lambda: {"about": name})

    def broken():
        raise RuntimeError("no such library")

    sides = {"ours": side("ours", 0.05), "fast": side("fast", 0.001), "slow": side("slow", 0.4), "broken": broken}
    seen = []
    result = compare(sides, 3, title="", progress=lambda result: seen.append(list(result["sides"])))
    assert seen == [["ours", "fast"]] * 3 + [["ours", "fast", "slow"]]
    assert result["refused"] == {"broken": "RuntimeError: no such library"}
    assert result["sides"].keys() == {"ours", "fast", "slow"} and result["sides"]["slow"]["about"] == "slow"
    assert result["ratios"]["ours / fast"]["ratio"] > 1 > result["ratios"]["ours / slow"]["ratio"]
    assert calls["slow"] < calls["fast"] < calls["ours"]
    with pytest.raises(RuntimeError, match="broken: RuntimeError: no such library"):
        compare({"broken": broken, "fast": side("fast", 0.001)}, 1, title="", progress=lambda result: None)
