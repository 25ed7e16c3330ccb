"""What it is worth on a CPU that freed memory stays with the process: training steps and answers, with it and without.

    python -m experiments.benchmarks.allocator [--case training_a|training_b|generation|all]

Two processes that do the same take turns. One of them has called `coconut.commands.allocator.keep_freed_memory`, as
the ``coconut`` command does, and the other leaves glibc as it is.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from coconut.commands.allocator import keep_freed_memory
from experiments.benchmarks import timing

CASES = ("training_a", "training_b", "generation")


def main(arguments: list[str] | None = None) -> None:
    """Measures and reports."""
    parser = timing.parser("Steps and answers on a CPU, with and without memory that stays.")
    parser.add_argument("--case", default="all", choices=(*CASES, "all"))
    options = parser.parse_args(arguments)
    names = CASES if options.case == "all" else (options.case,)
    report = timing.Report("allocator", options)
    for name in names:
        with _side(name, kept=True, smoke=options.smoke) as kept, _side(name, kept=False, smoke=options.smoke) as plain:
            seconds = timing.interleave({"kept": kept, "given back": plain}, options.repeats or 9, title=name)
            peaks = {"kept": kept("memory"), "given back": plain("memory")}
        case = {
            **timing.ratio(seconds["kept"], seconds["given back"]),
            **{side: {**timing.summary(own), "peak_bytes": peaks[side]} for side, own in seconds.items()},
        }
        report.add(name, case)
        print(f"{name}: {case['ratio']:.3f} of the time where freed memory stays")
    report.finish()


@contextlib.contextmanager
def _side(case: str, *, kept: bool, smoke: bool) -> Iterator[Callable[..., int]]:
    """A process that does a case each time it is asked; asked for ``memory``, the most bytes that it has had."""
    flags = [case, "kept" if kept else "plain", *(["smoke"] if smoke else [])]
    untuned = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [
        sys.executable,
        "-c",
        "import sys; from experiments.benchmarks.allocator import serve; serve(*sys.argv[1:])",
    ]
    with subprocess.Popen(
        [*command, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=untuned | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, told = process.stdin, process.stdout

        def ask(what: str = "work") -> int:
            print(what, file=asked, flush=True)
            answer = told.readline()
            if not answer:
                raise SystemExit(f"{case}: the process has ended")
            return int(answer)

        yield ask
        asked.close()


def serve(case: str, side: str, smoke: str = "") -> None:
    """Does the case for each line of standard input, and answers with a number."""
    if side == "kept" and not keep_freed_memory():
        raise SystemExit("this C library does not keep freed memory")
    import resource

    work = _training(case[-1], bool(smoke)) if case.startswith("training") else _generation(bool(smoke))
    for line in sys.stdin:
        if line.strip() == "memory":
            print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        else:
            work()
            print(0, flush=True)


def _training(case: str, small: bool) -> Callable[[], object]:
    from experiments.benchmarks import latent_step

    geometry = latent_step.smoke(latent_step.CASES[case]) if small else latent_step.CASES[case]
    thoughts = geometry.thoughts[-1]
    return latent_step.Trainer(geometry).step(thoughts, latent_step.latent_schedule(geometry, thoughts))[0]


def _generation(small: bool) -> Callable[[], object]:
    import jax

    from coconut.model import make_model
    from experiments.benchmarks import generate

    workload = generate.SMOKE if small else generate.WORKLOADS["a"]
    shape = (workload.batches[-1], workload.prompt)
    prompts = np.random.default_rng(0).integers(0, workload.decoder.vocabulary, shape, np.int32)
    model = jax.jit(lambda key: make_model(workload.decoder, key, execution=workload.execution))(jax.random.key(0))
    generator = generate.Generator(workload, model)
    return lambda: generator.answer(prompts)


if __name__ == "__main__":
    main()
