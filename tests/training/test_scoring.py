"""Labels and loss of a scorer against slow sums; runs that train one, and what they refuse."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.datasets import Dataset, load_dataset
from coconut.errors import CoconutError
from coconut.latent.policies.config import PolicyConfig
from coconut.latent.sampling import Given
from coconut.model import parameters_of
from coconut.pipeline import BatchSource
from coconut.sharding import make_mesh
from coconut.tasks import Task
from coconut.training.config import RunConfig
from coconut.training.loading import load_model
from coconut.training.optimizer import make_optimizer
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.rollouts import make_learning
from coconut.training.samplers import make_sampler
from coconut.training.scoring import ScorerConfig, chosen, contrastive_loss, labels_of
from coconut.training.setup import abstract_state, initial_state, prepare
from coconut.training.trajectories import _CONTINUING, Scoring, Trajectories, _fields
from coconut.types import Batch
from tests.tiny_models import quick_jit
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, interrupt_at, lines_of, trained

RNG = np.random.default_rng(0)
GAUSSIAN = PolicyConfig(kind="gaussian", options={"share": 1.0})


def test_labels_are_shares_counted_one_by_one() -> None:
    right, continued, thoughts = RNG.random((4, 3)) < 0.5, RNG.random((3, 4, 3, 5)) < 0.5, np.array([4, 2, 1, 0])
    labels = labels_of(right, continued, thoughts)
    for question in range(4):
        for trajectory in range(3):
            for step in range(4):
                expected = 0.0
                if step < thoughts[question] - 1:
                    expected = sum(map(bool, continued[step, question, trajectory])) / 5
                elif step == thoughts[question] - 1:
                    expected = float(right[question, trajectory])
                assert labels[question, trajectory, step] == pytest.approx(expected)
    np.testing.assert_array_equal(labels_of(right, continued[:0], np.ones(4, int))[..., 0], right)


def test_the_loss_is_numpys() -> None:
    scores, labels = RNG.normal(size=(3, 4, 2)).astype(np.float32), RNG.random((3, 4, 2)).astype(np.float32)
    counted = np.array([[True, True], [True, False], [False, False]])
    expected = []
    for question, step in zip(*np.nonzero(counted), strict=True):
        own = scores[question, :, step]
        shares = np.exp(own) / np.exp(own).sum()
        expected.append(-sum(labels[question, i, step] * np.log(shares[i]) for i in range(4)))
    found = contrastive_loss(jnp.asarray(scores), jnp.asarray(labels), jnp.asarray(counted))
    assert float(found.weight) == 3
    assert float(found.mean()) == pytest.approx(np.mean(expected), rel=1e-5)
    right = RNG.random((3, 4)) < 0.5
    by_hand = [right[question, np.argmax(scores[question].sum(-1))] for question in range(3)]
    np.testing.assert_array_equal(chosen(jnp.asarray(scores), jnp.asarray(right)), by_hand)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trajectories": 1}, "ScorerConfig.trajectories = 1: must be at least 2"),
        ({"continuations": 0}, "ScorerConfig.continuations = 0"),
        ({"epochs": 0}, "ScorerConfig.epochs = 0"),
        ({"most_draws": 0}, "ScorerConfig.most_draws = 0"),
        ({"temperature": -1.0}, "ScorerConfig.temperature = -1.0"),
        ({"policy": PolicyConfig()}, "ScorerConfig.policy: PolicyConfig.kind = 'deterministic' draws no thoughts"),
        ({"policy": PolicyConfig(kind="dropout")}, "PolicyConfig.kind = 'dropout' draws no thoughts"),
        (
            {"policy": PolicyConfig(kind="gaussian", learnt_stop=True)},
            "PolicyConfig.learnt_stop = True: sums of scores",
        ),
    ],
)
def test_scorers_that_cannot_be_trained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError) as caught:
        ScorerConfig(**settings)
    assert message in str(caught.value)


LAST = {"first_stage": 1, "max_latent_stage": 2, "c_thought": 2, "steps_per_stage": 4}


def scoring(start: Path | str | None = "somewhere", changes: Any = None, **settings: Any) -> Any:
    """A run of four steps that trains a scorer."""
    values = {"policy": GAUSSIAN, "trajectories": 3, "continuations": 2, "temperature": 1.0, "most_draws": 2}
    return tiny_run(
        scorer=ScorerConfig(**{**values, **settings}),
        init_from=None if start is None else str(start),
        **{"curriculum": LAST, "save_every": 1, "log_every": 1, **(changes or {})},
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"changes": {"reinforcement": ReinforcementConfig()}}, "RunConfig.reinforcement changes it"),
        ({"policy": PolicyConfig(kind="gumbel")}, "draws around what FeedbackConfig.kind = 'mixture' thinks"),
        ({"changes": {"sampling": {"top_k": 2}}}, "SamplingConfig.top_k = 2: samples to learn from"),
        ({"changes": {"pipeline": {"length_buckets": (20,)}}}, "ScorerConfig.most_draws = 2: takes the questions of"),
        ({"changes": {"curriculum": {**LAST, "advance_metric": "loss", "advance_below": 0.1}}}, "learns no stage"),
    ],
)
def test_runs_that_cannot_train_a_scorer(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        scoring(**settings)


def half_right(config: RunConfig) -> Dataset:
    """The data of a run, with a task that takes about half of all texts for right, whoever writes them."""
    task = Task(
        name="small_graphs",
        extract_answer=lambda text: "wrong" if len(text) % 3 else "right",
        normalize_answer=lambda answer: answer if answer == "wrong" else "right",
    )
    return dataclasses.replace(load_dataset(config.data), task=task)


def test_a_scorer_of_nobody_is_refused() -> None:
    with pytest.raises(CoconutError, match=r"RunConfig.scorer: needs the model whose thoughts are scored"):
        prepare(scoring(None))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, compiled_once: Any) -> Path:
    """A supervised run to start from."""
    workdir = tmp_path_factory.mktemp("started") / "run"
    trained(tiny_run(curriculum={**LAST, "steps_per_stage": 2}), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_trains_the_scorer_alone(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CoconutError, match=r"RunConfig.scorer: the method 'coconut' at stage 0 has no block"):
        prepare(scoring(started, {"curriculum": {**LAST, "first_stage": 0}}))
    run = scoring(started, epochs=2)
    data = half_right(run)
    trained(run, tmp_path / "whole", dataset=data)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert not trained(run, tmp_path / "resumed", dataset=data).progress.finished
    trained(run, tmp_path / "resumed", dataset=data)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")

    lines = lines_of(tmp_path / "whole", "train")
    for line in lines:
        assert {"right", "live", "loss", "accuracy_of_one"} <= line.keys()
        assert 0 <= line["right"] <= 1
    assert any(line["live"] > 0 for line in lines)
    before = parameters_of(load_model(started, "latest")[1])
    after = parameters_of(load_model(tmp_path / "whole", "latest")[1])
    moved = {name for name, value in after.items() if name.startswith("scorer")}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
        if name.startswith("decoder.layers"):
            assert not np.array_equal(after[name.replace("decoder.", "scorer.", 1)], value), name
    assert np.any(after["scorer_head.kernel"])
    assert after.keys() == before.keys() | moved


@pytest.mark.slow
def test_a_scorer_starts_as_a_copy_and_microbatches_change_nothing(started: Path, tmp_path: Path) -> None:
    for microbatches in (1, 4):
        changes = {"microbatches": microbatches, "optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0}}
        run = scoring(started, {**changes, "curriculum": {**LAST, "steps_per_stage": 1}})
        trained(run, tmp_path / f"{microbatches}", dataset=half_right(run))
    [one], [four] = (lines_of(tmp_path / name, "train") for name in ("1", "4"))
    for name in one.keys() - {"kind"}:
        np.testing.assert_allclose(four[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
    after = parameters_of(load_model(tmp_path / "1", "latest")[1])
    for name, value in after.items():
        if name.startswith("decoder."):
            np.testing.assert_allclose(after[name.replace("decoder.", "scorer.", 1)], value, atol=1e-9)
    # All scores are 0: the loss of a step is the sum of its labels times log 3.
    assert one["loss"] == pytest.approx(3 * one["label"] * np.log(3), rel=1e-4)


@pytest.mark.slow
def test_labels_of_a_step_are_those_of_continuations_one_by_one(started: Path) -> None:
    config = scoring(started, {"curriculum": {**LAST, "c_thought": 3}})
    run, dataset, examples = prepare(config, half_right(config))
    optimizer, mesh = make_optimizer(run.config.optimizer), make_mesh()
    template, _ = abstract_state(run.config, optimizer, mesh)
    state = initial_state(run, optimizer, mesh)
    learning = make_learning(run.config, template, optimizer, mesh, tokenizer=run.tokenizer, dataset=dataset)
    assert isinstance(learning, Scoring)
    source = BatchSource(examples, run.tokenizer, learning.method, run.placing(1), run.config.pipeline, seed=0)
    with jax.set_mesh(mesh):
        rows = learning.views(state, iter([source[0], source[1]]), 5).device["main"]
    assert isinstance(rows, Trajectories)
    model = template.model(state.parameters)
    sampler = make_sampler(run.config, run.tokenizer, model)

    @quick_jit
    def written_behind(row: Batch, thoughts: Any, count: Any, key: Any) -> Any:
        return sampler.sample(model.decoder, row, key[None], begun=Given(thoughts[None], count))[1]

    def is_right(written: Any, example: int) -> bool:
        text = run.tokenizer.decode(np.asarray(written.tokens)[0, : int(written.lengths[0])].tolist())
        return dataset.task.check(text, dataset.splits["train"][example])

    counted = np.flatnonzero(np.asarray(rows.counted))[:2]
    assert len(counted) == 2 and rows.thoughts.shape[1:3] == (3, 3)
    for question in counted:
        example = int(rows.examples[question])
        row = jax.tree.map(lambda x, question=question: x[question][None], Batch(**_fields(rows)))
        for trajectory in range(3):
            thoughts = rows.thoughts[question, trajectory]
            for count in (1, 2):
                keys = learning._keys(learning._key, _CONTINUING, jnp.asarray(5), jnp.asarray(count), 8 * 3 * 2)
                own = keys.reshape(8, 3, 2)[question, trajectory]
                found = [is_right(written_behind(row, thoughts, count, key), example) for key in own]
                label = float(rows.labels_of_thoughts[question, trajectory, count - 1])
                assert label == np.mean(found), (question, trajectory, count)
            assert rows.labels_of_thoughts[question, trajectory, 2] == rows.right[question, trajectory]
    # Continuations are draws of their own: they differ from each other and from their trajectory.
    assert len(np.unique(rows.labels_of_thoughts)) == 3
