"""Collectives of a compiled program."""

import dataclasses
import math
import re

from coconut.commands.plan.program import Instruction, parse

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      elements: numbers of its largest result, on each device.
      bytes: of its results, on each device.
      group: devices that take part together; 0 where the text does not say.
      dimensions: of the torus whose links it uses at once, as the TPU compiler chose; 0 where the text does not say.
      times: how often it runs in one execution: the product of the trip counts of the loops around it.
    """

    kind: str
    elements: int
    bytes: int
    group: int
    dimensions: int = 0
    times: int


def collectives(text: str, *, turns: int | None = None) -> list[Collective]:
    """All collectives of a compiled program, in the order of the text (``compiled.as_text()``).

    Args:
      text: the program.
      turns: how often a loop runs that does not say it; None refuses those with a collective.

    Raises:
      ValueError: the text has no entry computation, or a loop is refused.
    """
    found: list[Collective] = []
    channels: dict[str, str] = {}
    program = parse(text)
    names = {id(computation): name for name, computation in program.computations.items()}
    for computation, instruction, times in program.walk(fusions=True, turns=turns or 0):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if not times:
            raise ValueError(f"a loop with a {kind} does not say how often it runs")
        # The TPU compiler splits one collective over the fusions that start it, work meanwhile and end it; each holds a
        # copy with the same channel.
        channel = re.search(r"channel_id=(\d+)", instruction.line)
        if channel and channels.setdefault(channel[1], instruction.name) != instruction.name:
            continue
        collective = _collective(kind, instruction, times)
        if names[id(computation)].startswith("all-reduce-scatter") and collective.group:
            # The TPU compiler's reduce-scatter: a fusion of an all-reduce and of taking one's own shard.
            shard = {"elements": collective.elements // collective.group, "bytes": collective.bytes // collective.group}
            collective = dataclasses.replace(collective, kind="reduce-scatter", **shard)
        found.append(collective)
    return found


def _collective(kind: str, instruction: Instruction, times: int) -> Collective:
    results = instruction.result
    if instruction.opcode.endswith("-start"):
        # An asynchronous one returns its operands first, and handles without a shape last.
        results = tuple(array for array in results if array.shape or len(results) == 1)
        results = results[len(results) // 2 :] if len(results) > 1 else results
    return Collective(
        kind=kind,
        elements=max((math.prod(array.shape) for array in results), default=0),
        bytes=sum(array.bytes for array in results),
        group=_group(instruction.line),
        dimensions=_dimensions(instruction.line),
        times=times,
    )


def _dimensions(line: str) -> int:
    """The TPU compiler says how it does some: each color of its rings goes along every dimension it uses, in phases."""
    found = re.search(r"Strategy\{colors:\d+ phases:(\d+)", line)
    return int(found[1]) if found else 0


def _group(line: str) -> int:
    """Groups are written ``{{0,1},{2,3}}``, ``[2,4]<=[8]`` (of the last size) or ``mesh['a'=2,'b'=4] {'b'}``."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'([^']+)'", match[2]))
    return 0
