"""A scorer that is trained on a toy chooses better than chance, among samples and in a beam search; and the refusals.

The model is one that has learnt nothing: noise in its thoughts decides what it writes. The task takes half of the
symbols for right.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coconut.commands.evaluate import EvaluateConfig, describe, evaluate_workdir, subject_of
from coconut.commands.evaluate_beams import load_scorer
from coconut.commands.evaluate_samples import SamplesConfig
from coconut.commands.flags import check_together, parse_arguments
from coconut.commands.train import run_training
from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.errors import CoconutError
from coconut.latent.generate import SamplingConfig
from coconut.latent.policies.config import PolicyConfig
from coconut.models.config import DecoderConfig
from coconut.pipeline import PipelineConfig
from coconut.tasks import TASKS, Task, save_examples
from coconut.tokenizers import symbol_tokenizer
from coconut.training.config import RunConfig
from coconut.training.loading import load_model
from coconut.training.optimizer import OptimizerConfig
from coconut.training.scoring import ScorerConfig
from coconut.types import Example
from tests.tiny_models import quick_compilation
from tests.training.trained_runs import QUIET, lines_of

GAUSSIAN = PolicyConfig(kind="gaussian", options={"share": 1.0})
COUNTS: dict[str, Any] = {"count": 8, "beams": 2, "candidates": 4, "policy": GAUSSIAN}
HALF = Task(
    name="half",
    extract_answer=lambda text: text.removeprefix("[A]").strip()[:1],
    normalize_answer=lambda answer: "right" if answer and answer in "abcd" else "wrong",
)
STAGE = CurriculumConfig(max_latent_stage=2, first_stage=2, last_stage=2, epochs_per_stage=None, steps_per_stage=60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a scorer of it, and questions that neither has seen."""
    folder, rng = tmp_path_factory.mktemp("runs"), random.Random(0)
    rows = list(dict.fromkeys(tuple(rng.choices("abcdefgh", k=5)) for _ in range(740)))
    examples = [Example(question=" ".join(row), steps=(row[0], row[1]), answer="a") for row in rows]
    for name, start, end in (("test", 0, 200), ("validation", 200, 240), ("train", 240, len(rows))):
        save_examples(folder / f"{name}.json", examples[start:end])
    with quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "half", HALF)
        train_both(folder)
        yield folder


def train_both(folder: Path) -> None:
    model = RunConfig(
        method="coconut",
        data=DataConfig(task="half", train=str(folder / "train.json"), tokenizer="symbols"),
        decoder=DecoderConfig(
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            mlp_dim=64,
            max_positions=24,
            embedding_stddev=0.5,
            kernel_stddev=0.3,
        ),
        curriculum=dataclasses.replace(STAGE, steps_per_stage=1),
        optimizer=OptimizerConfig(learning_rate=1e-9),
        pipeline=PipelineConfig(batch_size=16),
        sampling=SamplingConfig(max_new_tokens=2),
        save_every=None,
        log_every=20,
    )
    scorer = dataclasses.replace(
        model,
        data=dataclasses.replace(model.data, validation=str(folder / "validation.json")),
        init_from=str(folder / "model"),
        curriculum=STAGE,
        optimizer=OptimizerConfig(learning_rate=3e-3, b2=0.99, weight_decay=0.0, clip_norm=1.0),
        scorer=ScorerConfig(policy=GAUSSIAN, continuations=4, epochs=2),
    )
    for name, config in (("model", model), ("scorer", scorer)):
        run_training(config, folder / name, console=QUIET)


def evaluated(runs: Path, *, answers: Path | None = None, **settings: Any) -> dict[str, Any]:
    samples = SamplesConfig(**{"scorer": runs / "scorer", **COUNTS, **settings})
    config = EvaluateConfig(split=str(runs / "test.json"), thoughts=(), samples=samples, answers_file=answers)
    return evaluate_workdir(runs / "model", config, console=QUIET)


