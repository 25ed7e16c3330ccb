"""The loop that an export carries: PyTorch and `transformers` think what we think, and write what we write."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from coconut.commands import export as export_command
from coconut.commands.generate import answer_question
from coconut.commands.model_card import without_loop
from coconut.latent.feedback import FeedbackConfig
from coconut.methods.pccot import PccotOptions
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.tasks import get_task
from coconut.tokenizers import SYMBOLS, TEXT, byte_pair_tokenizer, symbol_tokenizer
from coconut.training.progress import Progress
from coconut.training.run import Run
from tests.tiny_models import LLAMA_STYLE, quick_compilation
from tests.tiny_runs import BASE, untrained_run

EXAMPLES = get_task("small_graphs").generate(3, 0, config="e8")
QUESTIONS = [example.question for example in EXAMPLES]
LLAMA = dataclasses.replace(LLAMA_STYLE, num_layers=2, max_positions=256)
GPT2 = dataclasses.replace(BASE.decoder, num_layers=2)


@pytest.fixture(autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def made_run(decoder: DecoderConfig, **settings: Any) -> tuple[Run, Model, Progress]:
    """A run that reads graphs in symbols, or in text where it is a Llama."""
    settings = {"sampling": {"max_new_tokens": 6}, **settings}
    if decoder is LLAMA:
        in_text = {"tokenizer": "byte_pair", "options": {}, "task": "prosqa"}
        return untrained_run(byte_pair_tokenizer(TEXT.texts(EXAMPLES), 270), decoder=decoder, data=in_text, **settings)
    symbols = {symbol for text in SYMBOLS.texts(EXAMPLES) for symbol in text.split()}
    return untrained_run(symbol_tokenizer(sorted(symbols)), decoder=decoder, **settings)


def exported(made: tuple[Run, Model, Progress], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(export_command, "load_model", lambda *_, **__: made)
    # There is no workdir that says where the run comes from; tests/commands/test_pretrained_run.py exports one with it.
    monkeypatch.setattr(export_command, "origin", lambda workdir, run, progress: "## Data\n")
    export_command.export("a workdir", folder)
    return folder


def loop_of(folder: Path) -> Any:
    """The module that an export carries."""
    spec = importlib.util.spec_from_file_location("think", folder / "think.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def feed_back(kind: str, factor: float = 1.0) -> dict[str, Any]:
    return {"feedback": FeedbackConfig(kind=kind, factor=factor)}


CASES: Mapping[str, tuple[DecoderConfig, dict[str, Any], tuple[int | None, ...]]] = {
    "coconut": (GPT2, {}, (None, 0, 3)),
    "llama": (LLAMA, {}, (None, 1)),
    "scale": (GPT2, feed_back("scale", 0.3), (None,)),
    "match_norm": (GPT2, feed_back("match_norm", 1.5), (None,)),
    "norm": (GPT2, feed_back("norm", 0.5), (None,)),
    "codi_projection": (GPT2, {"method": "codi", **feed_back("projection")}, (None,)),
    "mixture": (GPT2, feed_back("mixture", 0.7), (None,)),
    "gated": (LLAMA, feed_back("gated", 0.7), (None,)),
    "pccot": (GPT2, {"method": "pccot", "options": PccotOptions(sweeps=2), **feed_back("projection")}, (None, 1)),
    "pause": (GPT2, {"method": "pause"}, (None,)),
    "cot": (GPT2, {"method": "cot"}, (None,)),
}
QUICK = ("coconut", "pccot")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_it_thinks_and_writes_what_we_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, settings, counts = CASES[name]
    made = made_run(decoder, **settings)
    folder = exported(made, tmp_path / "exported", monkeypatch)
    loop, written = loop_of(folder), set()
    model, tokenizer = loop.load(folder)
    for count in counts:
        # Those in symbols are of one length, so that one program answers both.
        for question in QUESTIONS[: 1 if decoder is LLAMA else 2]:
            ours = answer_question(*made, question, thoughts=count).answer
            text, ids, thoughts = loop.answer(model, tokenizer, question, count)
            assert (text, len(ids), len(thoughts)) == (ours.text, ours.new_tokens, ours.thoughts)
            assert made[0].tokenizer.decode(ids) == ours.text and ids
            if ours.thought_inputs is not None:
                largest = np.abs(ours.thought_inputs).max(initial=0)
                np.testing.assert_allclose(thoughts.numpy(), ours.thought_inputs, rtol=0, atol=1e-5 * largest)
            written.add((count, text))
    assert len({text for _, text in written}) > 1 or name != "coconut", "the number of thoughts makes no difference"
    fields = json.loads((folder / "config.json").read_text())["coconut"]
    has_block = name != "cot"
    assert [part for part in fields["behind_question"] if isinstance(part, int)] == [4] * has_block
    if not has_block:
        with pytest.raises(ValueError, match="thoughts = 2: this model has no place for thoughts"):
            loop.answer(model, tokenizer, QUESTIONS[0], 2)
    card = (folder / "README.md").read_text()
    assert "python think.py" in card and card.startswith("---\nlibrary_name:")
    assert ("pause tokens" in card) == (name == "pause") and ("fed back" in card) == (name not in ("pause", "cot"))
    assert "import coconut" not in (folder / "think.py").read_text()


@pytest.mark.parametrize(
    "settings, why",
    [
        (feed_back("gaussian"), "the model draws its thoughts"),
        ({"method": "interleaved"}, "the model itself decides when it thinks"),
        ({"method": "ponder"}, "the model itself decides when it thinks"),
    ],
)
def test_where_it_would_write_something_else_the_card_says_why(
    settings: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_run(GPT2, **settings)
    folder = exported(made, tmp_path / "exported", monkeypatch)
    assert why in (without_loop(made[0], made[2]) or "")
    assert not (folder / "think.py").exists() and why in (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_card_s_command_runs_where_there_is_no_coconut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_run(GPT2)
    folder = exported(made, tmp_path / "exported", monkeypatch)
    command = [sys.executable, "-c", "import runpy, sys; sys.modules['coconut'] = sys.modules['jax'] = None; "
               "sys.argv = sys.argv[1:]; runpy.run_path('think.py', run_name='__main__')"]  # fmt: skip
    done = subprocess.run(
        [*command, "think.py", QUESTIONS[0], "--thoughts", "3"], cwd=folder, capture_output=True, text=True
    )
    text = answer_question(*made, QUESTIONS[0], thoughts=3).answer.text
    assert done.stdout == f"3 thoughts, then: {text}\n", done.stderr
