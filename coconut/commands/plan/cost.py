"""What a compiled program costs a chip: its arithmetic, its memory traffic, its collectives, and the time of each."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax

from coconut.commands.plan.collectives import collectives
from coconut.commands.plan.hardware import Slice
from coconut.commands.plan.program import flops, memory_traffic, open_loops, parse
from coconut.commands.plan.roofline import Roofline, roofline

# Of what XLA counts, matrix products are from 0.85 (one thought of four rows) to 0.99 (a step) where layers are 512
# wide, and from 0.4 to 0.8 where they are 16 wide. Those of a single row the TPU compiler writes as sums of elementwise
# products, which are not found.
LEAST_FOUND, MOST_FOUND = 0.3, 1.02
# Of the bytes that XLA counts, 0.95 to 1 on a CPU, and on TPUs 0.83 to 0.97 of published models and 0.50 of one with
# experts. Layouts pad there, which is not counted: arrays 16 wide have up to 14 times their size. So there is no least
# share. More than all is a slice taken for its array.
MOST_TRAFFIC_FOUND = 1.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one execution on each chip.

    Attributes:
      flops: of matrix products, recomputed ones and those of kernels included.
      traffic: bytes read and written.
      collectives: by kind: how many run, and the bytes of their results.
      roofline: seconds on each resource.
      open_loops: loops with matrix products whose number of turns is data; each counts ``turns`` times.
      turns: see there.
      found: the operations found in the program's text, with each loop once, as a share of those that XLA's own
        analysis counts. It counts what is no matrix product, too, so that the share of small programs, and of single
        columns, is below 1. None where it does not tell.
      traffic_found: the bytes found there, with each loop once and fast memory counted, as a share of XLA's own.
    """

    flops: float
    traffic: float
    collectives: Mapping[str, Mapping[str, int]]
    roofline: Roofline
    open_loops: int
    turns: int
    found: float | None
    traffic_found: float | None

    @property
    def is_doubtful(self) -> bool:
        """Whether the text says another thing than XLA's own analysis, as that of a new compiler might."""
        return self.is_product_missed or self.is_traffic_invented

    @property
    def is_product_missed(self) -> bool:
        """Whether the text has another number of operations."""
        return self.found is not None and not LEAST_FOUND <= self.found <= MOST_FOUND

    @property
    def is_traffic_invented(self) -> bool:
        """Whether the text has more bytes."""
        return self.traffic_found is not None and self.traffic_found > MOST_TRAFFIC_FOUND

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        times = {name: getattr(self.roofline, name) for name in ("fastest", "expected", "bound")}
        content = dataclasses.asdict(self)
        content["roofline"] |= times
        return content


def cost_of(compiled: jax.stages.Compiled, where: Slice, *, turns: int = 1) -> Cost:
    """Reads a compiled program.

    Args:
      compiled: the program.
      where: the chips it is compiled for.
      turns: how often a loop runs whose number of turns is data.

    Raises:
      ValueError: the text of the program is not understood.
    """
    text = compiled.as_text()
    assert text is not None
    program, found = parse(text), collectives(text, turns=turns)
    by_kind: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for collective in found:
        by_kind[collective.kind]["count"] += collective.times
        by_kind[collective.kind]["bytes"] += collective.times * collective.bytes
    arithmetic, traffic = flops(program, turns=turns), memory_traffic(program, turns=turns)
    return Cost(
        flops=arithmetic,
        traffic=traffic,
        collectives=dict(by_kind),
        roofline=roofline(flops=arithmetic, traffic=traffic, collectives=found, where=where),
        open_loops=open_loops(program),
        turns=turns,
        found=_share(flops(program, loops_once=True), compiled, "flops"),
        traffic_found=_share(
            memory_traffic(program.without_fast_memory(), loops_once=True), compiled, "bytes accessed"
        ),
    )


def _share(found: int, compiled: jax.stages.Compiled, figure: str) -> float | None:
    """Of what XLA's own analysis counts."""
    counted = (compiled.cost_analysis() or {}).get(figure)
    return found / counted if counted else None


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one chip: what goes in, what comes out and is not what went in, scratch and the program itself."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return {
        "arguments": analysis.argument_size_in_bytes,
        "results": max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0),
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
