"""Ctrl-C and SIGTERM while a command is busy with something else than training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coconut import interruption
from coconut.commands.main import EXIT_INTERRUPTED

# Says where it is, and is sent a signal there; a library swallows the exception, or makes an error of its own of it.
BUSY = """
import sys, time
from coconut.commands import main

def busy(options):
    print("busy", flush=True)
    try:
        time.sleep(30)
    except KeyboardInterrupt as interrupt:
        if kind == "raised":
            raise
        if kind == "turned":
            raise ImportError("while initializing the extension") from interrupt
        from coconut import interruption
        interruption.check()
    sys.exit("went on")

main.COMMANDS = {"replay": busy}
kind = sys.argv[1]
sys.argv = ["coconut", "replay", "nowhere"]
main.run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["raised", "turned", "swallowed"])
def test_a_signal_is_never_lost_and_gives_no_traceback(number: signal.Signals, kind: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, kind],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "Traceback" not in errors
    assert errors.startswith("interrupted") and errors.endswith("what was saved before is still there\n")
    assert ("while initializing the extension" in errors) == (kind == "turned")


def test_a_signal_waits_where_the_work_stops_by_itself() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruption.interruptible(), interruption.awaited() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        # Where it does not wait, it is raised at once; a second one is raised in any case.
        with pytest.raises(KeyboardInterrupt), interruption.raised():
            pytest.fail("went on")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
