"""Whether questions have thoughts is read from their pages, also where each has as many as its own steps."""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from coconut.commands.evaluate import (
    EvaluateConfig,
    at_threshold,
    describe,
    evaluate_model,
    questions_of,
    subject_of,
)
from coconut.commands.flags import check_together, parse_arguments
from coconut.commands.generate import answer_question, read_questions
from coconut.commands.measuring import Measuring
from coconut.datasets import DataConfig, load_dataset, make_tokenizer
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.soft_thinking import SoftThinkingConfig
from coconut.tasks import get_task, save_examples
from coconut.tokenizers import symbol_tokenizer
from coconut.training.config import to_json
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
    for thoughts in ((2,), (0, 2)):
        with pytest.raises(
            CoconutError, match="2 thoughts: the method writes this question without a block of thought"
        ):
            evaluated(tmp_path, EXAMPLES[:1], "cot", thoughts=thoughts)
    soft = SoftThinkingConfig(most=2, cold_entropy=None)
    with pytest.raises(CoconutError, match=r"AnswerConfig\.thoughts = 2: soft_thinking says itself"):
        evaluated(tmp_path, EXAMPLES[:1], thoughts=(2,), soft_thinking=soft)
    with pytest.raises(CoconutError, match="--halting stop='count': at stage 4 this model thinks none"):
        evaluated(tmp_path, EXAMPLES[:1], "cot", halting=HaltingConfig())
    # Without thoughts it is what it was trained to be: there is no such control to show.
    result = evaluated(tmp_path, EXAMPLES[:1], "cot", thoughts=(0,))
    assert (result["thoughts"], result["choices"]) == ({}, {})
    result["trained"]["cut"] = 0.125
    assert "12.5 % of answers (as trained) ended where thoughts began with no room left" in describe(result)


def test_a_forced_text_is_forced_behind_any_number_of_thoughts() -> None:
    run, model = untrained()
    subject = subject_of(run, model, Progress(stage=4))
    tokenized = [subject.tokenize(example) for example in EXAMPLES]
    for forced, expected in (("", "[A]"), ("[A] 3", "[A] 3")):
        measuring = Measuring(subject, EXAMPLES, tokenized, AnswerConfig(forced=forced))
        assert measuring.without(2) == AnswerConfig(thoughts=2, forced=expected)


@pytest.mark.parametrize("field", ["batch_size", "limit"])
@pytest.mark.parametrize("value", [0, -1])
def test_there_is_no_batch_of_none_and_no_evaluation_of_no_question(field: str, value: int) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(CoconutError, match=f"--{field} {value}: must be at least 1"):
        EvaluateConfig(**settings)


def test_a_misspelled_split_names_those_of_the_run() -> None:
    with pytest.raises(CoconutError, match=r"--split tset: no such file, and the run's own splits are validation$"):
        questions_of(untrained()[0], "tset")


def test_a_question_in_words_is_shown_one_in_symbols() -> None:
    run, model = untrained()
    with pytest.raises(CoconutError, match=r"unknown symbol 'Is'.* A question of this run: '<eos> .* \| .* \[R\] \d'"):
        answer_question(run, model, Progress(), "Is Bob a cat?")


