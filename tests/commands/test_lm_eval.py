"""EleutherAI's harness asks a run and a published model; where it has a model of the same folder, both say the same."""

import dataclasses
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra lm-eval, or test)")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from coconut.commands import harness
from coconut.commands.generate import answer_question
from coconut.commands.harness import CoconutLM, cut, read_settings
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.errors import CoconutError
from coconut.evaluation.likelihood import log_likelihoods
from coconut.latent.generate import SamplingConfig
from coconut.methods import get_method
from coconut.models.huggingface import save_pretrained
from coconut.tasks import get_task
from coconut.tokenizers import SYMBOLS, TEXT, byte_pair_tokenizer, huggingface_files, symbol_tokenizer
from tests.tiny_models import LLAMA_STYLE, quick_compilation, random_decoder
from tests.tiny_runs import untrained_run

EXAMPLES = get_task("small_graphs").generate(3, 0, config="e8")
MADE = untrained_run(
    symbol_tokenizer(sorted({symbol for text in SYMBOLS.texts(EXAMPLES) for symbol in text.split()})),
    sampling={"max_new_tokens": 5},
)
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {folder}/questions.jsonl, cache_dir: {folder}/cache}}
test_split: train
doc_to_text: "{{{{question}}}}"
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
{rest}
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks over the same three questions, and what they need."""
    folder = tmp_path_factory.mktemp("asks")
    lines = [{"question": e.question, "answer": e.answer, "options": ["[A] 1", "[A] 2 3"]} for e in EXAMPLES]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks").mkdir()
    writes = (
        'task: writes\noutput_type: generate_until\ndoc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["[A]"]}'
    )
    chooses = 'task: chooses\noutput_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: "{{options}}"'
    for name, metric, rest in (("writes", "exact_match", writes), ("chooses", "acc", chooses)):
        (folder / f"tasks/{name}.yaml").write_text(TASK.format(folder=folder, metric=metric, rest=rest))
    return folder


def asked(asks: Path, tasks: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    output, samples = asks / "result.json", asks / "samples.jsonl"
    words = ["lm-eval", "--workdir", "a workdir", "--include_path", str(asks / "tasks"), "--tasks", tasks]
    assert main([*words, "--output", str(output), "--samples", str(samples), *more]) == EXIT_DONE
    return json.loads(output.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("thoughts", [None, 0])
def test_a_run_answers_tasks_as_generate_does(
    thoughts: int | None, asks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "load_model", lambda *_, **__: MADE)
    flags = ["--batch_size", "2"] if thoughts is None else ["--batch_size", "2", "--thoughts", str(thoughts)]
    result, samples = asked(asks, "writes,chooses", *flags)
    run, model, progress = MADE
    own = [answer_question(*MADE, example.question, thoughts=thoughts).answer.text for example in EXAMPLES]
    written = [sample["resps"][0][0] for sample in samples if sample["task"] == "writes"]
    assert written == [text.partition("[A]")[0] for text in own] and all(written)
    encode = lambda texts: [np.asarray(run.tokenizer.encode(text), np.int32) for text in texts]
    # Four thoughts, or none, and markers between question and option either way.
    contexts, options = zip(*[(e.question, o) for e in EXAMPLES for o in ("[A] 1", "[A] 2 3")], strict=True)
    whom = (model, run.tokenizer, get_method("coconut"), run.placing(progress.stage))
    scores, greedy = log_likelihoods(*whom, encode(contexts), encode(options), thoughts=thoughts)
    theirs = [resp[0] for sample in samples if sample["task"] == "chooses" for resp in sample["resps"]]
    np.testing.assert_allclose([score for score, _ in theirs], scores, rtol=1e-5)
    assert [own for _, own in theirs] == greedy.tolist()
    accuracy = np.mean(scores[::2] > scores[1::2])
    assert result["results"]["chooses"]["acc,none"] == pytest.approx(accuracy)
    assert result["n-samples"]["writes"] == {"original": 3, "effective": 3} and result["truncated"] == 0
    assert (result["config"]["method"], result["config"]["thoughts"]) == ("coconut", thoughts)
    assert "|chooses" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model: random, of one layer, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("published") / "model"
    tokenizer = byte_pair_tokenizer(TEXT.texts(EXAMPLES), 270)
    config = dataclasses.replace(LLAMA_STYLE, num_layers=1, vocab_size=tokenizer.vocab_size, max_positions=64)
    # With no bias it is a Llama: for a Qwen `transformers` takes Qwen's own tokenizer.
    config = dataclasses.replace(config, qkv_bias=False)
    fields, files = {"eos_token_id": tokenizer.eos_id}, huggingface_files(tokenizer)
    save_pretrained(random_decoder(config, seed=1), folder, config_fields=fields, files=files)
    return folder


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=own, idx=index) for index, own in enumerate(arguments)]


@pytest.mark.slow
def test_a_published_model_is_what_their_own_says_it_is(folder: Path) -> None:
    pytest.importorskip("torch")
    ours = get_model("coconut").create_from_arg_string(f"pretrained={folder}", {"batch_size": 2})
    assert isinstance(ours, CoconutLM)
    theirs = get_model("hf").create_from_arg_obj({"pretrained": str(folder)}, {"batch_size": 2, "device": "cpu"})
    pairs = [("a question", " b"), ("5 9 | 4 ", "6"), ("", "7 1"), ("[Q] 7", " 1 [R] 4")]
    settings = {"until": ["7"], "max_gen_toks": 6, "do_sample": False}
    asked = requests("loglikelihood", *pairs)
    mine, other = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    np.testing.assert_allclose([a for a, _ in mine], [b for b, _ in other], rtol=1e-4)
    assert [flag for _, flag in mine] == [flag for _, flag in other]
    texts = requests("loglikelihood_rolling", ("5 9 | 4 6",), ("a longer text of one window",), ("5 9 | 4" * 40,))
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), rtol=1e-4)
    asked = requests("generate_until", *((context, settings) for context, _ in pairs if context))
    assert ours.generate_until(asked) == theirs.generate_until(asked)


@pytest.mark.slow
def test_a_long_text_is_scored_in_windows_with_thoughts_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "load_model", lambda *_, **__: MADE)
    run, model, progress = MADE
    tokenizer = run.tokenizer
    longest = run.config.decoder.max_positions - 6  # Two markers, four thoughts; the last token is only predicted.
    ids = np.random.default_rng(0).integers(0, 10, 2 * longest + 5)
    text = " ".join(str(digit) for digit in ids)
    ids = np.asarray(tokenizer.encode(text), np.int32)
    [score] = CoconutLM(workdir="a workdir").loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    first, second = ids[:longest], ids[longest : 2 * longest]
    windows = [(np.asarray([tokenizer.eos_id], np.int32), first), (first[-1:], second)]
    # The last window is short: what the model has positions for stands before it.
    windows.append((ids[len(ids) - longest - 1 : 2 * longest], ids[2 * longest :]))
    whom = (model, tokenizer, get_method("coconut"), run.placing(progress.stage))
    scores, _ = log_likelihoods(*whom, *(list(side) for side in zip(*windows, strict=True)))
    assert score == pytest.approx(scores.sum(), rel=1e-5)


@pytest.mark.slow
def test_a_context_that_is_too_long_is_an_error_or_loses_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "load_model", lambda *_, **__: MADE)
    asked = requests("generate_until", ("1 2 " * 30, {"until": []}), ("1 2", {"until": []}))
    with pytest.raises(CoconutError, match=r"request 0: .*max_positions = 48: a context of 60 tokens, 6 of markers"):
        CoconutLM(workdir="a workdir").generate_until(asked)
    model = CoconutLM(workdir="a workdir", truncate=True)
    cut_itself = requests("generate_until", ("1 2 " * 30, {"until": []}), (("1 2 " * 30)[-2 * 37 :], {"until": []}))
    first, second = model.generate_until(cut_itself)
    assert first == second and model.truncated == 1


@pytest.mark.parametrize(
    "settings, expected, until",
    [
        ({"until": ["\n", "Q:"], "do_sample": False, "temperature": 0.7, "top_p": 0.5}, {}, ["\n", "Q:"]),
        ({"until": "\n", "max_gen_toks": 7, "max_new_tokens": 7}, {"max_new_tokens": 7}, ["\n"]),
        ({"do_sample": True, "top_k": 3}, {"temperature": 1.0, "top_k": 3}, []),
        ({"do_sample": "false", "temperature": 0.7}, {}, []),
        ({"temperature": 0.5, "top_p": 0.9, "min_p": 0.1}, {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1}, []),
    ],
)
def test_settings_of_a_task_are_followed(settings: dict[str, Any], expected: dict[str, Any], until: list[str]) -> None:
    assert read_settings(settings, SamplingConfig()) == (SamplingConfig(**expected), until)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"num_beams": 4}, "num_beams = 4 is not followed here; known: until, do_sample"),
        ({"max_gen_toks": 7, "max_tokens": 8}, "max_gen_toks and max_tokens name different numbers"),
        ({"do_sample": True, "temperature": 0.0}, "contradict each other"),
        ({"max_gen_toks": 0}, "max_new_tokens = 0"),
        ({"max_gen_toks": 12.7}, r"max_gen_toks = 12\.7: must be a whole number"),
        ({"temperature": "hot"}, "temperature = 'hot': must be a number"),
        ({"do_sample": "perhaps"}, "do_sample = 'perhaps': must be True or False"),
        ({"until": [5]}, r"until = \[5\]: must be a text or a list of texts"),
    ],
)
def test_settings_that_are_not_followed_are_refused_by_name(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(CoconutError, match=why):
        read_settings(settings, SamplingConfig())


def test_a_text_ends_where_the_first_of_several_begins() -> None:
    assert cut("a b\nQ: c", ["Q:", "\n", ""]) == "a b" and cut("a", ["b"]) == "a"


@pytest.mark.parametrize(
    "flags, why",
    [
        pytest.param(
            ["--workdir", "x", "--tasks", "gsm8j"],
            "--tasks gsm8j: no such task, and no file of one; did you mean: gsm8k",
            marks=pytest.mark.slow,  # The library reads all of its own tasks.
        ),
        (["--workdir", "x", "--tasks", "gsm8k", "--include_path", "nowhere"], "--include_path nowhere: no such folder"),
        (["--tasks", "gsm8k"], "give --workdir, of a run, or --pretrained"),
        (["--pretrained", "x", "--thoughts", "2", "--tasks", "gsm8k"], "--thoughts 2: belongs to --workdir"),
        (["--workdir", "x", "--limit", "0", "--tasks", "gsm8k"], "--limit 0: must be at least 1"),
    ],
)
def test_bad_flags_are_one_message(flags: Sequence[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", *flags]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith(f"coconut lm-eval: {why}")


def test_the_entry_point_names_the_model() -> None:
    groups = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups["lm_eval.models"] == {"coconut": f"{CoconutLM.__module__}:{CoconutLM.__qualname__}"}
