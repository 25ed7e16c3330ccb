"""One part, in a process of its own: it starts with nothing on the device, and can be stopped."""

from pathlib import Path

from coconut.provenance import provenance
from experiments.on_gpu.parts import measurements
from experiments.on_gpu.record import Record, machine


def run(part: str, output: Path, work: Path, *, smoke: bool, command: str) -> None:
    """Makes the measurements of a part that its file does not have yet; ``command`` is what the user typed."""
    record = Record(output, part, smoke=smoke)
    about = {"command": command, "provenance": {**provenance(), **machine()}}
    record.measure(measurements(part, smoke=smoke, work=work), about)
