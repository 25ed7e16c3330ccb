"""Every shipped config resolves and builds its abstract model; wrong ones say what is wrong."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from coconut.commands.configuration import resolve_run
from coconut.commands.evaluate import questions_of
from coconut.curriculum import stage_steps
from coconut.datasets import DataConfig, load_dataset
from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.model import make_model
from coconut.models.adapters import AdapterConfig
from coconut.models.config import ExecutionConfig
from coconut.models.parameters import abstract_decoder
from coconut.models.presets import PRESETS
from coconut.models.singular_values import SingularValueConfig
from coconut.tasks import TASKS
from coconut.tokenizers import symbol_tokenizer
from coconut.training.config import RunConfig, differences, from_json, to_json
from coconut.training.run import Run
from tests.tiny_runs import tiny_run

CONFIGS = Path(__file__).parents[2] / "gin_configs"
RUNS = sorted(path.name for path in (CONFIGS / "runs").glob("*.gin"))
SMALL = "gin_configs/runs/small_graphs.gin"


def resolve(run: str, method: str = "coconut", *bindings: str) -> RunConfig:
    return resolve_run([f"gin_configs/runs/{run}", f"gin_configs/methods/{method}.gin"], bindings)


def resolve_alone(run: str, *bindings: str) -> RunConfig:
    return resolve_run([f"gin_configs/runs/{run}"], bindings)


@pytest.mark.parametrize("run", RUNS)
def test_every_run_resolves_and_builds_its_abstract_model(run: str) -> None:
    text = (CONFIGS / "runs" / run).read_text()
    for word in ("Hardware:", "Expected"):
        assert word in text.split("include")[0], f"the header of {run} does not say {word!r}"
    config = resolve_alone(run) if "gin_configs/methods/" in text.partition("include")[2] else resolve(run)
    decoder = dataclasses.replace(config.decoder, vocab_size=config.decoder.vocab_size or 100)
    model = jax.eval_shape(lambda key: make_model(decoder, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) > 1000
    assert from_json(RunConfig, to_json(config), run) == config


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run of the papers: what must not drift.

    Attributes:
      method: the method its table is about.
      stages: the stages it goes through.
      epochs: of each of them.
      thoughts: of the final stage.
      decoder: its preset; None for a run from scratch.
      shared: fields of the run and their values.
      names_method: whether the run itself names its method.
    """

    method: str
    stages: range
    epochs: tuple[float, ...]
    thoughts: int
    decoder: str | None
    shared: Mapping[str, Any]
    names_method: bool = False

    def resolve(self, run: str, *bindings: str) -> RunConfig:
        return resolve_alone(run, *bindings) if self.names_method else resolve(run, self.method, *bindings)


