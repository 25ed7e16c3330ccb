"""Collectives of a compiled program, read from its text; XLA's own cost analysis counts a loop's body once."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|true_computation|false_computation|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      elements: numbers of its largest result, on each device.
      bytes: of its results, on each device.
      group: devices that take part together; 0 where the text does not say.
      times: how often it runs in one execution: the product of the trip counts of the loops around it.
    """

    kind: str
    elements: int
    bytes: int
    group: int
    times: int


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, in the order of the text (``compiled.as_text()``).

    Raises:
      ValueError: the text has no entry computation, or a loop with a collective whose trip count it does not say.
    """
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = None, ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif current and line.startswith(" "):
            computations[current].append(line)
    if entry is None:
        raise ValueError("the text is that of no compiled program: it has no ENTRY")
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in computations[name]:
        if match := _COLLECTIVE.search(line):
            yield _collective(match, line, times)
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for inner in called:
            if inner not in computations:
                continue
            trips = 1
            if " while(" in line:
                found = _TRIPS.search(line)
                trips = int(found[1]) if found else 0
            for below in _walk(computations, inner, times * trips):
                if below.times == 0:
                    raise ValueError(f"a loop with a {below.kind} does not say how often it runs: {line.strip()[:200]}")
                yield below


def _collective(match: re.Match[str], line: str, times: int) -> Collective:
    result, kind, start = match.groups()
    sizes = [(math.prod(map(int, filter(None, shape.split(",")))), dtype) for dtype, shape in _ARRAY.findall(result)]
    if start and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]  # An asynchronous one returns its operands first.
    return Collective(
        kind=kind,
        elements=max((count for count, _ in sizes), default=0),
        bytes=sum(count * BYTES.get(dtype, 4) for count, dtype in sizes),
        group=_group(line),
        times=times,
    )


def _group(line: str) -> int:
    """Both ways of writing groups: ``{{0,1},{2,3}}`` and ``[2,4]<=[8]`` (groups of the last size)."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    return 0
