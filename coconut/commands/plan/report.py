"""A plan as text."""

import math
from collections.abc import Mapping, Sequence

from coconut.commands.evaluate import markdown_table
from coconut.commands.plan.cost import Cost
from coconut.commands.plan.generation import GenerationPlan
from coconut.commands.plan.planning import Plan


def describe(plan: Plan) -> str:
    """One plan, in a few lines and tables."""
    chips = math.prod(plan.mesh.values())
    parts = describe_microbatches(plan.microbatches)
    lines = [
        f"{plan.topology}, mesh {describe_mesh(plan.mesh)}: {plan.parameters:,} parameters, {plan.batch_size:,} rows "
        f"of {plan.columns:,} columns in {parts}, remat {plan.remat!r}, {plan.thoughts} thoughts",
        "",
    ]
    used = sum(plan.memory.values())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [f"{verdict}: {_gibibytes(used)} of {_gibibytes(plan.capacity)} GiB a chip", ""]
    rows = [[kind, _gibibytes(size)] for kind, size in plan.memory.items()]
    lines += [markdown_table(("bytes a chip", "GiB"), rows), ""]
    if plan.cost is not None:
        cost, times = plan.cost, plan.cost.roofline
        exchanged = sum(found["bytes"] for found in cost.collectives.values())
        resources = [
            ["matrix products", f"{_number(cost.flops / 1e9)} GFLOP", _number(1e3 * times.compute)],
            ["memory traffic", f"{_gibibytes(cost.traffic)} GiB", _number(1e3 * times.memory)],
            ["collectives", f"{_gibibytes(exchanged)} GiB", _number(1e3 * times.interconnect)],
        ]
        lines += [markdown_table(("of a chip in one step", "amount", "ms at its peak"), resources), ""]
        collectives = [
            [kind, f"{found['count']:,}", _number(found["bytes"] / 2**20)] for kind, found in cost.collectives.items()
        ]
        if collectives:
            lines += [markdown_table(("collective", "runs a step", "MiB a chip"), collectives), ""]
        lines += [
            f"expected step: {_number(1e3 * times.expected)} ms (nothing hides the collectives; "
            f"{_number(1e3 * times.fastest)} ms if everything overlaps), bound by {times.bound}",
            f"model FLOPs utilisation: {100 * plan.utilisation:.1f} % of {chips} chips; "
            f"{_number(plan.tokens_per_day / 1e9)} billion tokens a day",
        ]
        if cost.open_loops:
            lines.append(f"{cost.open_loops} loops, whose number of turns is data, are counted with one turn")
        lines += _doubts({"step": cost})
    lines += [f"to make it fit: {suggestion}" for suggestion in plan.suggestions]
    lines += [] if plan.faster is None else [f"what would help most: {plan.faster}"]
    return "\n".join(lines)


def describe_generation(plan: GenerationPlan) -> str:
    """Answering a batch, phase by phase."""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"generation: {plan.batch_size:,} questions of {plan.prompt:,} columns, {plan.thoughts} thoughts, "
        f"{plan.new_tokens} new tokens each: {verdict}",
        "",
    ]
    rows = []
    for phase, memory in plan.memory.items():
        times = plan.phases[phase].roofline if phase in plan.phases else None
        figures = ["", ""] if times is None else [_number(1e3 * times.expected), times.bound]
        rows.append([phase, _gibibytes(memory), *figures])
    lines += [markdown_table(("phase", "GiB a chip", "ms expected", "bound by"), rows), ""]
    if plan.seconds:
        answers = plan.batch_size / plan.seconds
        lines.append(
            f"expected: {_number(1e3 * plan.seconds)} ms a batch, {_number(answers)} answers a second if all are as "
            "long as they may be"
        )
    lines += _doubts(plan.phases)
    return "\n".join(lines)


def _doubts(costs: Mapping[str, Cost]) -> list[str]:
    invented = [
        f"DOUBTFUL, {name}: {100 * cost.traffic_found:.0f} % of the bytes that the compiler counts were found in its "
        "program's text: a new compiler may write slices in another form"
        for name, cost in costs.items()
        if cost.traffic_found is not None and cost.is_traffic_invented
    ]
    return invented + [
        f"DOUBTFUL, {name}: of the operations that the compiler counts, {100 * cost.found:.0f} % were found in its "
        "program's text. With a single row a chip it writes products in another form, which no plan reads; else a new "
        "compiler may write all in another form"
        for name, cost in costs.items()
        if cost.found is not None and cost.is_product_missed
    ]


def describe_comparison(found: Mapping[str, float]) -> str:
    """A measured step beside the estimate."""
    return (
        f"measured here: {_number(1e3 * found['seconds'])} ms a step; expected {_number(1e3 * found['expected'])} ms, "
        f"which is {100 * found['error']:+.0f} %"
    )


def ranking(plans: Sequence[Plan]) -> str:
    """Plans of several ways to run as one table, in their order."""
    rows = []
    for plan in plans:
        times = plan.cost.roofline if plan.cost else None
        rows.append(
            [
                describe_mesh(plan.mesh),
                str(plan.microbatches),
                plan.remat,
                "yes" if plan.fits else "no",
                _gibibytes(sum(plan.memory.values())),
                "" if times is None else _number(1e3 * times.expected),
                "" if times is None else f"{100 * plan.utilisation:.1f}",
                "" if times is None else times.bound,
            ]
        )
    head = ("mesh", "microbatches", "remat", "fits", "GiB a chip", "step ms", "utilisation %", "bound by")
    return markdown_table(head, rows)


def describe_microbatches(count: int) -> str:
    """``1 microbatch``, ``2 microbatches``."""
    return "1 microbatch" if count == 1 else f"{count} microbatches"


def describe_mesh(mesh: Mapping[str, int]) -> str:
    """As ``--mesh`` takes it, without axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def _gibibytes(size: float) -> str:
    return _number(size / 2**30)


def _number(value: float) -> str:
    """Three digits where there are no more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