PAPER = {"learning_rate": 1e-4, "weight_decay": 0.01, "clip_norm": None, "warmup_steps": 0, "decay": "constant"}
LARGER = {"learning_rate": 1e-5, "clip_norm": 1.0, "dtype": "bfloat16", "param_dtype": "float32", "scan_layers": True}
ICOT = {"learning_rate": 5e-5, "clip_norm": 1.0, "remove_all_beyond": 39, "tokens_per_stage": 8, "smoothing": 4.0}
DISTILLED = {"learning_rate": 3e-3, "weight_decay": 0.1, "clip_norm": 2.0, "warmup_steps": 3615, "decay": "cosine"}
DISTILLED |= {"rank": 128, "alpha": 32.0, "distill": 1.0, "teacher": 1.0, "reset_optimizer": "never"}
DISTILLED_LLAMA = DISTILLED | {"learning_rate": 8e-4, "warmup_steps": 904, "distill": 20.0}
PCCOT = {"sweeps": 3, "clip_norm": 1.0, "embedding": False}
KAVA = {"distill": 10.0, "cache": 1.0, "importance": 0.1, "sweeps": 3}
COLAR = {"learning_rate": 1e-4, "weight_decay": 0.01, "most_compressed": 5, "rank": 128}
PROSQA = (range(8), (5,) * 7 + (15,), 6)
RECIPES = {
    "gsm8k_cot.gin": Recipe("cot", range(1), (25,), 6, "gpt2", PAPER, True),
    "gsm8k_coconut.gin": Recipe("coconut", range(1, 5), (3, 3, 3, 13), 6, "gpt2", PAPER),
    "gsm8k_coconut_stage_mixing.gin": Recipe(
        "coconut", range(1, 5), (3, 3, 3, 13), 6, "gpt2", PAPER | {"stage_weights": "rising"}, True
    ),
    "gsm8k_icot.gin": Recipe("icot", range(1, 7), (1,) * 5 + (75,), 6, "gpt2", PAPER | ICOT, True),
    "gsm8k_codi.gin": Recipe("codi", range(1), (40,), 6, "gpt2", DISTILLED, True),
    "gsm8k_codi_llama-3.2-1b.gin": Recipe("codi", range(1), (10,), 6, "llama-3.2-1b", DISTILLED_LLAMA, True),
    "gsm8k_simcot.gin": Recipe("simcot", range(1, 6), (3,) * 4 + (18,), 10, "gpt2", PAPER | {"reader": 1.0}, True),
    "gsm8k_simcot_codi.gin": Recipe("simcot_codi", range(1), (40,), 6, "gpt2", DISTILLED | {"reader": 1.0}, True),
    "gsm8k_simcot_codi_llama-3.2-1b.gin": Recipe(
        "simcot_codi", range(1), (10,), 6, "llama-3.2-1b", DISTILLED_LLAMA | {"reader": 1.0}, True
    ),
    "gsm8k_pccot.gin": Recipe(
        "pccot", range(1), (40,), 24, "gpt2", DISTILLED | PCCOT | {"weight_decay": 0.01, "kind": "identity"}, True
    ),
    "gsm8k_pccot_llama-3.2-1b.gin": Recipe(
        "pccot", range(1), (10,), 24, "llama-3.2-1b", DISTILLED_LLAMA | PCCOT | {"divide_by": "all"}, True
    ),
    "gsm8k_kava.gin": Recipe("kava", range(1), (40,), 24, "gpt2", DISTILLED | KAVA, True),
    "gsm8k_kava_llama-3.2-1b.gin": Recipe("kava", range(1), (10,), 24, "llama-3.2-1b", DISTILLED_LLAMA | KAVA, True),
    "gsm8k_colar.gin": Recipe("colar", range(1), (50,), 6, "gpt2", COLAR | {"factor": 0.12}, True),
    "gsm8k_colar_llama-3.2-1b.gin": Recipe(
        "colar", range(1), (50,), 6, "llama-3.2-1b", COLAR | {"factor": 0.018}, True
    ),
    "gsm8k_ponder_codi.gin": Recipe(
        "ponder_codi",
        range(1),
        (5,),
        6,
        "gpt2",
        DISTILLED | {"learning_rate": 2e-5, "warmup_steps": 0, "prior_mean": 3.0},
        True,
    ),
    "prontoqa.gin": Recipe("coconut", *PROSQA, "gpt2", PAPER),
    "prosqa.gin": Recipe("coconut", *PROSQA, "gpt2", PAPER),
    "prosqa_from_scratch.gin": Recipe("coconut", *PROSQA, None, PAPER),
    "superposition.gin": Recipe("coconut", range(6), (25,) * 5 + (175,), 4, None, PAPER | {"shuffle_edges": True}),
    "gsm8k_llama-3.2-1b.gin": Recipe("coconut", range(8), (3,) + (1,) * 7, 6, "llama-3.2-1b", LARGER),
    "gsm8k_deepseek-v2-lite.gin": Recipe(
        "coconut", range(8), (3,) + (1,) * 7, 6, "deepseek-v2-lite", LARGER | {"scan_layers": False}
    ),
    "gsm8k_qwen2.5-0.5b.gin": Recipe("coconut", range(8), (3,) + (1,) * 7, 6, "qwen2.5-0.5b", LARGER),
}
BATCHES = {"superposition.gin": 256, "gsm8k_icot.gin": 32, "gsm8k_simcot.gin": 64}
BATCHES |= {"gsm8k_colar.gin": 256, "gsm8k_colar_llama-3.2-1b.gin": 256}
FROM_COT = ("gsm8k_coconut.gin", "gsm8k_coconut_stage_mixing.gin", "gsm8k_simcot.gin", "gsm8k_colar.gin")
STARTS = {
    **dict.fromkeys(FROM_COT, ("runs/gsm8k_cot", "best")),
    "gsm8k_ponder_codi.gin": ("runs/gsm8k_simcot_codi", "latest"),
}
CURRICULA = {"coconut_stage_mixing", "coconut_thought_by_thought"}  # Files of a curriculum for coconut.
ONE_STAGE = ("cot", "no_cot", "pause", "coconut_without_curriculum")


