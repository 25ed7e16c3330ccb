"""What a process says that cannot join others; that two processes train together is tested in tests/training."""

import re
import socket

import jax
import pytest

from coconut.commands.compiled_programs import users_folder
from coconut.commands.distributed import join
from coconut.commands.flags import check_together, parse_arguments
from coconut.errors import CoconutError


def join_by(flags: str) -> None:
    options = parse_arguments(["train", "--gin_file", "a.gin", "--workdir", "here", *flags.split()])
    check_together(options)
    join(options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--distributed --coordinator localhost:1 --num_processes 2 --process_id 0", "not both"),
        ("--coordinator localhost:1 --num_processes 2", "give all three"),
        ("--process_id 0", "give all three"),
        ("--coordinator localhost:1 --num_processes 2 --process_id 2", "--process_id 2: must be from 0 to 1"),
        ("--coordinator localhost --num_processes 2 --process_id 0", "--coordinator 'localhost': must be HOST:PORT"),
        ("--coordinator localhost:http --num_processes 2 --process_id 1", "must be HOST:PORT"),
    ],
)
def test_flags_that_name_no_processes(flags: str, message: str) -> None:
    with pytest.raises(CoconutError, match=re.escape(message)):
        join_by(flags)


def test_a_coordinator_that_does_not_answer() -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))  # Nobody listens there.
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(CoconutError, match=f"--coordinator {address}: no answer within 0 s"):
            join_by(f"--coordinator {address} --num_processes 2 --process_id 1 --distributed_timeout 0")


def test_a_host_whose_environment_names_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(**options: object) -> None:
        raise ValueError("coordinator_address should be defined.")  # As JAX says it on a plain host.

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(CoconutError, match="On a plain host give --coordinator HOST:PORT"):
        join_by("--distributed")


@pytest.mark.parametrize(
    ("backend", "own_folder", "kept"), [("gpu", True, False), ("gpu", False, True), ("tpu", True, True)]
)
def test_programs_that_were_measured_on_a_gpu_are_not_kept_for_one_of_several_processes(
    backend: str, own_folder: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, bool] = {}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(users_folder()) if own_folder else "/elsewhere")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: None)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    join_by("--distributed")
    assert settings.get("jax_enable_compilation_cache", True) == kept


def test_one_process_joins_nobody() -> None:
    join_by("")
    assert not jax.distributed.is_initialized()
