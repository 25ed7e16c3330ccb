"""The command line as a user meets it: exit codes, one clear message."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE, main
from coconut.commands.quickstart import QuickstartConfig
from tests.tiny_models import quick_compilation

RUN = ["--gin_file", "gin_configs/runs/small_graphs.gin", "--gin_file", "gin_configs/methods/coconut.gin"]
TINY = [
    "--gin.DataConfig.train=40",
    "--gin.DataConfig.validation=8",
    "--gin.DataConfig.test=10",
    "--gin.DecoderConfig.embed_dim=8",
    "--gin.DecoderConfig.num_layers=1",
    "--gin.CurriculumConfig.max_latent_stage=1",
    "--gin.CurriculumConfig.last_stage=1",
    "--gin.CurriculumConfig.steps_per_stage=2",
    "--gin.RunConfig.evaluation_batch_size=8",
]
QUESTION = "<eos> 0 4 | 4 5 | 5 6 | 1 7 | 7 8 | 8 9 | 0 2 | 8 2 | 1 3 | 5 3 | 7 10 | 4 11 | [Q] 6 9 [R] 0"


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir that `coconut train` made."""
    path = tmp_path_factory.mktemp("run")
    assert main(["train", *RUN, *TINY, "--workdir", str(path)]) == EXIT_DONE
    return path