@pytest.mark.slow
def test_a_scorer_chooses_better_than_chance(runs: Path, tmp_path: Path) -> None:
    *_, last = lines_of(runs / "scorer", "train")
    assert last["accuracy"] > last["accuracy_of_one"] + 0.1
    *_, validation = lines_of(runs / "scorer", "validation")
    assert validation["accuracy_of_one"] < validation["accuracy"] <= validation["accuracy_of_any"]

    result = evaluated(runs, answers=tmp_path / "answers.jsonl")
    curves, beams = result["samples"]["budgets"][0]["curves"], result["beams"]
    by_number = {point["samples"]: point["accuracy"] for point in curves["scorer"]}
    one, best, oracle = by_number[1], by_number[8], curves["pass_at"][-1]["accuracy"]
    assert one == curves["pass_at"][0]["accuracy"]
    assert one + 0.05 < best < oracle
    assert one + 0.05 < beams["accuracy"] < beams["any_beam"]
    # One pass for the question, two for each of two thoughts, and those of the answer's tokens.
    assert 5 < beams["passes"] <= 7
    assert beams["best_of_samples"]["accuracy"] == best and beams["examples"] == 200
    assert beams["candidates_at_once"] == 64 and beams["seconds_per_question"] > 0
    assert curves["scorer"][-1]["passes"] == curves["majority"][-1]["passes"] + 1
    table = describe(result)
    assert "best by scorer" in table and "2 beams of 4 candidates" in table and "best of 8 samples" in table

    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    of_beams = [line for line in lines if line["setting"] == "beam"]
    assert len(of_beams) == 400
    for first, second in zip(of_beams[::2], of_beams[1::2], strict=True):
        assert first["question"] == second["question"] and first["score"] >= second["score"]
    assert sum(line["right"] for line in of_beams[::2]) == pytest.approx(200 * beams["accuracy"])


@pytest.mark.slow
def test_scorers_that_do_not_fit_are_refused(runs: Path) -> None:
    subject = subject_of(*load_model(runs / "model", "latest"))
    with pytest.raises(CoconutError, match=r"this run trained no scorer"):
        load_scorer(runs / "model", subject)
    load_scorer(runs / "scorer", subject)
    for change, message in (
        (
            {"task": dataclasses.replace(subject.task, name="other")},
            "its task is .half., and that of the model that is asked",
        ),
        ({"method": dataclasses.replace(subject.method, name="other")}, "its method is 'coconut'"),
        ({"tokenizer": symbol_tokenizer(["a"])}, "its tokenizer is another one"),
    ):
        with pytest.raises(CoconutError, match=message):
            load_scorer(runs / "scorer", dataclasses.replace(subject, **change))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": None}, "--beams 2: beams are chosen by a scorer, give one: --scorer RUN"),
        ({"scorer": None, "beams": None}, "--candidates 4: beams are chosen by a scorer"),
        ({"candidates": None}, "--beams 2: needs --candidates"),
        ({"beams": None}, "--candidates 4: needs --beams"),
        ({"beams": 0}, "--beams 0: must be at least 1"),
        ({"candidates": -1}, "--candidates -1: must be at least 1"),
        ({"budgets": (1,)}, r"--budgets \(1,\): a scorer knows the number of thoughts it was trained on"),
        ({"policy": PolicyConfig()}, "--scorer: PolicyConfig.kind = 'deterministic' draws no thoughts"),
        ({"policy": PolicyConfig(kind="dropout")}, "PolicyConfig.kind = 'dropout' draws no thoughts"),
        ({"policy": dataclasses.replace(GAUSSIAN, learnt_stop=True)}, "learnt_stop = True: sums of scores"),
    ],
)
def test_searches_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        SamplesConfig(**{"scorer": Path("scorer"), **COUNTS, **settings})


def test_flags() -> None:
    arguments = ["evaluate", "--workdir", "run", "--scorer", "scorer", "--beams", "2", "--candidates", "4"]
    with pytest.raises(CoconutError, match="--scorer: says how samples are drawn or measured, it needs --samples"):
        check_together(parse_arguments(arguments))
    options = parse_arguments([*arguments, "--samples", "9"])
    check_together(options)
    assert (options.scorer, options.beams, options.candidates) == (Path("scorer"), 2, 4)
    # As many samples as there are candidates are measured, where so many are drawn.
    assert SamplesConfig(scorer=Path("scorer"), **{**COUNTS, "count": 9}).sizes == [1, 2, 4, 8, 9]
    assert SamplesConfig(scorer=Path("scorer"), **{**COUNTS, "count": 9, "beams": 3, "candidates": 2}).sizes == [
        *(1, 2, 4, 6, 8, 9)
    ]
    pretrained = ["evaluate", "--pretrained", "there", "--task", "gsm8k", "--data", "x", "--samples", "2"]
    with pytest.raises(CoconutError, match="--scorer: belongs to --workdir"):
        check_together(parse_arguments([*pretrained, "--scorer", "scorer"]))
