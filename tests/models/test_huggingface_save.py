"""Written checkpoints: `transformers` reads them and computes the same; a folder is there completely or not at all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coconut.errors import CoconutError
from coconut.models.config import ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.experts_config import ExpertsConfig
from coconut.models.huggingface import load_pretrained, read_config, save_pretrained
from coconut.models.huggingface.configuration import config_json, decoder_config
from coconut.models.parameters import decoder_parameters
from coconut.models.presets import PRESETS
from tests.tiny_huggingface import ALL_CONFIGS, write_model
from tests.tiny_models import (
    EXPERTS_STYLE,
    GPT2_STYLE,
    LATENT_STYLE,
    LLAMA_STYLE,
    LOCAL_STYLE,
    quick_jit,
    random_decoder,
)


def assert_same_parameters(first: Decoder, second: Decoder) -> None:
    ours, theirs = decoder_parameters(first), decoder_parameters(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name], name)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_there_and_back(name: str, scan_layers: bool, tmp_path: Path) -> None:
    source = write_model(tmp_path / "theirs", name)
    if scan_layers and getattr(ALL_CONFIGS[name], "first_k_dense_replace", 0):
        pytest.skip("layers that differ are not stacked")
    execution = ExecutionConfig(scan_layers=scan_layers)
    decoder = load_pretrained(source, execution=execution)
    save_pretrained(decoder, tmp_path / "ours")
    assert_same_parameters(load_pretrained(tmp_path / "ours", execution=execution), decoder)
    assert read_config(tmp_path / "ours") == read_config(source)
    # `transformers` finds every tensor, and all of them as they were.
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "ours"))
    tensors = after.state_dict()
    for key, tensor in before.state_dict().items():
        assert torch.equal(tensors[key], tensor), key


@pytest.mark.parametrize(
    ("config", "scan_layers"),
    [
        (dataclasses.replace(GPT2_STYLE, dropout=0.2), False),
        (LLAMA_STYLE, True),
        (dataclasses.replace(LLAMA_STYLE, qkv_bias=False, query_key_norm=True, tied_head=True), False),
        (LOCAL_STYLE, True),
        (EXPERTS_STYLE, False),
        (
            dataclasses.replace(
                LATENT_STYLE, experts=ExpertsConfig(count=6, chosen=2, width=8, shared=2, router="softmax")
            ),
            True,
        ),
    ],
    ids=["gpt2", "qwen2", "qwen3", "gemma3_text", "deepseek_v3", "deepseek_v2"],
)
def test_transformers_computes_the_same(config: Any, scan_layers: bool, tmp_path: Path) -> None:
    decoder = random_decoder(config, scan_layers=scan_layers)
    save_pretrained(decoder, tmp_path / "model", max_shard_bytes=4000)
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (2, 7))

    def logits(decoder: Decoder) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
        hidden, _ = decoder.trunk(decoder.embed(jnp.asarray(tokens)), positions=positions, valid=jnp.ones((2, 7), bool))
        return decoder.unembed(hidden)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    theirs = model(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(quick_jit(logits)(decoder), theirs, rtol=0, atol=2e-5 * theirs.std())


def test_shards_are_split_by_size(tmp_path: Path) -> None:
    decoder = load_pretrained(write_model(tmp_path / "theirs", "llama"))
    save_pretrained(decoder, tmp_path / "ours", max_shard_bytes=4000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(sizes)
    assert len(sizes) > 3
    assert max(sizes.values()) < 4000 + 2000  # The header is not counted.
    assert index["metadata"]["total_size"] == sum(4 * leaf.size for leaf in jax.tree.leaves(decoder))
    assert_same_parameters(load_pretrained(tmp_path / "ours"), decoder)


def test_bfloat16(tmp_path: Path) -> None:
    decoder = load_pretrained(write_model(tmp_path / "theirs", "qwen3"), dtype="bfloat16")
    save_pretrained(decoder, tmp_path / "ours")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    assert_same_parameters(load_pretrained(tmp_path / "ours"), decoder)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_config_json_says(name: str, tmp_path: Path) -> None:
    content = config_json(PRESETS[name])
    problems: list[str] = []
    config = decoder_config(content, problems)
    assert not problems
    assert config is not None
    assert config_json(config) == content
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = AutoConfig.from_pretrained(tmp_path)
    families = {"gemma-3": "gemma3_text", "gpt2": "gpt2", "olmo": "olmo2", "phi": "phi3", "smollm2": "llama"}
    families |= {"deepseek-v2": "deepseek_v2", "moonlight": "deepseek_v3"}
    families |= {name: name for name in ("llama", "mistral", "qwen2", "qwen3")}
    assert theirs.model_type == next(family for prefix, family in families.items() if name.startswith(prefix))
    if theirs.model_type != "gpt2":
        rope = theirs.rope_parameters
        if (local := PRESETS[name].local_attention) is not None:
            assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": local.rotary_base}
            assert [kind == "sliding_attention" for kind in theirs.layer_types] == list(PRESETS[name].local_layers)
            assert theirs.sliding_window == local.window
            rope = rope["full_attention"]
        assert rope["rope_theta"] == PRESETS[name].rotary_base
        scaled = "yarn" if theirs.model_type.startswith("deepseek") else "llama3"
        assert rope["rope_type"] == ("default" if PRESETS[name].rotary_scaling is None else scaled)


def test_fields_and_files_of_the_caller(tmp_path: Path) -> None:
    decoder = random_decoder(GPT2_STYLE)
    (tmp_path / "model").mkdir()  # An empty folder is as good as none.
    save_pretrained(decoder, tmp_path / "model", config_fields={"eos_token_id": 3}, files={"vocab.json": b"{}"})
    assert AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == 3
    assert (tmp_path / "model" / "vocab.json").read_bytes() == b"{}"
    with pytest.raises(CoconutError, match="exists, and is no empty folder"):
        save_pretrained(decoder, tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(CoconutError, match="what n_embd are"):
        save_pretrained(decoder, elsewhere, config_fields={"n_embd": 8})
    for name in ("config.json", "model.safetensors", "../outside", ""):
        with pytest.raises(CoconutError, match="names of our own, or no plain file names"):
            save_pretrained(decoder, elsewhere, files={name: b""})
    with pytest.raises(CoconutError, match="max_shard_bytes = 0"):
        save_pretrained(decoder, elsewhere, max_shard_bytes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("coconut.models.huggingface.save.save_file", full_disk)
    with pytest.raises(CoconutError, match="could not be written: No space left"):
        save_pretrained(random_decoder(GPT2_STYLE), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_scale": 0.5}, "not llama: logit_scale = 0.5"),
        ({"mlp": "gelu", "mlp_bias": True}, "not gpt2: position_embedding = 'rotary'"),
        ({"output_bias": True, "qkv_bias": False}, "not qwen2: qkv_bias = False, output_bias = True"),
    ],
)
def test_what_transformers_cannot_compute_is_not_written(fields: dict, message: str, tmp_path: Path) -> None:
    decoder = random_decoder(dataclasses.replace(LLAMA_STYLE, **fields))
    with pytest.raises(CoconutError, match=message):
        save_pretrained(decoder, tmp_path / "model")