@pytest.mark.parametrize("run", RECIPES)
def test_recipes_say_what_the_papers_say(run: str) -> None:
    recipe = RECIPES[run]
    config = recipe.resolve(run)
    assert config.method == recipe.method
    curriculum, steps_per_epoch = config.curriculum, 1000
    assert range(curriculum.first_stage, curriculum.final_stage + 1) == recipe.stages
    lengths = [stage_steps(curriculum, stage, steps_per_epoch) for stage in recipe.stages]
    assert [length / steps_per_epoch for length in lengths] == list(recipe.epochs)
    assert curriculum.max_thoughts == recipe.thoughts
    assert config.pipeline.batch_size == BATCHES.get(run, 128)
    assert config.sampling.max_new_tokens == {"gsm8k": 64, "superpos": 8}.get(run.split("_")[0][:8], 128)
    flat = {name: value for part in to_json(config).values() if isinstance(part, dict) for name, value in part.items()}
    assert {name: flat[name] for name in recipe.shared} == recipe.shared


@pytest.mark.parametrize("run", [run for run, recipe in RECIPES.items() if recipe.decoder])
def test_recipes_build_the_published_decoder(run: str) -> None:
    recipe, config = RECIPES[run], RECIPES[run].resolve(run)
    assert recipe.decoder is not None
    preset = PRESETS[recipe.decoder]
    assert config.decoder == dataclasses.replace(preset, vocab_size=None, param_dtype=config.decoder.param_dtype)
    # Layers are traced once where they are stacked. Its parameters and the markers' rows, whatever the dtypes.
    decoder = dataclasses.replace(config.decoder, vocab_size=preset.vocabulary + 3)
    scanned = ExecutionConfig(scan_layers=preset.experts is None)  # Else the first layer is another one.
    model = jax.eval_shape(lambda key: make_model(decoder, key, execution=scanned), jax.random.key(0))
    published = abstract_decoder(preset, scanned)
    parameters, expected = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (model, published))
    assert parameters == expected + 3 * preset.embed_dim * (1 if preset.tied_head else 2)


@pytest.mark.parametrize("run", [run for run, recipe in RECIPES.items() if recipe.decoder])
def test_recipes_start_from_a_checkpoint_that_one_macro_names(run: str) -> None:
    config = RECIPES[run].resolve(run, "PRETRAINED = 'some/folder'")
    assert config.data.tokenizer == "huggingface" and config.data.tokenizer_path == "some/folder"
    if run in STARTS:
        assert (config.pretrained, config.init_from, config.init_checkpoint) == (None, *STARTS[run])
    else:
        assert (config.pretrained, config.init_from, config.marker_token) == ("some/folder", None, "<<")
    assert config.data.markers == ("reserved" if "llama" in run else "appended")


