"""A model of Hugging Face's layout that was never trained here answers questions, in words or thinking softly."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coconut.commands.evaluate_pretrained import PretrainedConfig, encode_prompt
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.errors import CoconutError
from coconut.models.huggingface import save_pretrained
from coconut.models.huggingface.configuration import EXPORT_FIELD
from coconut.provenance import provenance
from coconut.tasks import get_task, save_examples
from coconut.tokenizers import TEXT, Tokenizer, byte_pair_tokenizer, encode_example, huggingface_files
from tests.tiny_models import LLAMA_STYLE, quick_compilation, random_decoder

EXAMPLES = get_task("small_graphs").generate(3, 0, config="e8")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_pair_tokenizer(TEXT.texts(EXAMPLES), 270)


@pytest.fixture(scope="module")
def arguments(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What asks a random model of one layer three questions."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = dataclasses.replace(LLAMA_STYLE, num_layers=1, vocab_size=tokenizer.vocab_size, max_positions=256)
    fields = {"eos_token_id": tokenizer.eos_id}
    files = huggingface_files(tokenizer)
    save_pretrained(random_decoder(config, seed=1), folder / "model", config_fields=fields, files=files)
    save_examples(folder / "questions.json", EXAMPLES)
    asked = {"pretrained": folder / "model", "task": "small_graphs", "data": folder / "questions.json"}
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    return ["evaluate", *words, "--batch_size", "2", "--max_new_tokens", "8"]


def evaluated(arguments: list[str], folder: Path, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    output, answers = folder / "result.json", folder / "answers.jsonl"
    assert main([*arguments, "--output", str(output), "--answers", str(answers), *more]) == EXIT_DONE
    return json.loads(output.read_text()), [json.loads(line) for line in answers.read_text().splitlines()]


def test_soft_thinking_with_one_token_is_the_written_chain(arguments: list[str], tmp_path: Path) -> None:
    plain, written = evaluated(arguments, tmp_path)
    settings = ("top_k=1", "most=3", "cold_entropy=None")
    flags = [word for setting in settings for word in ("--thinking", setting)]
    soft, thought = evaluated(arguments, tmp_path, "--method", "soft_thinking", *flags)
    assert [len(written), len(thought)] == [3, 3] and plain["soft_thinking"] is None
    assert (plain["method"], plain["trained"]["thoughts"], plain["trained"]["examples"]) == ("cot", 0, 3)
    assert (soft["soft_thinking"]["top_k"], soft["trained"]["thoughts"]) == (1, 3)
    for ours, theirs in zip(thought, written, strict=True):
        chain = ours["soft_text"] + ours["text"]
        assert len(theirs["text"]) > 3 and chain.startswith(theirs["text"])
    assert soft["provenance"] == provenance() and soft["config"]["data"].endswith("questions.json")
    assert soft["config"]["decoder"]["num_layers"] == 1 and soft["config"]["answers"]["soft_thinking"]["most"] == 3


@pytest.mark.slow
def test_no_cot_goes_on_from_the_mark_of_an_answer(arguments: list[str], tmp_path: Path) -> None:
    result, answers = evaluated(arguments, tmp_path, "--method", "no_cot", "--limit", "2")
    assert result["method"] == "no_cot" and len(answers) == 2
    assert all(answer["text"].startswith("### ") for answer in answers)


@pytest.mark.slow
def test_swi_reasoning_answers_by_turns(arguments: list[str], tmp_path: Path) -> None:
    flags = [word for setting in ("window=1", "start=", "end=") for word in ("--thinking", setting)]
    result, answers = evaluated(arguments, tmp_path, "--method", "swi_reasoning", *flags)
    assert result["soft_thinking"]["kind"] == "SwiReasoningConfig" and result["soft_thinking"]["window"] == 1
    assert 0 < result["trained"]["thoughts"] < result["trained"]["tokens"] <= 8
    # Thoughts and tokens share one limit.
    assert all(answer["soft_text"] and answer["thoughts"] <= 8 for answer in answers)


def test_special_tokens_are_themselves_in_a_prompt_and_text_in_a_question(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token
    example = EXAMPLES[0].__class__(question=f"{eos} {{question}}", steps=(), answer="1")
    ids = encode_prompt(tokenizer, example, f"a{eos}b {{question}}?{eos}").question.tolist()
    question = tokenizer.encode(example.question)
    expected = [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b "), *question]
    assert ids == [*expected, *tokenizer.encode("?"), tokenizer.eos_id]
    assert tokenizer.eos_id not in question
    alone = encode_prompt(tokenizer, example, None).question
    np.testing.assert_array_equal(alone, encode_example(tokenizer, example, TEXT).question)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompt": "What?"}, r"prompt = 'What\?': must have \{question\} in it once"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"method": "coconut"}, r"method = 'coconut': must be typing\.Literal"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        PretrainedConfig(**{"folder": "f", "task": "prosqa", "data": "d", **fields})


def test_an_export_that_thinks_is_not_asked_without_its_thoughts(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(arguments[arguments.index("--pretrained") + 1])
    folder = shutil.copytree(model, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    for fields, code in (
        ({"method": "coconut", "behind_question": []}, EXIT_DONE),
        ({"method": "coconut", "behind_question": [5, 7]}, EXIT_BAD_INPUT),
        # As exports were before they said what stands behind a question.
        ({"method": "cot"}, EXIT_DONE),
        ({"method": "coconut"}, EXIT_BAD_INPUT),
    ):
        (folder / "config.json").write_text(json.dumps({**config, EXPORT_FIELD: fields}))
        assert main([str(folder) if word == str(model) else word for word in arguments]) == code
    assert "it is the export of a run of 'coconut', whose thoughts" in capsys.readouterr().err


def test_an_unknown_setting_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--method", "soft_thinking", "--thinking", "top=1"]) == EXIT_BAD_INPUT
    assert "--thinking: SoftThinkingConfig has no field 'top'" in capsys.readouterr().err