def test_train_leaves_what_it_promises(workdir: Path) -> None:
    assert {"run.json", "metrics.jsonl", "operative.gin", "checkpoints"} <= {path.name for path in workdir.iterdir()}
    kinds = {json.loads(line)["kind"] for line in (workdir / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "compile", "stage", "validation"}


def test_another_run_in_the_same_workdir_says_what_differs(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *RUN, *TINY, "--gin.RunConfig.seed=5", "--workdir", str(workdir)]
    assert main(arguments) == EXIT_BAD_INPUT
    assert "seed: 0 there, 5 here" in capsys.readouterr().err


def test_evaluate_and_generate(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, answers = tmp_path / "result.json", tmp_path / "answers.jsonl"
    altered = ["removed", "intact", "mean", "permuted"]
    evaluating = ["evaluate", "--workdir", str(workdir), "--interventions"]
    assert main([*evaluating, ",".join(altered), "--output", str(output), "--answers", str(answers)]) == EXIT_DONE
    result = json.loads(output.read_text())
    assert result["trained"]["examples"] == 10 and set(result["thoughts"]) == {"0"}
    assert result["trained"]["passes"] == result["trained"]["tokens"] + 1 and result["seconds_per_question"] > 0
    # What was asked for twice is the same; the order of one thought cannot be another.
    found = result["interventions"]
    assert list(found) == altered and found["permuted"] is None
    plain = {name: entry.pop("choice") for name, entry in found.items() if entry}
    assert (found["removed"], found["intact"]) == (result["thoughts"]["0"], result["trained"])
    assert (plain["removed"], plain["intact"]) == (result["choices"]["0"], result["choices"]["1"])
    assert len(answers.read_text().splitlines()) == 50
    printed = capsys.readouterr().out
    assert "accuracy % (95 %)" in printed and "thoughts: mean, choosing between the two options" in printed
    assert main([*evaluating, "zeros"]) == EXIT_BAD_INPUT
    assert "unknown intervention: 'zeros'; did you mean 'zero'?" in capsys.readouterr().err
    assert main(["generate", "--workdir", str(workdir), "--question", QUESTION, "--force", "[A]"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert printed.startswith("thought 1: ") and "answer: [A]" in printed
    assert main(["generate", "--workdir", str(workdir), "--question", "0 1 | x"]) == EXIT_BAD_INPUT
    assert "'x'" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_draws_samples(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, answers, picture = tmp_path / "result.json", tmp_path / "answers.jsonl", tmp_path / "curves.png"
    files = ["--output", str(output), "--answers", str(answers), "--plot", str(picture)]
    asking = ["evaluate", "--workdir", str(workdir), "--samples", "3", "--batch_size", "8"]
    # At the run's own temperature nothing is drawn.
    assert main([*asking, *files]) == EXIT_BAD_INPUT
    assert "temperature = 0" in capsys.readouterr().err and not output.exists()
    how = ["--temperature", "1", "--top_k", "9", "--policy", "kind=gaussian", "--policy", "share=0.5"]
    assert main([*asking, *how, "--budgets", "0,1", *files]) == EXIT_DONE
    samples = json.loads(output.read_text())["samples"]
    assert samples["policy"]["options"] == {"share": 0.5} and samples["sampling"]["top_k"] == 9
    assert [budget["thoughts"] for budget in samples["budgets"]] == [0, 1]
    for thoughts, budget in enumerate(samples["budgets"]):
        assert budget["examples"] == 10 and budget["costs"]["thoughts"] == thoughts
        assert budget["costs"]["samples_at_once"] == 6 and budget["costs"]["seconds_per_question"] > 0
        assert [point["samples"] for point in budget["curves"]["majority"]] == [1, 2, 3]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    drawn = [line for line in lines if line["setting"] == "sample"]
    # Each of ten questions three times for each budget, beside the answer as trained and the one without thoughts.
    assert len(drawn) == 60 and len(lines) == 80
    right = sum(line["right"] for line in drawn if line["budget"] == 1) / 30
    assert samples["budgets"][1]["curves"]["pass_at"][0]["accuracy"] == pytest.approx(right)
    assert picture.exists()
    printed = capsys.readouterr().out
    assert "pass@n (an oracle's choice)" in printed and "samples, thoughts 1: one took" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"question": "a", "steps": ["b"], "answer": "c"}', ("line",)),
        ('[{"question": "a", "steps": "b", "answer": "c"}]', ("record", "steps")),
        ('[{"question": "a", "answer": "c"}]', ("record", "steps")),
        ("[]", ()),
    ],
)
def test_bad_data_is_one_message_before_any_work(
    content: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    workdir = tmp_path / "run"
    assert main(["train", *RUN, f"--gin.DataConfig.train={str(path)!r}", "--workdir", str(workdir)]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "bad.json" in message and all(word in message for word in words)
    assert not workdir.exists()


def test_questions_that_are_too_long_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *RUN, *TINY, "--gin.DecoderConfig.max_positions=30", "--dry_run"]
    assert main(arguments) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "40 of 40" in message and "max_positions = 30" in message and "the longest needs 51 positions" in message


def test_dry_run_prints_what_a_run_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *RUN, *TINY, "--dry_run"]) == EXIT_DONE
    printed = capsys.readouterr().out.replace("\n", " ")
    assert re.search(r"[\d,]+ parameters, [\d.]+ MiB", printed) and "stage 1: at most 2 steps" in printed


def test_data_generate_stats_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.json"
    arguments = ["data", "generate", "--count", "20", "--negatives", "depth_matched", "--output", str(path)]
    assert main(arguments) == EXIT_DONE
    assert main(["data", "stats", str(path)]) == EXIT_DONE
    assert main(["data", "show", str(path), "--count", "1"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "shortcut rule" in printed and "[0] " in printed
    assert main(["data", "generate", "--task", "prosqua", "--count", "1", "--output", str(path)]) == EXIT_BAD_INPUT
    assert "did you mean 'prosqa'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quickstart_runs_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one stage of thoughts; the notebook's test runs all three."""
    smoke = QuickstartConfig.smoke(seed=0)
    one_stage = ("CurriculumConfig.max_latent_stage = 1", "CurriculumConfig.last_stage = 1")
    small = dataclasses.replace(smoke, bindings=(*smoke.bindings, *one_stage))
    monkeypatch.setattr(QuickstartConfig, "smoke", lambda seed: dataclasses.replace(small, seed=seed))
    assert main(["quickstart", "--smoke", "--outdir", str(tmp_path)]) == EXIT_DONE
    assert "thoughts removed" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["provenance"]["commit"] and set(results["methods"]) == {"coconut", "no_cot"}
    for entry in results["methods"].values():
        assert entry["trained"]["examples"] == 48
    for name in ("learning_curves", "accuracy_by_thoughts", "beliefs"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_a_run_that_diverges_has_an_exit_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever starts interrupted runs again must not start this one."""
    absurd = ["--gin.OptimizerConfig.learning_rate=1e38", "--gin.OptimizerConfig.warmup_steps=0"]
    arguments = ["train", *RUN, *TINY, *absurd, "--gin.RunConfig.max_skipped_steps=1", "--workdir", str(tmp_path)]
    assert main(arguments) == EXIT_DIVERGED
    assert "had a gradient that is not finite" in capsys.readouterr().err
