"""What imitation does not give is learnt from rewards: a rarer right answer, and fewer thoughts. A shuffled one is not.

Questions are five symbols. Nine of ten training answers are the fourth, the others the fifth: so does the model answer.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.policies.config import PolicyConfig
from coconut.models.config import DecoderConfig
from coconut.pipeline import PipelineConfig
from coconut.tasks import save_examples
from coconut.training.config import RunConfig
from coconut.training.optimizer import OptimizerConfig
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.rewards import REWARDS, Sample, Setting, register_reward
from coconut.types import Example
from tests.training.trained_runs import lines_of, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

SYMBOLS = tuple("abcdefgh")


def rarer(samples: Sequence[Sample], setting: Setting) -> list[float]:
    """1 for the fifth symbol as the answer."""
    return [float(sample.text == f"[A] {sample.example.question.split()[4]}") for sample in samples]


def shuffled(samples: Sequence[Sample], setting: Setting) -> list[float]:
    """The same, each for the text of another sample of the step."""
    order = random.Random(len(samples[0].text) + sum(sample.new_tokens for sample in samples))
    values = rarer(samples, setting)
    order.shuffle(values)
    return values


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coconut.training.rewards.REWARDS", dict(REWARDS))
    register_reward("rarer", rarer)
    register_reward("shuffled", shuffled)


def run_config(data: Path, **changes: Any) -> RunConfig:
    values = {
        "method": "coconut",
        "data": DataConfig(task="small_graphs", train=str(data), tokenizer="symbols"),
        "decoder": DecoderConfig(
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            mlp_dim=64,
            max_positions=24,
            embedding_stddev=0.5,
            kernel_stddev=0.2,
        ),
        "curriculum": CurriculumConfig(max_latent_stage=2, last_stage=2, epochs_per_stage=None, steps_per_stage=100),
        "optimizer": OptimizerConfig(learning_rate=1e-2, b2=0.99, clip_norm=1.0, warmup_steps=20, decay="linear"),
        "pipeline": PipelineConfig(batch_size=64),
        "sampling": SamplingConfig(max_new_tokens=4),
        "save_every": None,
        "log_every": 20,
    }
    return RunConfig(**(values | changes))


@pytest.fixture(scope="module")
def imitated(tmp_path_factory: pytest.TempPathFactory, compiled_once: Any) -> tuple[Path, Path]:
    """The data and a run that has imitated them: two steps are thoughts."""
    folder, rng = tmp_path_factory.mktemp("imitated"), random.Random(0)
    rows = list(dict.fromkeys(tuple(rng.choices(SYMBOLS, k=5)) for _ in range(3000)))
    examples = [
        Example(question=" ".join(row), steps=(row[0], row[1]), answer=row[4 if index % 10 == 0 else 3])
        for index, row in enumerate(rows)
    ]
    save_examples(folder / "train.json", examples)
    trained(run_config(folder / "train.json"), folder / "run")
    return folder / "train.json", folder / "run"


def rewarded(
    imitated: tuple[Path, Path], workdir: Path, policy: PolicyConfig, rewards: dict[str, float], seed: int
) -> list[dict[str, Any]]:
    """What a run of 100 steps logs."""
    data, start = imitated
    config = run_config(
        data,
        init_from=str(start),
        seed=seed,
        halting=HaltingConfig(stop="head", threshold=0.5, least=0, most=2, room=2) if policy.learnt_stop else None,
        curriculum=CurriculumConfig(
            max_latent_stage=2, first_stage=2, last_stage=2, epochs_per_stage=None, steps_per_stage=100
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, b2=0.99, weight_decay=0.0, clip_norm=1.0),
        pipeline=PipelineConfig(batch_size=16),
        reinforcement=ReinforcementConfig(policy=policy, rewards=rewards),
    )
    trained(config, workdir)
    return lines_of(workdir, "train")


STOPS = PolicyConfig(learnt_stop=True)
POLICIES = {
    "deterministic": PolicyConfig(),
    "gaussian": PolicyConfig(kind="gaussian", options={"share": 0.1, "over": "mean"}),
    "dropout": PolicyConfig(kind="dropout", options={"rate": 0.1}),
    "learnt_stop": STOPS,
}
CASES = [(policy, seed) for policy in POLICIES for seed in range(3)]
IN_EVERY_RUN = ("gaussian", 0)


@pytest.mark.parametrize(
    ("policy", "seed"),
    [pytest.param(*case, marks=() if case == IN_EVERY_RUN else pytest.mark.heavy) for case in CASES],
)
def test_a_rarer_right_answer_is_learnt(policy: str, seed: int, imitated: tuple[Path, Path], tmp_path: Path) -> None:
    first, *_, last = rewarded(imitated, tmp_path / "run", POLICIES[policy], {"rarer": 1.0}, seed)
    assert first["reward"] < 0.5
    assert last["reward"] > 0.85


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in (1, 2))])
def test_a_shuffled_reward_teaches_nothing(seed: int, imitated: tuple[Path, Path], tmp_path: Path) -> None:
    lines = rewarded(imitated, tmp_path / "run", POLICIES["gaussian"], {"shuffled": 1.0}, seed)
    # Steps on noise wander: 0.31 at most in three seeds, where the reward itself brings more than 0.85.
    assert max(line["reward"] for line in lines) < 0.5


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in (1, 2))])
def test_fewer_thoughts_are_learnt(seed: int, imitated: tuple[Path, Path], tmp_path: Path) -> None:
    """The answer needs none of the thoughts, as the model was never told."""
    first, *_, last = rewarded(imitated, tmp_path / "run", STOPS, {"answer": 1.0, "thoughts": -0.2}, seed)
    assert first["thoughts"] > 1.4
    assert last["thoughts"] < 0.3
    assert last["reward_answer"] > first["reward_answer"] - 0.1
    assert np.isfinite(last["entropy_stops"])
