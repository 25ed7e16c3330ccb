"""What the kernels cost: time, temporary memory, the share of what the device can do, and ratios to what others offer.

    python -m experiments.benchmarks.kernels [--op flash_attention] [--case target] [--implementation gpu xla]

`flash_attention` is timed forward and backward (the backward pass alone), `decode_attention` forward, both against
`jax.nn.dot_product_attention` (by XLA, and by cuDNN on a GPU) and PyTorch's `scaled_dot_product_attention` where it is
installed for this device; `linear_cross_entropy` with its gradients, against full logits. The cases called ``target``
are those for which the project has set itself a mark.

The device's best is measured in the same rounds: a large matrix product in the dtype of the case, or, for what is
bound by memory, a large array read and written. A side that does not run here says why in the result instead. In
float32 every side forms float32 products. Shares, rates and ratios are taken within a round; medians and quartiles
are those over rounds.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from experiments.benchmarks.kernel_cases import CASES, SMOKE, TFLOPS, Case, Program, compiled
from pallas_kernels.implementations import IMPLEMENTATIONS

OURS = {"cpu": ["xla"], "gpu": ["xla", "gpu"], "tpu": ["xla", "tpu"]}
"""What is measured unless one asks for something else: all that is meant for a platform."""
SHORTEST_TURN = 0.02
"""Seconds: a turn has as many calls as it needs to last about so long, or starting them is what one measures."""
MOST_CALLS = 200


def peak(unit: str, dtype: str, *, smoke: bool) -> tuple[str, float, Callable[[], Program]]:
    """The best this device does: what it is, its work, and how to come to its program."""
    on_cpu = jax.default_backend() == "cpu"
    if unit == TFLOPS:
        size = 64 if smoke else 2_048 if on_cpu else 8_192
        factors = tuple(jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(1)))
        return f"matrix product of {size}", 2 * size**3, functools.partial(compiled, jnp.matmul, factors)
    size = 2**16 if smoke else 2**28 if on_cpu else 2**30
    array = jnp.zeros(size // jnp.dtype(dtype).itemsize, dtype)
    return f"{size} bytes read and written", 2 * size, functools.partial(compiled, jnp.negative, (array,))


def measure_case(
    make: Callable[[str, list[str]], Case],
    dtype: str,
    implementations: list[str],
    rounds: int,
    *,
    title: str,
    smoke: bool,
) -> tuple[dict[str, Any], str]:
    """`measure` of the case that ``make`` makes, and the case's unit; in float32 all products are float32's."""
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        case = make(dtype, implementations)
        return measure(case, dtype, rounds, title=title, smoke=smoke), case.unit


def measure(case: Case, dtype: str, rounds: int, *, title: str, smoke: bool) -> dict[str, Any]:
    """Times all sides of a case in turn.

    Returns:
      Sizes; ``sides``, what is known of each; ``peak``, the same of the device's best; ``ratios`` of our times to those
      of every other side; ``refused``, the sides that do not run, and why.
    """
    best, best_work, best_program = peak(case.unit, dtype, smoke=smoke)
    programs: dict[str, Program] = {}
    refused: dict[str, str] = {}
    for name, prepare in {"peak": best_program, **case.ours, **case.others}.items():
        try:
            program = prepare()
            program.run(1)
        # Whatever a library or compiler raises where it does not apply: reported, and the other sides are measured.
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{title}: {name} does not run: {refused[name]}", flush=True)
        else:
            programs[name] = program
    calls = {name: calls_of_a_turn(program) for name, program in programs.items()}
    turns = {name: functools.partial(program.run, calls[name]) for name, program in programs.items()}
    seconds = {name: x / calls[name] for name, x in timing.interleave(turns, rounds, title=title).items()}

    scale = 1e12 if case.unit == TFLOPS else 1e9
    rates = {name: (best_work if name == "peak" else case.work) / scale / x for name, x in seconds.items()}
    sides = {
        name: {
            **timing.summary(seconds[name]),
            **timing.quartiles(case.unit, rates[name]),
            **(timing.quartiles("share_of_peak", rates[name] / rates["peak"]) if "peak" in rates else {}),
            "calls_in_a_turn": calls[name],
            "temporary_bytes": program.temporary_bytes,
            "residual_bytes": program.residual_bytes,
        }
        for name, program in programs.items()
    }
    return {
        "sizes": case.sizes,
        "dtype": dtype,
        "rounds": rounds,
        "peak": {"of": best, **sides.pop("peak", {})},
        "sides": sides,
        "ratios": {
            f"{mine} / {other}": timing.ratio(seconds[mine], seconds[other])
            for mine in case.ours
            for other in [*case.ours, *case.others]
            if mine != other and mine in sides and other in sides
        },
        "refused": refused,
    }


def calls_of_a_turn(program: Program) -> int:
    """How many calls of a program that has run before are timed together."""
    start = time.perf_counter()
    program.run(1)
    return max(1, min(MOST_CALLS, math.ceil(SHORTEST_TURN / (time.perf_counter() - start))))


def describe(result: dict[str, Any], unit: str) -> str:
    """A line for each side."""
    lines = []
    for name, side in result["sides"].items():
        share = f", {side['share_of_peak']:.0%} of the peak" if "share_of_peak" in side else ""
        lines.append(f"  {name}: {1e3 * side['median_seconds']:.3f} ms, {side[unit]:.4g} {unit}{share}")
    return "\n".join(
        lines + [f"  {name}: {ratio['ratio']:.3f} of the time" for name, ratio in result["ratios"].items()]
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures the cases asked for.

    Raises:
      SystemExit: one of our implementations did not run; after all others were measured and reported.
    """
    parser = timing.parser("Time and memory of the kernels over those of what others offer.")
    parser.add_argument("--op", choices=[*CASES, "all"], default="all")
    parser.add_argument("--case", help="cases with this in their name", default="")
    parser.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, help="all of this platform by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU by default, else bfloat16")
    options = parser.parse_args(arguments)
    platform = jax.default_backend()
    implementations = options.implementation or OURS[platform]
    dtype = options.dtype or ("float32" if platform == "cpu" else "bfloat16")
    rounds = options.repeats or (2 if options.smoke else 5 if platform == "cpu" else 20)
    report = timing.Report("kernels", options)
    for op, cases in (SMOKE if options.smoke else CASES).items():
        for name, make in cases.items():
            if options.op in (op, "all") and options.case in name:
                title = f"{op}, {name}"
                measured = measure_case(make, dtype, implementations, rounds, title=title, smoke=options.smoke)
                result, unit = measured
                report.add(title, result)
                print(f"{title}\n{describe(result, unit)}", flush=True)
    if not report.cases:
        parser.error(f"no case of {options.op} has {options.case!r} in its name")
    report.finish()
    failed = [
        f"{name}: {side}" for name, x in report.cases.items() for side in x["refused"] if side.startswith("pallas")
    ]
    if failed:
        raise SystemExit(f"did not run: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
