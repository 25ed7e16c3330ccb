"""No file ends in another error than ours, nor takes long: each reader is given inputs that were valid once.

``JAXTYPING_DISABLE=1 pytest tests/fuzz -m fuzz`` gives each reader 100,000 (``COCONUT_FUZZ_EXAMPLES`` says another
number), and writes what it did to the folder that ``COCONUT_FUZZ_RESULTS`` names.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from coconut.commands.configuration import resolve_run
from coconut.errors import CoconutError
from coconut.models.adapters import AdapterConfig
from coconut.models.huggingface.adapters import ADAPTER_WEIGHTS, load_adapter, save_adapter
from coconut.models.huggingface.configuration import ADAPTER_FILE, read_config
from coconut.models.huggingface.files import stored_tensors
from coconut.provenance import provenance
from coconut.tasks import BadRecords, Task, get_task
from coconut.tasks.icot import write_line
from coconut.tasks.records import to_json
from coconut.tokenizers import load_tokenizer
from coconut.training.config import run_config_from_json
from coconut.training.config import to_json as config_json
from tests.fuzz.mutations import mutate
from tests.tiny_models import GPT2_STYLE, random_adapters, random_decoder
from tests.tokenizers import published

USUAL = 200
MOST_SECONDS = 5.0
"""Of CPU, for an input of a few kilobytes. The machine may be busy."""


def _tasks(name: str) -> Callable[[Path], Any]:
    return lambda path: get_task(name).load(path)


def _own(path: Path) -> Any:
    return Task(name="own").load(path, BadRecords(most=1))


def _config(path: Path) -> Any:
    return run_config_from_json(json.loads(path.read_bytes()), str(path))


def _weights(path: Path) -> Any:
    problems: list[str] = []
    return stored_tensors(path.parent, problems)


def _tokenizer(path: Path) -> Any:
    return load_tokenizer(path, eos_token=published.EOS["gpt2"])


BASE = random_decoder(dataclasses.replace(GPT2_STYLE, num_layers=1))
ADAPTER = AdapterConfig(rank=2, alpha=3.0, dropout=0.1, trained_rows=(3, 5))


def _adapter(path: Path) -> Any:
    """The adapter whose config is at ``path``, beside tensors that fit."""
    if not (path.parent / ADAPTER_WEIGHTS).exists():
        save_adapter(random_adapters(BASE, ADAPTER), ADAPTER, path.parent / "right")
        shutil.copy(path.parent / "right" / ADAPTER_WEIGHTS, path.parent)
    return load_adapter(path.parent, BASE)


def _adapter_config() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(random_adapters(BASE, ADAPTER), ADAPTER, folder, base="some/base")
        return (Path(folder) / ADAPTER_FILE).read_bytes()


def _seeds() -> dict[str, tuple[str, list[bytes], Callable[[Path], Any]]]:
    """For each reader the name of its file, valid contents, and what reads it."""
    graphs = [to_json(example) for example in get_task("small_graphs").generate(2, seed=0)]
    plain = [
        {"question": "a?", "steps": ["b", {"think": 2}], "answer": "c"},
        {"question": "d", "steps": [], "answer": "e"},
    ]
    lines = [json.dumps(record) for record in plain]
    released = [{"question": "a?", "answer": "So <<1+1=2>>2.\n#### 2"}, {"question": "b?", "answer": "#### 1,000"}]
    trial = {"question": "Max is a x.", "query": "True or false: Max is a x.", "chain_of_thought": ["a", "b"]}
    official = {f"example{n}": {"test_example": {**trial, "answer": "True"}} for n in (1, 2)}
    products = [
        write_line(e.question, e.written_steps, e.answer) for e in get_task("multiplication").generate(2, seed=0)
    ]
    icot = [write_line("a?", ["<<1+1=2>>"], "2"), write_line("b?", [], "2/5")]
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 30}
    gpt2 |= {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    llama = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "vocab_size": 30,
    }
    llama |= {"intermediate_size": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 16}
    deepseek = llama | {"model_type": "deepseek_v3", "kv_lora_rank": 4, "q_lora_rank": None, "qk_nope_head_dim": 4}
    deepseek |= {"qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4}
    deepseek |= {"moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 2}
    deepseek |= {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_scaling": {"type": "yarn", "factor": 40}}
    deepseek["rope_scaling"] |= {"original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    run = resolve_run(["gin_configs/runs/prosqa_from_scratch.gin", "gin_configs/methods/coconut.gin"], [])
    tensors = safetensors.numpy.save({"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float16)})
    small = json.loads(published.content("gpt2"))

    def text(*contents: Any) -> list[bytes]:
        return [json.dumps(content).encode() for content in contents]

    def joined(parts: list[str]) -> list[bytes]:
        return ["\n".join(parts).encode()]

    return {
        **_published(),
        "field_list": ("a.json", text(plain, graphs), _tasks("prosqa")),
        "field_lines": ("a.jsonl", joined(lines), _tasks("prosqa")),
        "graphs": ("a.json", text(graphs), lambda path: get_task("small_graphs").load(path)),
        "gsm8k": ("a.jsonl", joined([json.dumps(record) for record in released]), _tasks("gsm8k")),
        "icot": ("a.txt", joined(icot), _tasks("gsm8k")),
        "prontoqa": ("a.json", text(official), _tasks("prontoqa")),
        "multiplication": ("a.txt", joined(products), _tasks("multiplication")),
        "own_task": ("a", [*joined(lines), *text(plain)], _own),
        "run_config": ("config.json", text(config_json(run)), _config),
        "model_config": ("config.json", text(gpt2, llama, deepseek), lambda path: read_config(path.parent)),
        "safetensors": ("model.safetensors", [tensors], _weights),
        "adapter": (ADAPTER_FILE, [_adapter_config()], _adapter),
        "tokenizer": ("tokenizer.json", text(_cut(small)), _tokenizer),
    }


def _published() -> dict[str, tuple[str, list[bytes], Callable[[Path], Any]]]:
    """Chains of thought and test sets as they are published, and tables where the packages for them are."""
    cot = [
        {"question": "a?", "cot": "<<1+1=2>> <<2+1=3>>", "answer": "#### 3"},
        {"question": "b?", "cot": ["<<1+1=2>>", "So. "], "answer": "2"},
    ]
    choices = [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]
    columns = {"label": ["A", "B"], "text": ["x", "y"]}
    records = {
        "cot": ("gsm8k", cot),
        "svamp": ("svamp", [{"Body": "a.", "Question": "b?", "Answer": 6.0}, {"question_concat": "a?", "Answer": "6"}]),
        "multiarith": ("multiarith", [{"sQuestion": "a?", "lSolutions": [7.0]}, {"question": "b?", "final_ans": "7"}]),
        "gsm_hard": ("gsm_hard", [{"input": "a?", "target": 1.5}, {"instruction": "b?", "response": "#### 1,000"}]),
        "strategyqa": (
            "strategyqa",
            [{"question": "a?", "answer": True}, {"question": "b?", "cot": "c", "answer": "no"}],
        ),
        "commonsenseqa": (
            "commonsenseqa",
            [
                {"question": {"stem": "a?", "choices": choices}, "answerKey": "A"},
                {"question": "b?", "choices": columns, "answerKey": "B"},
                {"question": "c?", "answer": "C"},
            ],
        ),
    }
    readers: dict[str, tuple[str, list[bytes], Callable[[Path], Any]]] = {}
    for name, (task, content) in records.items():
        lines = "\n".join(map(json.dumps, content)).encode()
        readers[name] = ("a.json", [json.dumps(content).encode(), lines], _tasks(task))
    rows = [cot[1], {**cot[1], "cot": ["c"]}]
    text = json.dumps({key: [row[key] for row in rows] for key in rows[0]})
    readers["columns"] = ("a.json", [text.encode()], _tasks("gsm8k"))
    if importlib.util.find_spec("pyarrow") is not None:
        readers["parquet"] = ("a.parquet", [_table(rows, "parquet")], _tasks("gsm8k"))
        readers["arrow"] = ("a", [_table(rows, "file"), _table(rows, "stream")], _tasks("gsm8k"))
    return readers


def _table(rows: list[dict[str, Any]], kind: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _cut(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json without merges: a few hundred tokens, so that a change hits more than the vocabulary."""
    model, added = content["model"], [token["content"] for token in content["added_tokens"]]
    ids = [token for token in model["vocab"] if len(token) == 1]
    content["model"] = {**model, "vocab": {token: n for n, token in enumerate([*ids, *added])}, "merges": []}
    content["added_tokens"] = [{**token, "id": len(ids) + n} for n, token in enumerate(content["added_tokens"])]
    return content


