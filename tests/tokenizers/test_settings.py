"""What lies beside a vocabulary decides ids as in `transformers`, or is refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from coconut.errors import CoconutError
from coconut.tokenizers import load_tokenizer
from tests.tokenizers import published

EOS = "<|endoftext|>"
X = {"content": "<x>", "special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
PAD = X | {"content": "<pad>", "special": True}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
TEXTS = ("a <x> b", "<x><x>\n 2024", "don't  stop", "caf\u0065\u0301 42")


def write(folder: Path, vocabulary: str, **files: Any) -> Path:
    """A folder with GPT-2's vocabulary, whole or in two files, and files beside it by the name of each."""
    published.write_folder("gpt2", folder)
    model = json.loads(published.content("gpt2"))["model"]
    if vocabulary == "merges":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("vocabulary", "files"),
    [
        ("tokenizer.json", {"tokenizer_config": FAST | {"added_tokens_decoder": {"3001": X, "3002": PAD}}}),
        ("tokenizer.json", {"tokenizer_config": FAST, "added_tokens": {"<x>": 3001, "<pad>": 3002},
                            "special_tokens_map": {"pad_token": "<pad>"}}),
        ("merges", {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": EOS},
                    "added_tokens": {"<x>": 3001, "<pad>": 3002}, "special_tokens_map": {"pad_token": "<pad>"}}),
        ("merges", {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": EOS, "add_bos_token": True}
                    | {"added_tokens_decoder": {"3001": X, "3002": PAD}}}),
    ],
)  # fmt: skip
def test_tokens_that_are_added_beside_the_vocabulary(vocabulary: str, files: dict[str, Any], tmp_path: Path) -> None:
    ours = load_tokenizer(write(tmp_path, vocabulary, **files))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert {name: theirs.convert_tokens_to_ids(name) for name in ("<x>", "<pad>")} == {"<x>": 3001, "<pad>": 3002}
    assert ours.special_token_ids()["<x>"] == 3001 and ours.special_token_ids()["<pad>"] == 3002
    assert ours.start_latent_id == len(theirs) == 3003
    for text in TEXTS:
        assert [*ours.leading_ids, *ours.encode(text)] == theirs(text).input_ids
    assert bool(ours.leading) == ("add_bos_token" in files["tokenizer_config"])


def test_the_class_of_vocabulary_and_merges_is_the_model_s(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "eos_token_id": 3000}
    ours = load_tokenizer(write(tmp_path, "merges", config=config, tokenizer_config={"model_max_length": 5}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.normalization == "NFC"
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": FAST | {"pad_token": "[PAD]"}}, r"pad_token = '\[PAD\]' is no token of the vocabulary"),
        ({"tokenizer_config": FAST | {"image_token": "<i>"}}, "image_token = '<i>' is no token of the vocabulary"),
        ({"tokenizer_config": FAST | {"extra_special_tokens": ["<s>"]}}, "extra_special_tokens = '<s>' is no token"),
        ({"tokenizer_config": FAST | {"additional_special_tokens": 5}}, "additional_special_tokens = 5: must be a"),
        ({"special_tokens_map": {"cls_token": {"content": "[CLS]"}}}, r"cls_token = '\[CLS\]' is no token"),
        ({"tokenizer_config": FAST | {"eos_token": 5}}, "eos_token = 5: must be the name of a token"),
        ({"tokenizer_config": FAST | {"add_prefix_space": True}}, "add_prefix_space = True: not supported"),
        ({"tokenizer_config": FAST | {"add_bos_token": True, "bos_token": EOS}}, r"add_bos_token = True: .* puts \[\]"),
        ({"tokenizer_config": FAST | {"added_tokens_decoder": {"3002": X}}}, "id 3001 stands for no token"),
        ({"tokenizer_config": FAST | {"added_tokens_decoder": {"7": X}}}, "id 7 stands for two tokens"),
        ({"tokenizer_config": FAST | {"added_tokens_decoder": {"7": PAD | {"content": EOS}}}}, "id = 3000, and 7 in"),
        (
            {"tokenizer_config": FAST | {"added_tokens_decoder": {"3000": X | {"content": EOS}}}},
            "special = True, and False",
        ),
        ({"tokenizer_config": FAST | {"added_tokens_decoder": {"3001": {}}}}, "KeyError.*content"),
        ({"tokenizer_config": FAST | {"added_tokens_decoder": {"3001": X | {"lstrip": True}}}}, "'<x>': lstrip = True"),
        ({"added_tokens": {"<x>": "3001"}}, "the id of token '<x>' is '3001'"),
    ],
)
def test_what_would_change_ids_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CoconutError, match=message):
        load_tokenizer(write(tmp_path, "tokenizer.json", **files))


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(CoconutError, match="File name too long"):
        load_tokenizer("a" * 5000)
