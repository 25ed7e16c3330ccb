"""Every shipped config resolves and builds its abstract model; wrong ones say what is wrong."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from coconut.latent.feedback import Identity
from coconut.methods import METHODS
from coconut.tasks import TASKS
from coconut.training.config import RunConfig, differences, from_json, to_json
from coconut.training.state import make_model
from coconut.types import CoconutError
from experiments.configuration import resolve_run

CONFIGS = Path(__file__).parents[2] / "gin_configs"
RUNS = sorted(path.name for path in (CONFIGS / "runs").glob("*.gin"))
SMALL = "gin_configs/runs/small_graphs.gin"


def resolve(run: str, method: str = "coconut", *bindings: str) -> RunConfig:
    return resolve_run([f"gin_configs/runs/{run}", f"gin_configs/methods/{method}.gin"], bindings)


@pytest.mark.parametrize("run", RUNS)
def test_every_run_resolves_and_builds_its_abstract_model(run: str) -> None:
    text = (CONFIGS / "runs" / run).read_text()
    for word in ("Hardware:", "Expected"):
        assert word in text.split("include")[0], f"the header of {run} does not say {word!r}"
    config = resolve(run)
    decoder = dataclasses.replace(config.decoder, vocab_size=config.decoder.vocab_size or 100)
    model = jax.eval_shape(lambda key: make_model(decoder, Identity(), key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) > 1000
    assert from_json(RunConfig, to_json(config), run) == config


def test_every_method_has_its_file_and_every_file_its_method() -> None:
    assert {path.stem for path in (CONFIGS / "methods").glob("*.gin")} == set(METHODS)
    for method in METHODS:
        config = resolve("small_graphs.gin", method)
        assert config.method == method
        moves = method in ("coconut", "coconut_without_thought", "pause_as_thought")
        assert config.curriculum.final_stage == (3 if moves else 0)


def test_every_task_has_its_file_and_every_file_its_task() -> None:
    assert {path.stem for path in (CONFIGS / "tasks").glob("*.gin")} == set(TASKS)
    for task in TASKS:
        config = resolve_run(
            ["gin_configs/base.gin", "gin_configs/models/gpt2.gin", f"gin_configs/tasks/{task}.gin"],
            ["RunConfig.method = 'cot'"],
        )
        assert config.data.task == task
        assert from_json(RunConfig, to_json(config), task) == config


def test_later_files_and_bindings_win() -> None:
    assert resolve("small_graphs.gin").optimizer.learning_rate == 3e-3
    config = resolve("small_graphs.gin", "cot", "OptimizerConfig.learning_rate = 1e-2", "RunConfig.seed = 7")
    assert (config.method, config.optimizer.learning_rate, config.seed) == ("cot", 1e-2, 7)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("DecoderConfig.embed_dims = 8", "Did you mean 'DecoderConfig.embed_dim'"),
        ("DecoderConfi.embed_dim = 8", "Did you mean 'DecoderConfig'"),
        ("DecoderConfig.embed_dim = 2.5", "DecoderConfig.embed_dim = 2.5"),
        ("DecoderConfig.norm_epsilon = 'small'", "DecoderConfig.norm_epsilon = 'small': must be float"),
        ("DecoderConfig.tied_head = 'yes'", "DecoderConfig.tied_head = 'yes': must be bool"),
        ("RunConfig.method = 'cocnut'", "did you mean 'coconut'"),
        ("DataConfig.task = 'prosqaa'", "did you mean 'prosqa'"),
        ("RunConfig.data = 3", "RunConfig.data = 3: must be DataConfig"),
        ("CurriculumConfig.uniform_prob = 1.5", "CurriculumConfig.uniform_prob = 1.5"),
        ("PipelineConfig.batch_size = 0", "PipelineConfig.batch_size = 0"),
    ],
)
def test_bad_bindings_name_the_field_and_the_value(binding: str, message: str) -> None:
    with pytest.raises(CoconutError, match=re.escape(message)):
        resolve("small_graphs.gin", "coconut", binding)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(CoconutError, match=r"no_such\.gin"):
        resolve_run(["gin_configs/runs/no_such.gin"])


def test_differences_name_each_leaf() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 there, 3 here",
        "d: '(missing)' there, 4 here",
    ]