@pytest.mark.parametrize("method", ONE_STAGE)
def test_methods_of_one_stage_train_as_long_as_the_others(method: str) -> None:
    for run, epochs in (("gsm8k.gin", 25), ("prontoqa.gin", 50), ("prosqa.gin", 50), ("superposition.gin", 300)):
        assert stage_steps(resolve(run, method).curriculum, 0, 10) == 10 * epochs
    # They have no stage 1 to begin at: the run that does so refuses them.
    with pytest.raises(CoconutError, match=re.escape("CurriculumConfig.first_stage = 1: must be in 0 .. 0")):
        resolve("gsm8k_coconut.gin", method)


def test_commands_name_files_that_exist() -> None:
    texts = [path.read_text() for path in (*CONFIGS.rglob("*.gin"), CONFIGS.parent / "README.md")]
    named = {name for text in texts for name in re.findall(r"gin_configs/[\w./-]+\.gin", text)}
    assert len(named) > 20
    assert [name for name in named if not (CONFIGS.parent / name).exists()] == []


def test_every_method_has_its_file_and_every_file_its_method() -> None:
    assert {path.stem for path in (CONFIGS / "methods").glob("*.gin")} == METHODS.keys() | CURRICULA
    for method in METHODS:
        config = resolve("small_graphs.gin", method)
        assert config.method == method
        moves = (
            "coconut",
            "coconut_frontier",
            "coconut_without_thought",
            "pause_as_thought",
            "interleaved",
            "random_thoughts",
            "simcot",
        )
        assert config.curriculum.final_stage == (6 if method == "icot" else 3 if method in moves else 0)


def test_the_files_of_other_curricula_set_them() -> None:
    plain = resolve("gsm8k_coconut.gin", "coconut").curriculum
    changes = {
        "coconut_stage_mixing": {"uniform_prob": 1.0, "uniform_stages": "reached", "stage_weights": "rising"},
        "coconut_thought_by_thought": {"stage_adds": "thought"},
    }
    assert changes.keys() == CURRICULA
    for name, change in changes.items():
        config = resolve("gsm8k_coconut.gin", name)
        assert (config.method, config.curriculum) == ("coconut", dataclasses.replace(plain, **change))


ONLY_ASKED = {"svamp", "multiarith", "gsm_hard", "strategyqa", "commonsenseqa"}
"""Tasks of published test sets."""


def test_every_task_has_its_file_and_every_file_its_task() -> None:
    trained_on = TASKS.keys() - ONLY_ASKED
    assert {path.stem for path in (CONFIGS / "tasks").glob("*.gin")} == trained_on
    for task in trained_on:
        config = resolve_run(
            ["gin_configs/base.gin", "gin_configs/models/gpt2.gin", f"gin_configs/tasks/{task}.gin"],
            ["RunConfig.method = 'cot'"],
        )
        assert config.data.task == task
        assert from_json(RunConfig, to_json(config), task) == config


