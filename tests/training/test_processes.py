"""Two processes train, stop, go on and evaluate as one does.

Each process is ``python -m tests.training.test_processes``; both share one workdir.
"""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from coconut.mesh import MeshConfig
from coconut.sharding import make_mesh
from tests.tiny_models import process_environment, quick_compilation
from tests.tiny_runs import tiny_run


def start(workdir: Path, processes: int, *others: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.training.test_processes",
                str(workdir),
                address,
                str(processes),
                str(i),
                *others,
            ],
            cwd=Path(__file__).parents[2],
            env=process_environment(devices=4 // processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(children: list[subprocess.Popen]) -> list[dict]:
    """What each process printed last."""
    outputs = [child.communicate(timeout=900) for child in children]
    for child, (_, error) in zip(children, outputs, strict=True):
        assert child.returncode == 0, error
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def metrics_of(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] != "compile"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    workdir = tmp_path_factory.mktemp("alone")
    [result] = finish(start(workdir, 1))
    return workdir, result


def assert_same_run(workdir: Path, results: list[dict], alone: tuple[Path, dict]) -> None:
    expected_workdir, expected = alone
    assert results == [results[0]] * len(results), "every process knows the whole result"
    assert results[0]["evaluation"] == expected["evaluation"]
    assert results[0]["evaluation"]["examples"] == 4
    lines, expected_lines = metrics_of(workdir), metrics_of(expected_workdir)
    assert [line["kind"] for line in lines] == [line["kind"] for line in expected_lines], "one process writes"
    for line, other in zip(lines, expected_lines, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, other[name], rtol=1e-4, err_msg=f"{name} of {other}")
    # As the metrics: where a signal falls decides how many steps add their rows in another order.
    np.testing.assert_allclose(results[0]["norm"], expected["norm"], rtol=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_the_run_goes_on_as_one(tmp_path: Path, alone: tuple[Path, dict]) -> None:
    stopped = finish(start(tmp_path, 2, "stop"))
    assert [result["finished"] for result in stopped] == [False, False]
    assert stopped[0]["step"] == stopped[1]["step"] < 14
    results = finish(start(tmp_path, 2))
    assert [result["finished"] for result in results] == [True, True]
    assert_same_run(tmp_path, results, alone)


# --- A process of the run ---------------------------------------------------------------------------------------


def main(workdir: str, address: str, processes: str, process: str, *others: str) -> None:
    if processes != "1":
        jax.distributed.initialize(address, int(processes), int(process), initialization_timeout=300)
    assert jax.device_count() == 4
    from coconut.commands.evaluate import EvaluateConfig, evaluate_workdir
    from coconut.commands.train import validate
    from coconut.training.loop import train
    from tests import outside_module  # Its method has a loss of two terms over two views.

    assert outside_module.taught

    def preempted(model, run, dataset, stage):
        # Between the two stages, of the second process alone, which passes it on as a SIGTERM: both are tested.
        if others and process == "1":
            signal.raise_signal(signal.SIGINT)
        return validate(model, run, dataset, stage)

    config = tiny_run(method="taught", microbatches=2, evaluation_batch_size=4)
    mesh = make_mesh(MeshConfig(fsdp=2))
    with quick_compilation():
        result = train(config, Path(workdir), mesh=mesh, validate=preempted)
        print(result.progress.step, file=sys.stderr)
        evaluation = None
        if result.progress.finished:
            evaluated = evaluate_workdir(Path(workdir), EvaluateConfig(split="validation"), mesh=mesh)
            evaluation = {name: evaluated["trained"][name] for name in ("examples", "correct", "tokens")}
    with jax.set_mesh(mesh):
        norm = jax.jit(lambda model: sum(abs(x).sum() for x in jax.tree.leaves(model)))(result.model)
    summary = {"finished": result.progress.finished, "step": result.progress.step}
    print(json.dumps({**summary, "evaluation": evaluation, "norm": float(norm)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
