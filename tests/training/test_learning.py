"""Runs that learn from rewards: resumed to the bit, on meshes and in processes, with what they log.

What needs several devices or processes runs ``python -m tests.training.test_learning WORKDIR ADDRESS PROCESSES INDEX``.
"""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from coconut.latent.feedback import FeedbackConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.policies.config import PolicyConfig
from coconut.mesh import MeshConfig
from coconut.model import parameters_of
from coconut.sharding import make_mesh
from coconut.training.loading import load_model
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.setup import initial_model, prepare
from tests.tiny_models import process_environment, quick_compilation
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, interrupt_at, lines_of, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

GAUSSIAN = PolicyConfig(kind="gaussian", options={"share": 0.3, "learnt": True})


def rewarded(policy: PolicyConfig = GAUSSIAN, *, steps: int = 4, changes: Any = None, **settings: Any) -> Any:
    """A run of one stage with thoughts; what a model that knows nothing can learn is to end, and to think little."""
    values = {"group": 4, "policy": policy, "rewards": {"format": 1.0, "overlong": 0.5}, **settings}
    return tiny_run(
        curriculum={"first_stage": 1, "max_latent_stage": 2, "c_thought": 2, "steps_per_stage": steps},
        reinforcement=ReinforcementConfig(**values),
        save_every=1,
        log_every=1,
        **(changes or {}),
    )