def test_adapters_are_one_more_file() -> None:
    """CODI's: rank 128, alpha 32, dropout 0.1 (Shen et al. 2025)."""
    assert sorted(path.name for path in (CONFIGS / "adapters").glob("*.gin")) == ["lora.gin", "singular_values.gin"]
    config = resolve_run([SMALL, "gin_configs/methods/coconut.gin", "gin_configs/adapters/lora.gin"])
    assert isinstance(config.adapter, AdapterConfig)
    assert (config.adapter.rank, config.adapter.scaling, config.adapter.dropout) == (128, 0.25, 0.1)
    scaled = resolve_run([SMALL, "gin_configs/methods/coconut.gin", "gin_configs/adapters/singular_values.gin"])
    assert isinstance(scaled.adapter, SingularValueConfig)
    for resolved in (config, scaled):
        assert from_json(RunConfig, json.loads(json.dumps(to_json(resolved))), "adapter") == resolved


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
        ("RunConfig.marker_token = '##'", "RunConfig.marker_token = '##': means nothing without pretrained"),
        ("RunConfig.init_checkpoint = 'best'", "RunConfig.init_checkpoint = 'best': means nothing without init_from"),
        ("CurriculumConfig.uniform_prob = 1.5", "CurriculumConfig.uniform_prob = 1.5"),
        ("PipelineConfig.batch_size = 0", "PipelineConfig.batch_size = 0"),
        ("PRETRAIND = 'x'", "PRETRAIND = 'x': nothing reads a macro of this name"),
        ("log_every = 3", "nothing reads a macro of this name. Did you mean 'RunConfig.log_every'?"),
        ("train/RunConfig.seed = 3", "train/RunConfig.seed = 3: nothing in this run reads it"),
        ("HaltingConfig.threshold = 0.5", "nothing in this run reads it, there is no HaltingConfig"),
        (
            "RunConfig.method=coconut",
            "text stands in quotes, which the shell must leave: --gin.RunConfig.method=\"'coconut'\"",
        ),
        ("RunConfig.init_from=runs/x", "--gin.RunConfig.init_from=\"'runs/x'\""),
        ("RunConfig.save_every=none", "Python writes it None"),
        ("RunConfig.seed", "a binding is NAME=VALUE"),
    ],
)
def test_bad_bindings_name_the_field_and_the_value(binding: str, message: str) -> None:
    with pytest.raises(CoconutError, match=re.escape(message)):
        resolve("small_graphs.gin", "coconut", binding)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["gin_configs/runs/small_graph.gin"], "small_graph.gin: there is no such gin file; did you mean " + SMALL),
        ([SMALL], "RunConfig.method is missing; gin_configs/methods/METHOD.gin binds it"),
        (["gin_configs/methods/cot.gin"], "RunConfig.data is missing; gin_configs/base.gin binds it"),
        (["gin_configs/base.gin", "gin_configs/pretrained.gin"], "PRETRAINED is missing: --gin.PRETRAINED="),
    ],
)
def test_a_missing_file_is_named_once(files: list[str], message: str) -> None:
    with pytest.raises(CoconutError) as raised:
        resolve_run(files)
    assert message in str(raised.value) and str(raised.value).count(message.partition(":")[0]) <= 2


def test_an_include_is_looked_for_beside_its_file_and_a_macro_may_be_read_in_vain(tmp_path: Path) -> None:
    """Whoever binds another value behind a file's macro has made no mistake."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "run.gin").write_text(f"include 'parts/first.gin'\ninclude '{SMALL}'\nRunConfig.method = 'cot'\n")
    (tmp_path / "parts" / "first.gin").write_text("include 'second.gin'\n")
    (tmp_path / "parts" / "second.gin").write_text("OFTEN = 3\nRunConfig.log_every = %OFTEN\n")
    assert resolve_run([str(tmp_path / "run.gin")]).log_every == 3
    assert resolve_run([str(tmp_path / "run.gin")], ["RunConfig.log_every = 7"]).log_every == 7
    assert resolve_run([str(tmp_path / "run.gin")], ["HaltingConfig.most = 7"], shared=True).halting is None


def test_differences_name_each_leaf() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == {
        "a.c": "2 there, 3 here",
        "d": "'(missing)' there, 4 here",
    }


def test_evaluate_takes_the_validation_split_that_training_used() -> None:
    """Of 8,100 questions 800 are drawn: without care the two splits would share some."""
    data = DataConfig(task="multiplication", train=40, validation=400, test=400, options={"digits": [2, 2]})
    run = Run(dataclasses.replace(tiny_run(), data=data), symbol_tokenizer(["a"]), "")
    assert questions_of(run, "validation") == load_dataset(data).splits["validation"]


def test_an_integer_of_any_length_is_no_number_of_a_config() -> None:
    content = to_json(tiny_run())
    longer = {
        "RunConfig.save_every": {**content, "save_every": 10**400},
        "CurriculumConfig.advance_below": {**content, "curriculum": content["curriculum"] | {"advance_below": 10**400}},
    }
    for field, changed in longer.items():
        with pytest.raises(CoconutError, match=f"{field} = 1000.*, and a number of at most 64 bits"):
            from_json(RunConfig, changed, "here")
