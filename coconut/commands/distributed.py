"""Several processes as one: who they are, and how they find each other."""

import argparse
import socket
import sys
import time

import jax

from coconut.errors import CoconutError

TIMEOUT = 300


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the mesh and the processes to a subcommand."""
    parser.add_argument(
        "--mesh", default="", metavar="AXIS=SIZE,...", help="such as data=2,fsdp=4,tensor=2; every device its own rows"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes, as the environment says (TPU pod, Slurm)"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="one of several processes; where process 0 listens")
    parser.add_argument("--num_processes", type=int, help="with --coordinator: how many")
    parser.add_argument("--process_id", type=int, help="with --coordinator: which this is, from 0")
    parser.add_argument(
        "--distributed_timeout", type=int, default=TIMEOUT, metavar="SECONDS", help="how long to wait for the others"
    )


def join(options: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; before anything asks JAX for its devices.

    JAX ends the process (exit code 134, which a scheduler starts again) where the others do not come in time.

    Raises:
      CoconutError: the flags contradict each other, the environment names no other processes, or process 0 does not
        answer in time.
    """
    explicit = (options.coordinator, options.num_processes, options.process_id)
    if explicit == (None, None, None):
        if options.distributed:
            _join_by_environment(options.distributed_timeout)
        return
    if options.distributed:
        raise CoconutError("--distributed takes the processes from the environment: give it or --coordinator, not both")
    if None in explicit:
        raise CoconutError("--coordinator, --num_processes and --process_id belong together: give all three")
    if not 0 <= options.process_id < options.num_processes:
        raise CoconutError(f"--process_id {options.process_id}: must be from 0 to {options.num_processes - 1}")
    others = "the others" if options.process_id == 0 else f"process 0 at {options.coordinator}"
    print(
        f"process {options.process_id} of {options.num_processes}: waiting for {others}, at most "
        f"{options.distributed_timeout} s",
        file=sys.stderr,
    )
    if options.process_id:
        _await_coordinator(options.coordinator, options.distributed_timeout)
    jax.distributed.initialize(
        options.coordinator,
        options.num_processes,
        options.process_id,
        initialization_timeout=options.distributed_timeout,
    )


def _join_by_environment(timeout: int) -> None:
    print(f"waiting for the other processes, at most {timeout} s", file=sys.stderr)
    try:
        jax.distributed.initialize(initialization_timeout=timeout)
    except ValueError as error:
        raise CoconutError(
            f"--distributed: the environment of this host names no other processes ({error}). On a plain host give "
            "--coordinator HOST:PORT --num_processes N --process_id I, or none of these for one process"
        ) from error


def _await_coordinator(address: str, timeout: int) -> None:
    """JAX would end the process with a stack trace."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise CoconutError(f"--coordinator {address!r}: must be HOST:PORT")
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise CoconutError(f"--coordinator {address}: no answer within {timeout} s ({error})") from error
        time.sleep(0.2)
