"""Whether questions have thoughts is read from their pages, also where each has as many as its own steps."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from coconut.commands.evaluate import EvaluateConfig, describe, evaluate_model
from coconut.commands.generate import answer_question
from coconut.datasets import load_dataset
from coconut.errors import CoconutError
from coconut.tasks import get_task, save_examples
from coconut.tokenizers import symbol_tokenizer
from coconut.training.progress import Progress
from coconut.training.run import Run
from coconut.training.state import Model, make_model
from coconut.types import Example
from tests.tiny_models import quick_compilation
from tests.tiny_runs import tiny_run


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


EXAMPLES = get_task("small_graphs").generate(3, 0, config="e8")
SYMBOLS = sorted({symbol for example in EXAMPLES for symbol in f"{example.question} [A]".split()})


def untrained(method: str = "coconut", **curriculum: Any) -> tuple[Run, Model]:
    """A run whose final stage gives every question as many thoughts as it has steps, three at most."""
    settings = {"max_latent_stage": 3, "last_stage": None, "pad_latent_to_max": False, **curriculum}
    tokenizer = symbol_tokenizer(SYMBOLS)
    config = tiny_run(method=method, curriculum=settings, decoder={"vocab_size": tokenizer.vocab_size})
    return Run(config, tokenizer, ""), make_model(config.decoder, jax.random.key(0))


def evaluated(folder: Path, examples: list[Example], method: str = "coconut", **settings: Any) -> dict[str, Any]:
    save_examples(folder / "questions.json", examples)
    run, model = untrained(method)
    progress = Progress(stage=run.config.curriculum.final_stage)
    # These are questions that a run of this config is trained on.
    config = EvaluateConfig(split=str(folder / "questions.json"), allow_overlap=True, **settings)
    return evaluate_model(run, model, progress, config)


def test_questions_that_were_trained_on_are_refused_or_counted(tmp_path: Path) -> None:
    """Copying train.json over test.json is easily done."""
    run, model = untrained("cot")
    training = load_dataset(run.config.data).splits["train"][:2]
    other = dataclasses.replace(training[0], question=training[0].question.replace(" 2 ", " 3 ", 1) + " [R] 0")
    save_examples(tmp_path / "test.json", [*training, other])
    config = EvaluateConfig(split=str(tmp_path / "test.json"), thoughts=())
    with pytest.raises(CoconutError, match=r"test\.json: 2 of 3 questions are among those that the run was trained on"):
        evaluate_model(run, model, Progress(), config)
    save_examples(tmp_path / "test.json", training)
    result = evaluate_model(run, model, Progress(), dataclasses.replace(config, allow_overlap=True))
    assert result["also_trained_on"] == 2
    assert "2 of these questions were trained on" in describe(result)
    # The run's own splits have to be those it began with.
    changed = dataclasses.replace(run, splits={"validation": "0" * 64})
    with pytest.raises(CoconutError, match="these are not the validation questions that the run began with"):
        evaluate_model(changed, model, Progress(), EvaluateConfig(split="validation"))


@pytest.mark.slow
def test_controls_do_not_vanish_where_thoughts_depend_on_the_steps(tmp_path: Path) -> None:
    result = evaluated(tmp_path, EXAMPLES, thoughts=(0, 1))
    assert {len(example.steps) for example in EXAMPLES} == {3}
    assert result["trained"]["thoughts"] == 3
    assert list(result["thoughts"]) == ["0", "1"] and list(result["choices"]) == ["0", "1", "3"]
    assert [result["thoughts"][count]["thoughts"] for count in "01"] == [0, 1]
    # Questions that differ in it have no one number.
    first, *others = EXAMPLES
    shorter = Example(question=first.question, steps=first.steps[:1], answer=first.answer, graph=first.graph)
    result = evaluated(tmp_path, [shorter, *others], thoughts=(0,))
    assert result["trained"]["thoughts"] == pytest.approx(7 / 3)
    assert list(result["thoughts"]) == ["0"] and list(result["choices"]) == ["0", "trained"]
    assert "as trained, choosing between the two options" in describe(result)


@pytest.mark.slow
def test_a_question_whose_steps_nobody_knows_has_the_thoughts_of_a_long_one() -> None:
    run, model = untrained()
    for stage, thoughts in ((0, 0), (2, 2), (4, 3)):
        reply = answer_question(run, model, Progress(stage=stage), EXAMPLES[0].question)
        assert (reply.answer.thoughts, len(reply.thoughts)) == (thoughts, thoughts)
    reply = answer_question(run, model, Progress(stage=4), EXAMPLES[0].question, thoughts=1)
    assert len(reply.thoughts) == 1


def test_thoughts_asked_of_a_method_that_gives_none_are_an_error(tmp_path: Path) -> None:
    run, model = untrained("cot")
    with pytest.raises(CoconutError, match="2 thoughts: the method writes this question without a block of thoughts"):
        answer_question(run, model, Progress(stage=0), EXAMPLES[0].question, thoughts=2)
    # An evaluation has no such control to show.
    result = evaluated(tmp_path, EXAMPLES[:1], "cot", thoughts=(0, 2))
    assert (result["thoughts"], result["choices"]) == ({}, {})
    # It says so, where thoughts were asked for; without thoughts it is what it was trained to be.
    assert result["not_repeated"] == [2]
    assert describe(result).endswith("not repeated with 2 thoughts: at stage 4 this model thinks none")
    result["trained"]["cut"] = 0.125
    assert "12.5 % of answers (as trained) ended where thoughts began with no room left" in describe(result)
