"""Paths, files and logs of workdirs, on a disk and in an object store.

The store is `gcp-storage-emulator`, a server on this machine that Orbax, tensorstore and gcsfs are pointed at. It
stands for Google Cloud Storage as far as its interface goes: not for its permissions, its limits and its delays.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from coconut import storage_path
from coconut.commands.main import EXIT_BAD_INPUT, main
from coconut.errors import CoconutError
from coconut.storage import LineLog, exists, hold, make_folder, read_text, write_atomically
from coconut.storage_path import is_remote, parse_path


@pytest.mark.parametrize("text", ["s3://bucket/run", "gs://", "gs:///", "https://storage.googleapis.com/bucket/run"])
def test_what_is_no_path_is_an_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CoconutError, match="gs://BUCKET/FOLDER"):
        parse_path(text)
    with pytest.raises(SystemExit) as exit_code:
        main(["evaluate", "--workdir", text])
    assert exit_code.value.code == EXIT_BAD_INPUT
    assert f"argument --workdir: {text!r}: a path is" in capsys.readouterr().err


def test_a_missing_backend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_path.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoconutError, match=r"gs://bucket/run: reaching gs:// needs `pip install coconut-jax\[gcs\]`"):
        parse_path("gs://bucket/run")
    assert parse_path("runs/mine") == Path("runs/mine")


def test_a_folder_is_not_made_for_what_pathlib_makes_of_a_url() -> None:
    with pytest.raises(CoconutError, match="parse_path"):
        make_folder(Path("gs://bucket/run"))
    assert not Path("gs:").exists()


def test_files_on_a_disk(tmp_path: Path) -> None:
    folder = parse_path(str(tmp_path / "a" / "b"))
    assert not (is_remote(folder) or exists(folder))
    make_folder(folder)
    write_atomically(folder / "x.json", "é\r\n")
    write_atomically(folder / "x.json", "ü\r\n")
    assert read_text(folder / "x.json") == "ü\r\n"
    assert [path.name for path in Path(folder).iterdir()] == ["x.json"]
    with pytest.raises(CoconutError, match=r"y.json: No such file"):
        read_text(folder / "y.json")
    with pytest.raises(CoconutError, match=r"c/x.json: No such file"):
        write_atomically(folder / "c" / "x.json", "")


HOLDING = """
import sys, time
from pathlib import Path
from coconut.storage import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(CoconutError, match=f"{tmp_path}: another process trains in this workdir"), hold(tmp_path):
        raise AssertionError("held by two")
    other.kill()
    other.wait()
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    with hold(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "refusal"), [(errno.ENOSYS, None), (errno.ENOTSUP, None), (errno.EIO, r"\.lock: Input/output error")]
)
def test_a_disk_without_locks_is_a_warning_and_one_that_fails_an_error(
    number: int, refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    expected = nullcontext() if refusal is None else pytest.raises(CoconutError, match=refusal)
    with expected, hold(tmp_path):
        assert f"{tmp_path} is on a disk without locks" in caplog.text


def test_a_log_on_a_disk_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LineLog(path, ["kept"])
    log.write("new")
    assert path.read_text() == "kept\nnew\n"
    log.close()
    assert LineLog(path, ["b"]).close() is None
    assert path.read_text() == "b\n"


# Its own process: tensorstore can hold Python's lock while it waits for an answer. What the emulator lacks, and
# tensorstore builds on, is added: an object's generation with its content, and requests that depend on it.
STORE = """
import sys
from http import HTTPStatus

from gcp_storage_emulator import server as emulator

def conditional(handler):
    def handle(request, response, storage, *others):
        def generation():
            name = request.params.get("object_id") or request.query.get("name", [""])[0]
            return storage.objects.get(request.params["bucket_name"], {}).get(name, {}).get("generation", "0")

        before = generation()
        if request.query.get("ifGenerationMatch", [before]) != [before]:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [before] != ["0"]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage, *others)
        response["x-goog-generation"] = generation()
    return handle

for pattern, handlers in emulator.HANDLERS:
    if "bucket_name" in pattern and "/o" in pattern:
        handlers.update({method: conditional(handler) for method, handler in handlers.items()})
server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()  # until the test is over
"""

# The clients read the store's address when they are first imported, so this, too, has a process of its own.
IN_A_STORE = """
import json, sys
from pathlib import Path

from coconut.storage import LineLog, exists, read_text, write_atomically
from coconut.storage_path import parse_path
from coconut.errors import CoconutError
from tests.tiny_runs import tiny_run

said = {}
folder = parse_path("gs://bucket/a")
said["before"] = exists(folder / "x")
write_atomically(folder / "x", "old")
write_atomically(folder / "x", "\\u00fc\\r\\n")
said["content"], said["after"] = read_text(folder / "x"), [exists(folder / "x"), exists(folder)]

log = LineLog(folder / "log", ["kept"], rewrite_seconds=3600)
log.write("1")
said["gathered"] = read_text(folder / "log")
log.flush()
said["flushed"] = read_text(folder / "log")
log.write("2")
log.close()
said["closed"] = read_text(folder / "log")
log = LineLog(folder / "log", rewrite_seconds=0)
log.write("at once")
said["rewritten"] = read_text(folder / "log")

for name, call in {
    "missing": lambda: read_text(folder / "nothing"),
    "no_bucket": lambda: write_atomically(parse_path("gs://other/x"), ""),
}.items():
    try:
        call()
    except CoconutError as error:
        said[name] = str(error)

# A run that stops in its second stage, as a preempted one does, goes on from the store, and ends as one on a disk.
from coconut.analysis.curves import read_metrics
from coconut.training.checkpoint import Checkpoints
from coconut.training.loading import load_model
from coconut.training.loop import train

config = tiny_run(save_every=9)
save, saved = Checkpoints.save, []

class Killed(BaseException):
    pass

def save_and_die(self, state, progress, validation, **others):
    save(self, state, progress, validation, **others)
    saved.append(progress.step)
    if progress.step == 9:
        raise Killed

def numbers(workdir):
    lines = [line for line in read_metrics(workdir) if line["kind"] != "compile"]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

import jax, numpy as np

stored, local = parse_path("gs://bucket/runs/tiny"), Path(sys.argv[1])
Checkpoints.save = save_and_die
# The log of a process that is killed is not closed.
close, LineLog.close = LineLog.close, lambda self: None
try:
    train(config, stored)
except Killed:
    said["killed_after"] = [line["step"] for line in numbers(stored)]
Checkpoints.save, LineLog.close = save, close
resumed, straight = train(config, stored), train(config, local)
said["finished"] = [resumed.progress.finished, resumed.progress.step, resumed.compilations]
from coconut.analysis.runs import summarize_run
from coconut.training.workdir import find_workdirs

said["found"] = [str(path) for path in find_workdirs(parse_path("gs://bucket"))]
said["summaries"] = [vars(summarize_run(workdir)) for workdir in (stored, local)]
said["same_metrics"] = numbers(stored) == numbers(local)
_, model, progress = load_model(stored, "latest")
pairs = zip(jax.tree.leaves(model), jax.tree.leaves(straight.model), strict=True)
said["same_bits"] = progress.step == 14 and all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)
said["steps"] = sorted(int(path.name) for path in (stored / "checkpoints").iterdir())
said["local_steps"] = sorted(int(path.name) for path in (local / "checkpoints").iterdir())
print(json.dumps(said))
"""


@pytest.fixture
def store_address() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", STORE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield f"http://localhost:{int(process.stdout.readline())}"
        process.kill()


@pytest.mark.slow
def test_a_run_in_an_object_store(tmp_path: Path, store_address: str) -> None:
    addresses = {"STORAGE_EMULATOR_HOST": store_address, "TENSORSTORE_GCS_HTTP_URL": store_address}
    # Neither belongs to the run: a project the client asks for, and a question about the bucket that needs credentials.
    client = {"GOOGLE_CLOUD_PROJECT": "none", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    # Programs of one training are those of the next.
    compiled_once = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
    }
    process = subprocess.run(
        [sys.executable, "-c", IN_A_STORE, str(tmp_path / "run")],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **compiled_once, **addresses, **client},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    said = json.loads(process.stdout.splitlines()[-1])
    assert (said["before"], said["content"], said["after"]) == (False, "ü\r\n", [True, True])
    assert (said["gathered"], said["flushed"], said["closed"]) == ("kept\n", "kept\n1\n", "kept\n1\n2\n")
    assert said["rewritten"] == "at once\n"
    assert said["missing"].startswith("gs://bucket/a/nothing: ")
    assert said["no_bucket"].startswith("gs://other/x: ")
    # All lines up to the checkpoint of step 9 had reached the store before it.
    assert said["killed_after"][-1] == 8
    assert said["finished"] == [True, 14, 1]
    assert said["found"] == ["gs://bucket/runs/tiny"]
    stored, local = said["summaries"]
    differ = {name for name in local if stored[name] != local[name]}
    assert local["state"] == "finished" and stored["written"] and differ <= {"workdir", "written"}
    assert said["same_metrics"]
    assert said["same_bits"]
    assert said["steps"] == said["local_steps"]
