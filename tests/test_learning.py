"""From end to end: a tiny model learns a tiny task through a thought, measured by generation on new questions."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig, load_dataset
from coconut.evaluation.answers import Answer, AnswerConfig
from coconut.evaluation.evaluate import Evaluation, evaluate
from coconut.latent.feedback import FeedbackConfig
from coconut.latent.generate import SamplingConfig
from coconut.methods import get_method
from coconut.methods.colar import ColarOptions
from coconut.models.config import DecoderConfig
from coconut.pipeline import PipelineConfig
from coconut.tasks import save_examples
from coconut.training.config import RunConfig
from coconut.training.loop import TrainResult, train
from coconut.training.optimizer import OptimizerConfig
from coconut.types import Example
from tests.tiny_models import quick_compilation

SYMBOLS = tuple("abcdefgh")


def questions(count: int, steps: tuple[int, ...] = (0,)) -> list[Example]:
    """Five symbols; some of them are the written steps and the fourth the answer: one guess in eight is right."""
    rng = random.Random(0)
    drawn = dict.fromkeys(tuple(rng.choices(SYMBOLS, k=5)) for _ in range(2 * count))
    rows = list(drawn)[:count]
    return [Example(question=" ".join(row), steps=tuple(row[i] for i in steps), answer=row[3]) for row in rows]


def learnt(
    folder: Path,
    examples: list[Example],
    method: str,
    stages: int,
    last_stage: int | None = None,
    feedback: str = "identity",
    options: Any = None,
) -> tuple[TrainResult, Evaluation, list[Answer]]:
    """A run on all but the last 200 examples, and what it answers to these."""
    save_examples(folder / "train.json", examples[:-200])
    save_examples(folder / "test.json", examples[-200:])
    config = RunConfig(
        method=method,
        data=DataConfig(
            task="small_graphs",  # For its reader and its judge.
            train=str(folder / "train.json"),
            test=str(folder / "test.json"),
            tokenizer="symbols",
        ),
        decoder=DecoderConfig(
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            mlp_dim=64,
            max_positions=24,
            embedding_stddev=0.5,
            kernel_stddev=0.2,
        ),
        curriculum=CurriculumConfig(
            max_latent_stage=stages,
            last_stage=stages if last_stage is None else last_stage,
            epochs_per_stage=None,
            steps_per_stage=150,
        ),
        feedback=FeedbackConfig(kind=feedback),
        options=options,
        optimizer=OptimizerConfig(learning_rate=1e-2, b2=0.99, clip_norm=1.0, warmup_steps=20, decay="linear"),
        pipeline=PipelineConfig(batch_size=64),
        save_every=None,
    )
    answers: list[Answer] = []
    with quick_compilation():
        result = train(config, folder / "run", console=Console(file=io.StringIO()))
        assert result.progress.finished
        dataset = load_dataset(config.data)
        evaluation = evaluate(
            result.model,
            result.run.tokenizer,
            get_method(method),
            result.run.placing(result.progress.stage),
            dataset.task,
            dataset.splits["test"],
            dataset.tokenized("test", result.run.tokenizer),
            AnswerConfig(batch_size=64, sampling=SamplingConfig(max_new_tokens=6)),
            record=lambda answer, right: answers.append(answer),
        )
    assert len(answers) == 200
    return result, evaluation, answers


@pytest.mark.slow
def test_coconut_learns_through_its_curriculum(tmp_path: Path) -> None:
    _, evaluation, _ = learnt(tmp_path, questions(2200), "coconut", stages=1)
    assert evaluation.accuracy >= 0.95
    # A thought, `[A]` and the symbol; the step is no longer written.
    assert (evaluation.thoughts, evaluation.tokens) == (1, 3)


@pytest.mark.slow
def test_interleaved_learns_and_begins_to_think_again_by_itself(tmp_path: Path) -> None:
    examples = questions(2200, steps=(0, 2, 1))
    _, evaluation, answers = learnt(tmp_path, examples, "interleaved", stages=2)
    assert evaluation.accuracy >= 0.95
    # It was given the first block. The second step it writes, and then it opens a block itself.
    expected = [(1, example.steps[1], 1, f"[A] {example.answer}") for example in examples[-200:]]
    assert np.mean([answer.turns == turns for answer, turns in zip(answers, expected, strict=True)]) >= 0.95
    assert evaluation.cut == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "feedback", "last_stage"),
    [
        ("codi", "projection", 0),
        ("simcot", "identity", 2),
        ("pccot", "identity", 0),
        ("kava", "projection", 0),
        ("colar", "gaussian", 0),
        ("ponder", "identity", 0),
    ],
)
def test_each_method_learns(method: str, feedback: str, last_stage: int, tmp_path: Path) -> None:
    options = ColarOptions(most_thoughts=4) if method == "colar" else None
    _, evaluation, _ = learnt(tmp_path, questions(2200, (0, 1)), method, 2, last_stage, feedback, options)
    assert evaluation.accuracy >= 0.95
    # The methods whose model ends its thoughts itself have as many as they like.
    assert evaluation.thoughts == 2 or (method in ("colar", "ponder") and evaluation.thoughts >= 1)
    assert evaluation.cut == 0