SEVERAL = {"epochs": 2, "minibatches": 2, "dead_groups": "resample", "most_draws": 2, "best_first_thought": True}


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (GAUSSIAN, SEVERAL),
        pytest.param(
            PolicyConfig(kind="dropout", learnt_stop=True),
            {"changes": {"halting": HaltingConfig(stop="head", threshold=0.5, least=0, most=2, room=2)}},
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            PolicyConfig(kind="gated_token"),
            {"ratio": "sequence", "changes": {"feedback": FeedbackConfig(kind="gated")}},
            marks=pytest.mark.heavy,
        ),
    ],
)
def test_a_run_resumes_to_the_bit(
    policy: PolicyConfig, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rewarded(policy, **settings)
    trained(run, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert not trained(run, tmp_path / "resumed").progress.finished
    trained(run, tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert lines_of(tmp_path / "resumed", "rollouts") == lines_of(tmp_path / "whole", "rollouts")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, compiled_once: Any) -> Path:
    """A supervised run to start from."""
    workdir = tmp_path_factory.mktemp("started") / "run"
    trained(
        tiny_run(curriculum={"first_stage": 1, "max_latent_stage": 2, "c_thought": 2, "steps_per_stage": 2}), workdir
    )
    return workdir


def test_what_is_logged_and_what_is_trained(started: Path, tmp_path: Path) -> None:
    run = rewarded(kl_weight=0.1, changes={"init_from": str(started)}, steps=3)
    trained(run, tmp_path / "run")

    first, *_, last = lines_of(tmp_path / "run", "train")
    assert first["ratio"] == 1.0, "to the bit"
    assert first["clipped"] == 0.0
    assert first["sampler_gap"] < 1e-4
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert last["kl"] > 0
    for name in ("reward", "reward_format", "dead_groups", "thoughts", "thought_size", "new_tokens", "ended"):
        assert np.isfinite(first[name])
    assert first["thoughts"] == 2
    assert 0 <= first["dead_groups"] <= 1
    assert {"entropy_thoughts", "entropy_tokens"} <= first.keys()
    [shown, *_] = lines_of(tmp_path / "run", "rollouts")
    assert len(shown["rollouts"]) == 8
    assert shown["rollouts"][0].keys() == {"question", "text", "thoughts", "reward"}

    after = parameters_of(load_model(tmp_path / "run", "latest", train_only=True)[1])
    before = parameters_of(load_model(started, "latest")[1])
    for name, value in before.items():
        if name.startswith("decoder."):
            np.testing.assert_array_equal(after[f"reference.{name}"], value)
    # The parts that samples are made with are kept as they were, too.
    assert after["reference.policy.log_share"] == np.float32(np.log(0.3))
    assert not np.array_equal(after["decoder.norm.scale"], before["decoder.norm.scale"])
    assert after["policy.log_share"] != np.float32(np.log(0.3))
    assert not any(name.startswith("reference.") for name in parameters_of(load_model(tmp_path / "run", "latest")[1]))


@pytest.mark.parametrize("copied", ["reference", "reader"])
def test_copies_of_the_start_have_its_numbers_where_the_configs_differ_in_what_is_no_model(
    started: Path, copied: str
) -> None:
    """They were fresh ones, without a word: a penalty for leaving a model of random numbers."""
    changes: dict[str, Any] = {"init_from": str(started), "decoder": {"kernel_stddev": 0.5}}
    run = rewarded(kl_weight=0.1, changes=changes) if copied == "reference" else tiny_run(method="simcot", **changes)
    found = parameters_of(initial_model(prepare(run)[0]))
    before = parameters_of(load_model(started, "latest")[1])

    prefix = f"{copied}.decoder." if copied == "reference" else f"{copied}."
    copies = {
        name.removeprefix(prefix): value
        for name, value in found.items()
        if name.startswith(prefix) and f"decoder.{name.removeprefix(prefix)}" in before
    }
    assert len(copies) > 5
    for name, value in copies.items():
        np.testing.assert_array_equal(value, before[f"decoder.{name}"], err_msg=name)


def test_a_second_epoch_starts_from_the_same_probabilities(started: Path, tmp_path: Path) -> None:
    """With next to no learning rate the parameters stay, and so do all ratios: of the replay with itself."""
    still = {"init_from": str(started), "optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0}}
    trained(rewarded(epochs=2, minibatches=2, changes=still, steps=1), tmp_path / "run")

    [line] = lines_of(tmp_path / "run", "train")
    assert line["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_microbatches_change_nothing(started: Path, tmp_path: Path) -> None:
    for microbatches in (1, 4):
        changes = {"init_from": str(started), "microbatches": microbatches}
        trained(rewarded(changes=changes, steps=1), tmp_path / f"{microbatches}")
    # Not the parameters: Adam's first step is the sign of a gradient, also where that is rounding.
    [one], [four] = (lines_of(tmp_path / name, "train") for name in ("1", "4"))
    assert one.keys() == four.keys()
    for name in one.keys() - {"kind"}:
        np.testing.assert_allclose(four[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


# --- Several devices ----------------------------------------------------------------------------------------------


def start(workdir: Path, processes: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.training.test_learning", str(workdir), address, str(processes)]
    return [
        subprocess.Popen(
            [*command, str(index)],
            cwd=Path(__file__).parents[2],
            env=process_environment(devices=8 // processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def on_devices() -> Any:
    return rewarded(**{**SEVERAL, "best_first_thought": False}, steps=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_devices_and_processes_change_nothing(processes: int, tmp_path: Path) -> None:
    children = start(tmp_path / "several", processes)
    outputs = [child.communicate(timeout=900) for child in children]
    for child, (_, error) in zip(children, outputs, strict=True):
        assert child.returncode == 0, error
    trained(on_devices(), tmp_path / "one")

    lines, expected = (lines_of(tmp_path / name, "train", "rollouts") for name in ("several", "one"))
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        for name, value in line.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, other[name], rtol=2e-3, atol=1e-4, err_msg=name)
            else:
                assert value == other[name]


def main(workdir: str, address: str, processes: str, index: str) -> None:
    if processes != "1":
        jax.distributed.initialize(address, int(processes), int(index), initialization_timeout=300)
    assert jax.device_count() == 8
    with quick_compilation():
        trained(on_devices(), Path(workdir), mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


if __name__ == "__main__":
    main(*sys.argv[1:])
