"""Several processes as one: who they are, and how they find each other."""

import argparse
import os
import socket
import sys
import time

import jax

from coconut.commands.compiled_programs import users_folder
from coconut.errors import CoconutError


def join(options: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; before anything asks JAX for its devices.

    JAX ends the process (exit code 134, which a scheduler starts again) where the others do not come in time.

    Args:
      options: of a command line that has passed `coconut.commands.flags.check_together`.

    Raises:
      CoconutError: the environment names no other processes, or process 0 does not answer in time.
    """
    if options.distributed:
        _join_by_environment(options.distributed_timeout)
    elif options.coordinator is not None:
        _join_by_flags(options)
    else:
        return
    if jax.default_backend() == "gpu" and os.environ.get("JAX_COMPILATION_CACHE_DIR") == str(users_folder()):
        # XLA measures on a GPU which kernel is the fastest, and the processes share what they measured. But JAX keeps
        # programs for the first process alone, which has nothing to share then, and the others would wait for it.
        jax.config.update("jax_enable_compilation_cache", False)


def _join_by_flags(options: argparse.Namespace) -> None:
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
    host, _, port = address.rpartition(":")
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise CoconutError(f"--coordinator {address}: no answer within {timeout} s ({error})") from error
        time.sleep(0.2)