READERS = _seeds()


def _fuzz(reader: str, folder: Path, examples: int) -> dict[str, Any]:
    """Gives a reader some inputs; the first other error, or long time, fails the test."""
    name, seeds, read = READERS[reader]
    seconds, taken, refused, not_json = 0.0, 0, 0, 0

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(number=st.integers(0, 2**64 - 1))
    def run(number: int) -> None:
        nonlocal seconds, taken, refused, not_json
        path = folder / name
        data = mutate(seeds, number)
        path.write_bytes(data)
        start = time.process_time()
        try:
            read(path)
            taken += 1
        except CoconutError:
            refused += 1
        except TypeCheckError:
            # The tests' own checks of types came first; with JAXTYPING_DISABLE=1 there are none, as for users.
            refused += 1
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError):
            # This reader starts from content: its file is read by whoever calls it.
            if reader != "run_config" or _is_json(data):
                raise
            not_json += 1
        seconds = max(seconds, time.process_time() - start)
        assert seconds < MOST_SECONDS, data[:300]

    # A record that is left out is warned of, and pytest keeps every warning: a million of them take its memory.
    logging.disable(logging.WARNING)
    try:
        run()
    finally:
        logging.disable(logging.NOTSET)
    counts = {"examples": taken + refused + not_json, "read": taken, "refused": refused, "not_json": not_json}
    return {**counts, "other_errors": 0, "slowest_s": seconds}


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


@pytest.mark.parametrize("reader", READERS)
def test_valid_inputs_are_read(reader, tmp_path):
    name, seeds, read = READERS[reader]
    for seed in seeds:
        (tmp_path / name).write_bytes(seed)
        assert read(tmp_path / name)


@pytest.mark.parametrize("reader", list(READERS))
def test_no_input_ends_in_another_error(reader, tmp_path):
    _fuzz(reader, tmp_path, USUAL)


@pytest.mark.fuzz
@pytest.mark.parametrize("reader", list(READERS))
def test_no_input_of_many_ends_in_another_error(reader, tmp_path):
    start = time.process_time()
    found = _fuzz(reader, tmp_path, int(os.environ.get("COCONUT_FUZZ_EXAMPLES", "100000")))
    found |= {"cpu_s": time.process_time() - start}
    found |= {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if folder := os.environ.get("COCONUT_FUZZ_RESULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"reader": reader, **found, **provenance()}
        (Path(folder) / f"{reader}.json").write_text(json.dumps(content, indent=1) + "\n")
