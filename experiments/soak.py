"""Kills a run again and again, and looks whether anything was lost: bits, lines of metrics, files, memory.

    python -m experiments.soak --output FILE [--kills 30] [--seconds 0] [--threads 4] [--processes 1]

A small run saves every few steps, goes through stages, resets its optimizer, adds gradients up over microbatches and
validates. One copy of it runs undisturbed; another is killed at random moments and started again, until it has had its
kills and its seconds. Then both must hold the same bits and the same metrics.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coconut.provenance import provenance
from coconut.storage import write_atomically
from coconut.training.checkpoint import Checkpoints
from coconut.training.events import EVENTS_FILE
from experiments import ending

GIN = """
include 'gin_configs/base.gin'
RunConfig.method = 'coconut'
DataConfig.task = 'small_graphs'
DataConfig.train = 200
DataConfig.validation = 8
DataConfig.options = {{'config': 'e8'}}
DataConfig.tokenizer = 'symbols'
DecoderConfig.num_layers = 1
DecoderConfig.embed_dim = 16
DecoderConfig.num_heads = 2
DecoderConfig.max_positions = 48
DecoderConfig.dropout = 0.1
CurriculumConfig.max_latent_stage = 2
CurriculumConfig.last_stage = 2
CurriculumConfig.epochs_per_stage = None
CurriculumConfig.steps_per_stage = {steps}
CurriculumConfig.uniform_prob = 0.3
PipelineConfig.batch_size = 16
PipelineConfig.threads = {threads}
SamplingConfig.max_new_tokens = 4
RunConfig.microbatches = 2
RunConfig.save_every = {save_every}
RunConfig.evaluate_every = {evaluate_every}
RunConfig.log_every = 5
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs the soak and writes what it found."""
    parser = argparse.ArgumentParser(description="Kills a run again and again, and looks whether anything was lost.")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--kills", type=int, default=30, help="at least so many")
    parser.add_argument("--seconds", type=float, default=0.0, help="at least so long, with kills on and on")
    parser.add_argument("--longest", type=float, default=25.0, help="seconds that a process lives at most")
    parser.add_argument("--steps", type=int, default=400, help="of each of the three stages")
    parser.add_argument("--save_every", type=int, default=10)
    parser.add_argument("--threads", type=int, default=4, help="that prefetch")
    parser.add_argument("--processes", type=int, default=1, help="of one run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    with ending.by_exception(), tempfile.TemporaryDirectory() as name:
        found = soak(Path(name), options)
    found = {"command": " ".join(["python -m experiments.soak", *sys.argv[1:]]), **found, "provenance": provenance()}
    write_atomically(options.output, json.dumps(found, indent=1) + "\n")
    print(
        json.dumps(
            {name: value for name, value in found.items() if "memory" not in name and name != "provenance"}, indent=1
        )
    )
    sys.exit(int(bool("failed" in found or found["different"] or found["leftovers"])))


def soak(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs both copies and compares them."""
    (folder / "run.gin").write_text(
        GIN.format(
            steps=options.steps,
            threads=options.threads,
            save_every=options.save_every,
            evaluate_every=5 * options.save_every,
        )
    )
    start = time.monotonic()
    straight, disturbed = folder / "straight", folder / "disturbed"
    undisturbed = _run(folder, straight, options.processes, None)
    assert undisturbed["code"] == 0, undisturbed["errors"]
    alone = time.monotonic() - start
    rng, kills, memory, round_ends = random.Random(options.seed), 0, [], 0
    different: list[str] = []
    start = time.monotonic()
    while True:
        more = kills < options.kills or time.monotonic() - start < options.seconds
        ended = _run(folder, disturbed, options.processes, rng.uniform(2.0, options.longest) if more else None)
        memory.append(ended["memory"])
        if ended["code"] == -signal.SIGKILL:
            kills += 1
        elif ended["code"]:
            return {"failed": ended["errors"], "kills": kills}
        elif more:
            # It is done before its time: once more from the start.
            round_ends += 1
            different += _compare(straight, disturbed)
            shutil.rmtree(disturbed)
        else:
            break
    different += _compare(straight, disturbed)
    return {
        "kills": kills,
        "rounds": round_ends + 1,
        "seconds": round(time.monotonic() - start),
        "seconds_of_an_undisturbed_run": round(alone),
        "different": different,
        "leftovers": sorted(path.name for path in (disturbed / "checkpoints").iterdir() if not path.name.isdecimal()),
        "events": sum(1 for _ in (disturbed / EVENTS_FILE).open()),
        "memory": memory,
        "memory_of_the_undisturbed_run": undisturbed["memory"],
    }


def _run(folder: Path, workdir: Path, processes: int, seconds: float | None) -> dict[str, Any]:
    """Starts the run, and kills it after so many seconds; what became of it, and its memory once a second."""
    command = [sys.executable, "-m", "coconut", "train", "--gin_file", str(folder / "run.gin")]
    command += ["--workdir", str(workdir)]
    several = ["--coordinator", f"localhost:{_free_port()}", "--num_processes", str(processes), "--process_id"]
    each = [[*command, *several, str(index)] for index in range(processes)] if processes > 1 else [command]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    errors = (folder / "errors").open("w+")
    started = [subprocess.Popen(one, env=environment, stdout=errors, stderr=errors) for one in each]
    begun, memory = time.monotonic(), []
    try:
        while started[0].poll() is None and (seconds is None or time.monotonic() - begun <= seconds):
            memory.append(_resident_bytes(started[0].pid))
            time.sleep(1.0 if seconds is None else min(1.0, max(0.0, seconds - (time.monotonic() - begun)) + 0.01))
        if started[0].poll() is None:
            for process in started:
                process.kill()
        codes = [process.wait() for process in started]  # Where the first has ended by itself, so do the others.
    finally:
        for process in started:
            process.kill()
    errors.seek(0)
    return {"code": next((code for code in codes if code), 0), "errors": errors.read()[-2000:], "memory": memory}


def _resident_bytes(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _compare(one: Path, two: Path) -> list[str]:
    """The arrays and the lines of metrics that differ between two finished runs."""
    arrays, lines = [], []
    for workdir in (one, two):
        checkpoints = Checkpoints(workdir, read_only=True)
        step = checkpoints.step("latest")
        assert step is not None
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), checkpoints.arrays(step))
        state, progress = checkpoints._restore(step, abstract)
        assert progress.finished
        checkpoints.close()
        arrays.append(
            {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
        )
        content = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        lines.append(
            [
                {name: value for name, value in line.items() if "seconds" not in name}
                for line in content
                if line["kind"] != "compile"
            ]
        )
    different = [
        name
        for name, value in arrays[0].items()
        if np.asarray(value).tobytes() != np.asarray(arrays[1][name]).tobytes()
    ]
    unequal = [str(a) for a, b in zip(*lines, strict=False) if a != b]
    if len(lines[0]) != len(lines[1]):
        unequal.append(f"{len(lines[0])} and {len(lines[1])} lines")
    return different + unequal


if __name__ == "__main__":
    main()
