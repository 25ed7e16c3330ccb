"""Measures on a GPU what is to be known there, in at most eight minutes, part by part.

    python -m experiments.on_gpu --output DIR [--only PART ...] [--smoke]

Each part has a process and a time limit of its own, and writes ``DIR/PART.json`` after every measurement. So it can be
stopped anywhere; started again, it leaves out the parts that are done, and of the others what they have.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from coconut.errors import CoconutError
from coconut.provenance import COMMIT
from experiments import ending
from experiments.on_gpu import one_part
from experiments.on_gpu.parts import PARTS
from experiments.on_gpu.record import DONE, FAILED, STOPPED, UNFINISHED, Record

LEAST_SECONDS = 15.0
"""A part is not begun with less: importing and compiling take that long."""
SECONDS_TO_END = 5.0
"""What a process gets to end by itself before it is killed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts that are asked for and not done.

    Returns:
      0 where all of them are done now, else 1.
    """
    options = _parser().parse_args(arguments)
    options.command = shlex.join(
        ["python", "-m", "experiments.on_gpu", *(sys.argv[1:] if arguments is None else arguments)]
    )
    work = options.work or options.output / "work"
    try:
        if options.this_process:
            [part] = options.only
            one_part.run(part, options.output, work, smoke=options.smoke, command=options.this_process)
            return 0
        with ending.by_exception():
            return _run_parts(options, work)
    except CoconutError as error:
        print(error, file=sys.stderr)
        return 1


def _run_parts(options: argparse.Namespace, work: Path) -> int:
    limits = dict(options.limit)
    asked = [name for name in PARTS if name in (options.only or PARTS)]
    records = [Record(options.output, name, smoke=options.smoke) for name in asked]
    environment = {
        # So that PyTorch finds memory on the device, too; and what was compiled once is compiled.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        **os.environ,
        **({COMMIT: options.commit} if options.commit else {}),
    }
    end = time.monotonic() + options.seconds
    for name, record in zip(asked, records, strict=True):
        seconds = min(limits.get(name, PARTS[name].seconds), end - time.monotonic())
        if record.state == DONE:
            print(f"=== {name}: done before")
        elif seconds < LEAST_SECONDS and name not in limits:
            print(f"=== {name}: left for another time")
        else:
            print(f"=== {name}: {PARTS[name].what}; at most {seconds:.0f} s", flush=True)
            start = time.monotonic()
            flags = {"XLA_FLAGS": PARTS[name].xla_flags} if PARTS[name].xla_flags else {}
            state = _run(_command(name, options, work), seconds, flags | environment)
            record = Record(options.output, name, smoke=options.smoke)
            if record.state == UNFINISHED:
                record.end(state)
            print(f"=== {name}: {record.state} after {time.monotonic() - start:.0f} s", flush=True)
    return int(any(Record(options.output, name, smoke=options.smoke).state != DONE for name in asked))


def _command(name: str, options: argparse.Namespace, work: Path) -> list[str]:
    command = [sys.executable, "-m", "experiments.on_gpu", "--only", name, "--this_process", options.command]
    return command + ["--output", str(options.output), "--work", str(work)] + (["--smoke"] if options.smoke else [])


def _run(command: list[str], seconds: float, environment: dict[str, str]) -> str:
    """Runs a part, and says what became of it where it could not say so itself."""
    with _ended(subprocess.Popen(command, env=environment, start_new_session=True)) as process:
        try:
            process.wait(timeout=seconds)
            return FAILED
        except subprocess.TimeoutExpired:
            return STOPPED


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """The process, which is over behind this with all that it has started, whatever happens."""
    try:
        yield process
    finally:
        for ending in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, ending)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS_TO_END)


def _parser() -> argparse.ArgumentParser:
    parts = "; ".join(f"{name}: {part.what}, {part.seconds:.0f} s" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(prog="python -m experiments.on_gpu", description=f"The parts are {parts}.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, one JSON file a part")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts; all of them by default")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--limit", nargs="+", type=_limit, default=[], help="PART=SECONDS: another limit of a part")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and compiled programs; OUTPUT/work by default")
    parser.add_argument("--commit", help="of this copy of the code, where it is not in a checkout")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes that say nothing about speed: a rehearsal")
    parser.add_argument("--this_process", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r}: the parts are {', '.join(PARTS)}")
    try:
        return name, float(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be PART=SECONDS") from None


if __name__ == "__main__":
    sys.exit(main())
