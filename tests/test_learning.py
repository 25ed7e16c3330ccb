"""From end to end: a tiny model learns a tiny task through a thought, measured by generation on new questions."""

import io
import random
from pathlib import Path

from rich.console import Console

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig, load_dataset
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.evaluate import evaluate
from coconut.latent.generate import SamplingConfig
from coconut.methods import get_method
from coconut.models.config import DecoderConfig
from coconut.pipeline import PipelineConfig
from coconut.tasks import save_examples
from coconut.training.config import RunConfig
from coconut.training.loop import train
from coconut.training.optimizer import OptimizerConfig
from coconut.types import Example
from tests.tiny_models import quick_compilation

SYMBOLS = tuple("abcdefgh")


def questions(count: int) -> list[Example]:
    """Five symbols; the first is the written step and the fourth the answer: one guess in eight is right."""
    rng = random.Random(0)
    drawn = dict.fromkeys(tuple(rng.choices(SYMBOLS, k=5)) for _ in range(2 * count))
    return [Example(question=" ".join(row), steps=(row[0],), answer=row[3]) for row in list(drawn)[:count]]


def test_coconut_learns_through_its_curriculum(tmp_path: Path) -> None:
    save_examples(tmp_path / "train.json", questions(2200)[:2000])
    save_examples(tmp_path / "test.json", questions(2200)[2000:])
    config = RunConfig(
        method="coconut",
        data=DataConfig(
            task="small_graphs",  # For its reader and its judge.
            train=str(tmp_path / "train.json"),
            test=str(tmp_path / "test.json"),
            tokenizer="symbols",
        ),
        decoder=DecoderConfig(
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            mlp_dim=64,
            max_positions=16,
            embedding_stddev=0.5,
            kernel_stddev=0.2,
        ),
        curriculum=CurriculumConfig(max_latent_stage=1, last_stage=1, epochs_per_stage=None, steps_per_stage=150),
        optimizer=OptimizerConfig(learning_rate=1e-2, b2=0.99, clip_norm=1.0, warmup_steps=20, decay="linear"),
        pipeline=PipelineConfig(batch_size=64),
        save_every=None,
    )
    with quick_compilation():
        result = train(config, tmp_path / "run", console=Console(file=io.StringIO()))
        assert result.progress.finished
        dataset = load_dataset(config.data)
        assert len(dataset.splits["test"]) == 200
        evaluation = evaluate(
            result.model,
            result.run.tokenizer,
            get_method("coconut"),
            result.run.placing(result.progress.stage),
            dataset.task,
            dataset.splits["test"],
            dataset.tokenized("test", result.run.tokenizer),
            AnswerConfig(batch_size=64, sampling=SamplingConfig(max_new_tokens=4)),
        )
    assert evaluation.accuracy >= 0.95
    # A thought, `[A]` and the symbol; the step is no longer written.
    assert (evaluation.thoughts, evaluation.tokens) == (1, 3)
