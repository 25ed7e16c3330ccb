"""Loading checkpoints: every layout gives the same parameters, and whatever does not fit is named."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")

import torch

from coconut.errors import CoconutError
from coconut.models.config import ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_pretrained, load_weights, read_config
from coconut.models.parameters import decoder_parameters
from coconut.models.presets import PRESETS
from tests.tiny_huggingface import ALL_CONFIGS, corrections, random_model, tensors_of_decoder, write_model

WEIGHTS = "model.safetensors"


def assert_holds(decoder: Decoder, model: Any) -> None:
    """All parameters are those of the model, bit for bit."""
    theirs = {
        name: parameter.detach().float().numpy() for name, parameter in (*model.named_parameters(), *corrections(model))
    }
    ours = tensors_of_decoder(decoder)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name].astype(np.float32), value, name)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_parameters_are_those_of_the_checkpoint_in_both_layouts(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one_by_one = load_pretrained(tmp_path)
    assert one_by_one.config == read_config(tmp_path)
    assert_holds(one_by_one, model)
    if one_by_one.config.experts is not None and one_by_one.config.experts.first_layer:
        return  # Its layers are not alike, and are not stacked.
    stacked = load_pretrained(tmp_path, execution=ExecutionConfig(scan_layers=True))
    assert decoder_parameters(stacked)["layers.mlp.up.kernel"].shape[0] == one_by_one.config.num_layers
    assert_holds(stacked, model)


def test_parameters_are_copies(tmp_path: Path) -> None:
    decoder = load_pretrained(write_model(tmp_path, "qwen2"))
    before = np.array(decoder.tokens.embedding[...])
    file = tmp_path / WEIGHTS
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\0" * (file.stat().st_size // 2))
    np.testing.assert_array_equal(decoder.tokens.embedding[...], before)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtypes(stored: torch.dtype, tmp_path: Path) -> None:
    model = random_model("llama", dtype=stored)
    model.save_pretrained(tmp_path)
    name = str(stored).removeprefix("torch.")
    as_stored = load_pretrained(tmp_path)
    assert (as_stored.execution.dtype, as_stored.config.param_dtype) == (name, name)
    assert {leaf.dtype for leaf in decoder_parameters(as_stored).values()} == {jnp.dtype(name)}
    assert_holds(as_stored, model)
    wide = load_pretrained(tmp_path, dtype="float32")
    assert (wide.execution.dtype, wide.config.param_dtype) == ("float32", "float32")
    assert_holds(wide, model)
    for_training = load_pretrained(tmp_path, config=wide.config, execution=ExecutionConfig(dtype="bfloat16"))
    assert (for_training.execution.dtype, for_training.config.param_dtype) == ("bfloat16", "float32")
    with pytest.raises(CoconutError, match="jax_enable_x64"):
        load_pretrained(tmp_path, dtype="float64")


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Writes the tensors of a folder anew."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_other_layouts_of_names(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    tied = model.config.tie_word_embeddings

    def old(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The base model's names, beside constants that are no parameters."""
        base = {key.removeprefix("transformer.").removeprefix("model."): value for key, value in tensors.items()}
        constants = ("h.0.attn.bias", "h.1.attn.masked_bias", "layers.0.self_attn.rotary_emb.inv_freq")
        return base | {key: np.ones((1, 1, 4, 4), np.float32) for key in constants}

    def official(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A module that holds the model, and its embedding once more; torch stores a tied head, too."""
        embedding = tensors["transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"]
        copies = {"embedding.weight": embedding} | ({"lm_head.weight": embedding} if tied else {})
        return {
            key if key == "embedding.weight" else f"base_causallm.{key}": value
            for key, value in (tensors | copies).items()
        }

    for index, layout in enumerate((old, official)):
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        rewrite(folder, layout)
        assert_holds(load_pretrained(folder), model)
        assert_holds(load_weights(folder, read_config(folder)), model)
    rewrite(tmp_path / "1", lambda tensors: tensors | {"embedding.weight": tensors["embedding.weight"] + 1})
    message = r"embedding\.weight .*stand for the same parameter, and differ"
    with pytest.raises(CoconutError, match=message):
        load_pretrained(tmp_path / "1")


@pytest.mark.slow
def test_a_caller_chooses_how_to_compute_and_not_what(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    described = read_config(tmp_path)
    chosen = dataclasses.replace(described, vocab_size=None, dropout=0.5, max_positions=8)
    decoder = load_pretrained(tmp_path, config=chosen, execution=ExecutionConfig(remat="full"))
    assert decoder.config == dataclasses.replace(chosen, vocab_size=described.vocab_size)
    longer = dataclasses.replace(described, max_positions=described.max_positions + 1, rotary_scaling=None)
    with pytest.raises(
        CoconutError,
        match=r"(?s)rotary_scaling = None, but .*max_positions = 65, but .* says max_position_embeddings = 64",
    ):
        load_pretrained(tmp_path, config=longer)
    with pytest.raises(CoconutError, match=r"num_layers = 12, but config\.json says num_hidden_layers = 2"):
        load_pretrained(tmp_path, config=PRESETS["gpt2"])


# --- What does not fit ------------------------------------------------------------------------------------------


def edit_config(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in (content | fields).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(CoconutError) as caught:
        load_pretrained(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "messages"),
    [
        (
            "llama",
            {"model_type": "mamba"},
            [
                "model_type = 'mamba' is not one of deepseek_v2, deepseek_v3, gemma3_text, gpt2, llama, mistral, "
                "olmo2, phi3, qwen2, qwen3"
            ],
        ),
        ("llama", {"hidden_size": ..., "hidden_act": "gelu"}, ["hidden_size is missing", "hidden_act = 'gelu'"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rotary scaling of type 'yarn'"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, ["lacks factor, low_freq_factor, high_freq_factor"]),
        ("llama", {"num_attention_heads": 0}, ["num_attention_heads = 0: must be at least 1"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config = {'bits': 4}"]),
        ("llama", {"hidden_size": 32}, ["embed_tokens.weight has shape (29, 16), the config gives it (29, 32)"]),
        ("llama", {"num_hidden_layers": 1}, ["num_hidden_layers = 1, but the files hold tensors of 2 layers"]),
        ("llama", {"num_hidden_layers": 3}, ["num_hidden_layers = 3, but the files hold tensors of 2 layers"]),
        ("llama", {"tie_word_embeddings": True}, ["lm_head.weight and", "stand for the same parameter, and differ"]),
        ("qwen2", {"use_sliding_window": "yes"}, ["use_sliding_window = 'yes'"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ["layer_types has 'sliding_attention'"]),
        ("qwen2", {"model_type": "llama", "architectures": ...}, ["self_attn.q_proj.bias is unknown"]),
        ("qwen2", {"tie_word_embeddings": False}, ["lm_head.weight is missing"]),
        (
            "qwen3",
            {"model_type": "qwen2", "architectures": ..., "attention_bias": ...},
            ["k_norm.weight is unknown", "self_attn.q_proj.bias is missing"],
        ),
        ("gpt2", {"activation_function": "relu", "scale_attn_weights": False}, ["'relu'", "scale_attn_weights"]),
    ],
)
def test_a_config_that_does_not_fit(name: str, fields: dict, messages: list[str], tmp_path: Path) -> None:
    edit_config(write_model(tmp_path, name), **fields)
    refused = refusal(tmp_path)
    assert str(tmp_path) in refused
    for message in messages:
        assert message in refused


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.copy()
        tensors["model.layers.1.input_layernorm.weight"] = np.ones(16, np.int8)
        tensors["model.layers.1.lora.weight"] = np.ones(3, np.float32)
        return tensors

    rewrite(write_model(tmp_path, "llama"), spoil)
    refused = refusal(tmp_path)
    assert len(refused.splitlines()) == 5
    for message in (
        "model.norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight has shape (16, 24), the config gives it (24, 16)",
        "model.layers.1.input_layernorm.weight has dtype I8",
        "model.layers.1.lora.weight is unknown",
    ):
        assert message in refused


def test_damaged_files_are_all_named(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", max_shard_size="6KB")
    first, second, third, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    third.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    edit_config(tmp_path, hidden_act="relu")
    refused = refusal(tmp_path)
    assert len(refused.splitlines()) == 5
    assert f"{first.name} is missing" in refused
    for file in (second, third):
        assert re.search(rf"{file.name} \([\d,]+ bytes\) is damaged or only half downloaded", refused)
    assert "hidden_act = 'relu'" in refused


def test_an_index_must_say_what_the_files_hold(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", max_shard_size="6KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    refused = refusal(tmp_path)
    assert "names '../secret.safetensors', which is no file of this folder" in refused
    assert "disagree about which tensors are there: model.norm.weight" in refused
    index.write_text('{"weight_map": []}')
    assert "weight_map must give the file of each tensor" in refusal(tmp_path)
    index.write_text("{")
    assert "model.safetensors.index.json cannot be read" in refusal(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    refused = refusal(tmp_path)
    assert "config.json is missing" in refused
    assert "there is neither model.safetensors nor model.safetensors.index.json" in refused
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused = refusal(tmp_path)
    assert "only pytorch_model.bin: pickles can run code and are never read" in refused
    assert "safe_serialization=True" in refused


# --- The hub ----------------------------------------------------------------------------------------------------


def test_a_repository_is_downloaded_without_its_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, "gpt2")
    asked: list[Any] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_holds(load_pretrained("someone/gpt2", revision="main"), random_model("gpt2"))
    assert asked[:2] == ["someone/gpt2", "main"]
    assert {"config.json", "model.safetensors", "model-*-of-*.safetensors", "tokenizer.json"} <= set(asked[2])
    assert not [pattern for pattern in asked[2] if pattern in ("*", "*.bin", "*.py", "*.json")]


def test_neither_a_folder_nor_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CoconutError, match="neither a folder nor the id of a repository"):
        load_pretrained(tmp_path / "no" / "such" / "folder")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(CoconutError, match=r"someone/gpt2 is no folder, and no repository .*cannot reach the hub"):
        load_pretrained("someone/gpt2")
    with pytest.raises(CoconutError, match="only a repository has revisions"):
        load_pretrained(tmp_path, revision="main")


# --- DeepSeek -------------------------------------------------------------------------------------------------------


def changed_deepseek(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    rewrite(write_model(folder, "deepseek_v3"), change)
    return folder


def test_fp8_blocks_and_a_bias_of_another_length_are_refused(tmp_path: Path) -> None:
    expert, bias = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
    blocks = changed_deepseek(
        tmp_path / "fp8", lambda tensors: tensors | {f"{expert}_scale_inv": np.ones((1, 1), np.float32)}
    )
    with pytest.raises(CoconutError, match=rf"model.safetensors: tensor {expert}_scale_inv .* fp8 .* are not read"):
        load_pretrained(blocks)
    short = changed_deepseek(tmp_path / "short", lambda tensors: tensors | {bias: tensors[bias][:7]})
    with pytest.raises(CoconutError, match=rf"{bias} has shape \(7,\), the config gives it \(8,\)"):
        load_pretrained(short)
    missing = changed_deepseek(tmp_path / "missing", lambda tensors: {k: v for k, v in tensors.items() if k != expert})
    with pytest.raises(CoconutError, match=f"tensor {expert} is missing"):
        load_pretrained(missing)


def test_modules_for_further_tokens_are_not_read(tmp_path: Path) -> None:
    before = load_pretrained(write_model(tmp_path / "plain", "deepseek_v3"))
    further = {f"model.layers.2.{name}": np.ones((2, 2), np.float32) for name in ("eh_proj.weight", "mlp.gate.weight")}
    after = load_pretrained(changed_deepseek(tmp_path / "further", lambda tensors: tensors | further))
    for name, value in decoder_parameters(before).items():
        np.testing.assert_array_equal(decoder_parameters(after)[name], value, name)


def test_routers_of_a_narrow_checkpoint_stay_wide(tmp_path: Path) -> None:
    model = random_model("deepseek_v3", dtype=torch.bfloat16)
    for name, tensor in (*model.named_parameters(), *corrections(model)):
        if ".gate." in name:
            tensor.data = tensor.data.float() * 1.001
    model.save_pretrained(tmp_path)
    decoder = load_pretrained(tmp_path)
    assert decoder.config.param_dtype == decoder.execution.dtype == "bfloat16"
    wide = {name for name, leaf in decoder_parameters(decoder).items() if leaf.dtype == jnp.float32}
    assert wide == {"layers.1.mlp.router.kernel", "layers.1.mlp.router.correction"}
    assert_holds(decoder, model)
