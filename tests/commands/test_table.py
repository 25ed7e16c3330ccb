"""A table of methods: its budget, its grid of runs, what is said of those that fail, and going on after a stop."""

import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import coconut.commands.table.budget as budget_module
import coconut.commands.train as train_module
from coconut.commands.configuration import resolve_run
from coconut.commands.flags import parse_arguments
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, main
from coconut.commands.table import grid as grid_module
from coconut.commands.table.budget import Budget, bindings_of, divide, measure_steps
from coconut.curriculum import stage_steps
from coconut.datasets import Dataset
from coconut.errors import CoconutError
from coconut.evaluation.statistics import bootstrap_interval, mcnemar
from coconut.training.config import RunConfig
from tests.tiny_models import quick_compilation
from tests.tiny_runs import tiny_run

TINY = """
include 'gin_configs/runs/small_graphs.gin'
DataConfig.train = 40
DataConfig.validation = 8
DataConfig.test = 10
DecoderConfig.embed_dim = 8
DecoderConfig.num_layers = 1
CurriculumConfig.max_latent_stage = 1
CurriculumConfig.last_stage = 1
RunConfig.evaluation_batch_size = 16
"""


@pytest.fixture(autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.mark.parametrize(
    ("run", "method", "steps"),
    [
        ("prosqa", "coconut", 1000),
        ("prosqa", "cot", 1000),
        ("gsm8k_coconut", "coconut", 100),
        ("gsm8k_llama-3.2-1b", "coconut", 999),
        ("small_graphs", "coconut", 5),
    ],
)
def test_stages_share_a_budget_as_they_share_the_methods_own_steps(run: str, method: str, steps: int) -> None:
    files = [f"gin_configs/runs/{run}.gin", f"gin_configs/methods/{method}.gin"]
    own = resolve_run(files).curriculum
    lengths = divide(own, steps)
    stages = range(own.first_stage, own.final_stage + 1)
    curriculum = resolve_run(files, bindings_of(lengths)).curriculum
    # Whatever an epoch is.
    assert [stage_steps(curriculum, stage, 77) for stage in stages] == lengths
    assert sum(lengths) == steps and curriculum.advance_metric is None
    before = np.asarray([stage_steps(own, stage, 1000) for stage in stages])
    # What is rounded off goes to the last stage.
    np.testing.assert_allclose(lengths[:-1], steps * before[:-1] / before.sum(), atol=1)
    assert lengths[-1] >= steps * before[-1] / before.sum() - 1e-6
    assert (curriculum.first_stage, curriculum.final_stage) == (own.first_stage, own.final_stage)


def test_a_budget_of_minutes_is_turned_into_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 0 takes 0.1 s a step behind its first 10, stage 1 0.3 s; the last of three equal stages 0.5 s."""
    curriculum = {"max_latent_stage": 2, "last_stage": 2}

    def measured(config: Any, workdir: Path, **_: Any) -> Any:
        lines, seconds = [{"kind": "compile", "step": 0, "stage": 0}], 0.0
        assert config.curriculum.steps_per_stage == 30 and config.log_every == 10
        for stage in range(3):
            for step in range(1, 31):
                seconds += 9.0 if step <= 10 else 0.1 + 0.2 * stage
                if step % 10 == 0:
                    lines.append({"kind": "train", "step": 30 * stage + step, "stage": stage, "seconds": seconds})
        workdir.mkdir()
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return SimpleNamespace(progress=SimpleNamespace(finished=True))

    monkeypatch.setattr(budget_module, "train", measured)
    data: Any = None
    dataset: Dataset = data
    steps = measure_steps(tiny_run(curriculum=curriculum), 10, tmp_path / "run", dataset=dataset)
    assert steps == pytest.approx(600 / 0.3, abs=1)
    # Stages of other lengths weigh as much as they last.
    longer = tiny_run(curriculum={**curriculum, "last_stage_factor": 2.0})
    assert measure_steps(longer, 10, tmp_path / "run", dataset=dataset) == pytest.approx(600 / 0.35, abs=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["2000", "0steps", "1.5steps", "-3steps", "ten minutes", "10 hours"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(CoconutError, match=r"--budget .* must be a positive number such as 2000steps or 10minutes"):
        Budget.parse(text)
    assert Budget.parse("2000steps") == Budget(steps=2000) and Budget.parse("1.5minutes") == Budget(minutes=1.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--methods": "coconut,paus"}, "unknown method: 'paus'; did you mean 'pause'?"),
        ({"--methods": "cot,cot"}, "--methods cot,cot: must name at least one, and each once"),
        ({"--seeds": "0,0"}, "--seeds 0,0: must name at least one, and each once"),
        ({"--seeds": "0,one"}, "--seeds '0,one': must be whole numbers"),
        ({"--budget": "7"}, "--budget '7': must be a positive number"),
        ({"--budget": "1steps"}, "1 steps are too few for the stages of a method, whose shares are 0.5, 0.5"),
        ({"--task": "small_graph"}, "did you mean 'small_graphs'?"),
        ({"--task": "prosqa"}, "--task prosqa: the files say DataConfig.task = 'small_graphs'"),
        ({"--gin_binding": "DataConfig.test = 0"}, "DataConfig.test = 0: a table is about questions of a test split"),
        ({"--gin_binding": "DecoderConfig.max_positions = 30"}, "40 of 40"),
    ],
)
def test_bad_input_is_one_message_before_any_cell(
    changed: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.gin").write_text(TINY)
    flags = {"--task": "small_graphs", "--methods": "coconut,cot", "--seeds": "0", "--budget": "4steps"}
    flags |= {"--config": str(tmp_path / "tiny.gin"), "--output": str(tmp_path / "table"), **changed}
    assert main(["table", *(word for pair in flags.items() for word in pair)]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


@pytest.fixture
def compiled_once(tmp_path: Path) -> Iterator[None]:
    """Programs of one seed serve the next."""
    options = {"jax_compilation_cache_dir": str(tmp_path / "programs"), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_small_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "table"
    (tmp_path / "tiny.gin").write_text(TINY)
    (tmp_path / "broken.gin").write_text("include 'gin_configs/methods/no_cot.gin'")
    config = ["--config", str(tmp_path / "tiny.gin"), "--output", str(output), "--budget", "4steps"]
    command = ["table", "--task", "small_graphs", *config]
    command += ["--methods", f"{tmp_path / 'broken.gin'},coconut,no_cot", "--seeds", "0,1"]

    train = grid_module.train_to_the_end

    def trained(run: RunConfig, workdir: Path, *others: Any) -> Any:
        if workdir.parent.name == "broken":
            raise MemoryError("no memory for this one")
        return train(run, workdir, *others)

    monkeypatch.setattr(grid_module, "train_to_the_end", trained)

    # A run is stopped in its second stage, and goes on there.
    validate, calls = train_module.validate, []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(train_module, "validate", stopped)
    assert main(command) == EXIT_INTERRUPTED
    assert calls == [0, 1] and not (output / "table.json").exists()
    begun = output / "cells" / "coconut" / "seed_0"
    assert (begun / "run.json").exists() and not (begun / "result.json").exists()
    monkeypatch.setattr(train_module, "validate", validate)
    assert main(command) == EXIT_FAILED
    starts = [line for line in (begun / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 2

    content = json.loads((output / "table.json").read_text())
    rows = content["methods"]
    # What failed is no zero, and the others ran on.
    assert list(rows) == ["broken", "coconut", "no_cot"] and rows["broken"]["accuracy"] is None
    assert rows["broken"]["failed"] == [0, 1] == rows["coconut"]["seeds"] == rows["no_cot"]["seeds"]
    assert [(x["method"], x["seed"]) for x in content["failures"]] == [("broken", 0), ("broken", 1)]
    assert {failure["error"] for failure in content["failures"]} == {"MemoryError: no memory for this one"}
    assert "Traceback" in (output / "cells" / "broken" / "seed_0" / "failure.txt").read_text()

    # The numbers are those of the answers.
    right = {}
    for method in ("coconut", "no_cot"):
        cells = [output / "cells" / method / f"seed_{seed}" for seed in (0, 1)]
        lines = [json.loads(line) for cell in cells for line in (cell / "answers.jsonl").read_text().splitlines()]
        right[method] = np.asarray([line["right"] for line in lines if line["setting"] == "trained"]).reshape(2, 10)
        results = [json.loads((cell / "result.json").read_text()) for cell in cells]
        own = rows[method]
        assert own["accuracies"] == right[method].mean(1).tolist() and own["accuracy"] == right[method].mean()
        assert own["interval_95"] == list(bootstrap_interval(right[method]))
        assert own["training_steps"] == 4
        assert own["training_seconds"] == np.mean([result["training"]["seconds"] for result in results])
        if method == "coconut":
            assert [stage["steps"] for stage in results[0]["training"]["stages"]] == [2, 2]
            altered = own["interventions"]
            for name in ("removed", "zero", "noise", "mean", "other"):
                entries = [result["evaluation"]["interventions"][name] for result in results]
                assert altered[name]["correct"] == sum(entry["correct"] for entry in entries)
                assert altered[name]["choice"]["correct"] == sum(entry["choice"]["correct"] for entry in entries)
                assert altered[name]["examples"] == 20 == altered[name]["choice"]["examples"]
            # One thought has no other order.
            assert altered["permuted"] is None
            assert own["passes"] == own["tokens"] + 1
    assert set(rows["no_cot"]["interventions"].values()) == {None}
    worse = next((method for method in right if method != content["best"]), "")
    assert rows[worse]["against_best"]["p_value"] == mcnemar(right["coconut"], right["no_cot"]).p_value
    assert rows[content["best"]]["against_best"] is None
    assert parse_arguments(shlex.split(content["command"])[1:]) == parse_arguments(command)
    assert content["data_fingerprints"]["test"] and content["provenance"]["commit"]
    assert content["best_shortcut"]["accuracy"] >= 0.5 and content["config"]["coconut"]["method"] == "coconut"

    # What is written for readers.
    text = (output / "table.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3 and all("failed" in table.splitlines()[2] for table in tables)
    for table in tables[1:]:
        [line] = [line for line in table.splitlines() if line.startswith("| no_cot")]
        assert line.count(" - ") == 6 if table == tables[1] else 7
    assert (
        "failed: broken, seed 0: MemoryError: no memory for this one" in text
        and "multi-pass pause has no row of its own" in text
    )
    with (output / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == list(rows) and lines[0]["accuracy"] == ""
    assert float(lines[1]["zero_choice_accuracy"]) == rows["coconut"]["interventions"]["zero"]["choice"]["accuracy"]
    assert (lines[1]["zero_rows"], lines[2]["zero_rows"]) == ("20", "")
    assert (output / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "table.svg").read_text()

    # What is done is left alone, and what failed is tried again; another config is another table.
    monkeypatch.setattr(grid_module, "evaluate_workdir", lambda *_, **__: pytest.fail("evaluated once more"))
    assert main(command) == EXIT_FAILED
    assert json.loads((output / "table.json").read_text())["methods"] == rows
    assert main([*command, "--gin.DecoderConfig.num_heads=2"]) == EXIT_BAD_INPUT
    assert "holds another run" in capsys.readouterr().err
