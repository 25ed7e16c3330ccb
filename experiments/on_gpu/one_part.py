"""One part, in a process of its own: it starts with nothing on the device, and can be stopped."""

from pathlib import Path

from experiments.on_gpu.parts import measurements
from experiments.on_gpu.record import Record, machine
from experiments.provenance import provenance


def run(part: str, output: Path, work: Path, *, smoke: bool) -> None:
    """Makes the measurements of a part that its file does not have yet."""
    record = Record(output, part, smoke=smoke)
    record.measure(measurements(part, smoke=smoke, work=work), {"provenance": {**provenance(), **machine()}})