def test_a_run_answers_a_test_set_of_another_task(tmp_path: Path) -> None:
    """The test set has no steps, so that nobody knows how many thoughts would stand in their place."""
    train = [
        {"question": f"Ann has {n} and 1. How many?", "cot": f"<<{n}+1={n + 1}>>", "answer": "2"} for n in range(3)
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    asked = {"Body": "Bob has 7 and 2.", "Question": "How many?", "Answer": 9.0}
    (tmp_path / "svamp.json").write_text(json.dumps([asked, {**asked, "Answer": 1.0}]))
    data = DataConfig(task="gsm8k", train=str(tmp_path / "train.json"))
    tokenizer = make_tokenizer(data, load_dataset(data).splits["train"])
    settings = {"max_latent_stage": 3, "last_stage": None, "pad_latent_to_max": False}
    decoder = {"vocab_size": tokenizer.vocab_size}
    config = dataclasses.replace(tiny_run(curriculum=settings, decoder=decoder), data=data)
    run, model = Run(config, tokenizer, ""), make_model(config.decoder, jax.random.key(0))
    split = str(tmp_path / "svamp.json")
    asking = EvaluateConfig(split=split, task="svamp", forced="### 9.00", thoughts=())
    result = evaluate_model(run, model, Progress(stage=4), asking)
    assert (result["task"], result["also_trained_on"], len(result["data_fingerprint"])) == ("svamp", 0, 64)
    assert (result["trained"]["thoughts"], result["trained"]["examples"]) == (3, 2)
    assert f"questions: {split} (task svamp)" in describe(result)
    with pytest.raises(CoconutError, match=r"svamp\.json: record 0: field 'question' is missing"):
        evaluate_model(run, model, Progress(stage=4), dataclasses.replace(asking, task=None))
    with pytest.raises(CoconutError, match="--task svamp: the run's own test questions are of its own task"):
        EvaluateConfig(task="svamp")


def test_questions_come_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n two\n"))
    assert list(read_questions()) == ["one", "two"]
    for nothing in ("", "\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(nothing))
        with pytest.raises(CoconutError, match="--question is missing, and standard input holds none"):
            read_questions()


@pytest.mark.slow
def test_a_curve_of_accuracy_by_mean_thoughts(tmp_path: Path) -> None:
    halting = HaltingConfig(stop="count", most=3, room=3)
    result = evaluated(tmp_path, EXAMPLES, thoughts=(), halting=halting, halting_thresholds=(1, 4))
    assert result["trained"]["thoughts"] == 3
    assert [(point["threshold"], point["thoughts"]) for point in result["halting"]["curve"]] == [(1, 1), (4, 4)]
    assert result["halting"]["config"] == to_json(halting)
    text = describe(result)
    assert "coconut, as trained (stage 4), stop count" in text and "halting threshold 4" in text


@pytest.mark.slow
def test_a_run_that_writes_its_steps_thinks_softly(tmp_path: Path) -> None:
    soft = SoftThinkingConfig(most=2, cold_entropy=None, noise="gumbel")
    result = evaluated(tmp_path, EXAMPLES, "cot", soft_thinking=soft, seed=3)
    assert result["trained"]["thoughts"] == 2 and result["soft_thinking"]["most"] == 2
    assert "cot, as trained (stage 4), SoftThinking" in describe(result)


@pytest.mark.parametrize("threshold, expected", [(2, (1, 2, 3)), (5, (1, 5, 5))])
def test_a_threshold_of_a_count_is_a_number_of_thoughts(threshold: float, expected: tuple[int, int, int]) -> None:
    seen = at_threshold(HaltingConfig(stop="count", most=3, room=3), threshold)
    assert (seen.least, seen.most, seen.room) == expected
    with pytest.raises(CoconutError, match=r"1\.5: stop = 'count' needs whole numbers"):
        at_threshold(seen, 1.5)
    assert at_threshold(HaltingConfig(stop="entropy", threshold=1.0), 0.5).threshold == 0.5


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give --workdir, of a run, or --pretrained"),
        ("--workdir w --pretrained p", "give --workdir, of a run, or --pretrained"),
        ("--workdir w --task svamp", "--task svamp: the run's own questions are of its own task; --data names others"),
        ("--workdir w --prompt p", "--prompt: a run has its own"),
        ("--workdir w --data d --split test", "--data d: --split test names questions, too"),
        ("--workdir w --method cot", "--method cot: a run has its own method"),
        ("--pretrained p --task prosqa", "--data is missing"),
        ("--pretrained p --task prosqa --data d --thoughts 2", "--thoughts: belongs to --workdir"),
        ("--workdir w --thinking top_k=1", "--thinking: these are settings of --method soft_thinking"),
        ("--workdir w --method soft_thinking --halting_thresholds 0.5", "--method soft_thinking says itself"),
        ("--workdir w --plot x.png", "--plot draws a curve"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        check_together(parse_arguments(["evaluate", *flags.split()]))


def test_thresholds_are_numbers_with_commas(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_arguments(["evaluate", "--workdir", "w", "--halting_thresholds", "0.3,0.5"])
    assert options.halting_thresholds == (0.3, 0.5)
    with pytest.raises(SystemExit):
        parse_arguments(["evaluate", "--workdir", "w", "--halting_thresholds", "0.3;0.5"])
    assert "must be numbers with commas between them" in capsys.readouterr().err
