"""A benchmark that is told to end leaves no process behind, and keeps the cases that it has measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import ending
from experiments.benchmarks import timing

STARTS_ANOTHER = """
import signal, subprocess, sys
from experiments import ending

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run under nohup, whose SIGHUP stays ignored.
with ending.by_exception():
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        print(other.pid, flush=True)
        other.wait()
    finally:
        other.kill()
        other.wait()
"""


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_it_started_ends_with_it(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS_ANOTHER], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        other = int(one.stdout.readline())
        try:
            assert is_there(other)
            one.send_signal(number)
            assert one.wait(timeout=60) == 128 + number
        finally:
            one.kill()
    assert not is_there(other)


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As SIGHUP is under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending.by_exception():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_each_case_is_written_when_it_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found" / "report.json"
    report = timing.Report("something", timing.parser("").parse_args(["--output", str(path)]))
    report.add("first", {"ratio": 0.5})
    stopped_here = json.loads(path.read_text())
    assert stopped_here["unfinished"] and stopped_here["cases"] == {"first": {"ratio": 0.5}}
    report.add("second", {"ratio": 2.0})
    report.finish()
    result = json.loads(path.read_text())
    assert result.keys() == {"benchmark", "provenance", "cases"} and result["cases"].keys() == {"first", "second"}
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.slow
def test_a_child_of_the_benchmark_of_starts_ends_with_it() -> None:
    """The whole benchmark, stopped while its first `coconut train` imports."""
    command = [sys.executable, "-m", "experiments.benchmarks.start", "--smoke"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        children = Path(f"/proc/{one.pid}/task/{one.pid}/children")
        if not children.exists():
            one.kill()
            pytest.skip("this system does not list the children of a process")
        end = time.monotonic() + 100
        try:
            while not (found := [int(word) for word in children.read_text().split() if _trains(int(word))]):
                assert one.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            time.sleep(0.5)  # Until it waits for the child.
            one.terminate()
            assert one.wait(timeout=60) == 128 + signal.SIGTERM
        finally:
            one.kill()
    assert not any(map(is_there, found))


def _trains(process: int) -> bool:
    try:
        return b"\0train\0" in Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return False
