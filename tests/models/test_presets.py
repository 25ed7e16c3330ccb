"""Presets: the gin files say the same, and the sizes are the published ones."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from coconut.commands.configuration import resolve_run
from coconut.errors import CoconutError
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.parameters import abstract_decoder
from coconut.models.presets import PRESETS
from coconut.training.config import RunConfig, from_json, to_json

GIN_FILES = Path(__file__).parents[2] / "gin_configs" / "models"
NOT_PUBLISHED = {"small_graphs_2l64", "small_graphs_experts_2l64", "small_4l128"}

# Parameters of the published checkpoints, as their model cards and files count them (tied heads once).
PUBLISHED = {
    "deepseek-v2-lite": 15_706_484_224,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    # With the correction biases, which transformers keeps as buffers: 64 numbers in each of 26 layers.
    "moonlight-16b-a3b": 15_960_110_208,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "phi-4": 14_659_507_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def huggingface_config(name: str) -> Any:
    """The preset as `transformers` would describe it, written down independently of our own mapping."""
    preset = PRESETS[name]
    if name.startswith("gpt2"):
        return GPT2Config(n_layer=preset.num_layers, n_embd=preset.embed_dim, n_head=preset.num_heads)
    if preset.experts is not None and preset.latent_attention is not None:
        return deepseek_config(preset)
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "olmo": Olmo2Config, "phi": Phi3Config}
    kinds |= {"gemma-3": Gemma3TextConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "smollm2": LlamaConfig}
    kind = next(kind for prefix, kind in kinds.items() if name.startswith(prefix))
    head_dim = {"head_dim": preset.head_dim} if preset.head_dim is not None else {}
    return kind(
        **head_dim,
        vocab_size=preset.vocabulary,
        hidden_size=preset.embed_dim,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.kv_heads,
        intermediate_size=preset.width_of_mlp,
        tie_word_embeddings=preset.tied_head,
    )


def deepseek_config(preset: DecoderConfig) -> Any:
    """Of DeepSeek V2 where the router is a softmax, else of V3."""
    experts, attention = preset.experts, preset.latent_attention
    assert experts is not None and attention is not None
    kind = DeepseekV2Config if experts.router == "softmax" else DeepseekV3Config
    return kind(
        vocab_size=preset.vocabulary,
        hidden_size=preset.embed_dim,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_heads,
        intermediate_size=preset.width_of_mlp,
        moe_intermediate_size=experts.width,
        n_routed_experts=experts.count,
        n_shared_experts=experts.shared,
        num_experts_per_tok=experts.chosen,
        first_k_dense_replace=experts.first_layer,
        kv_lora_rank=attention.latent_dim,
        q_lora_rank=attention.query_latent_dim,
        qk_nope_head_dim=attention.plain_dim,
        qk_rope_head_dim=attention.rotary_dim,
        v_head_dim=attention.value_dim,
        tie_word_embeddings=preset.tied_head,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_transformers_and_of_the_publication(name: str) -> None:
    torch = pytest.importorskip("torch")
    # Stacked layers are traced once, which is quicker; they must be alike.
    alike = PRESETS[name].experts is None
    stacked = abstract_decoder(PRESETS[name], ExecutionConfig(scan_layers=alike))
    ours = sum(leaf.size for leaf in jax.tree.leaves(stacked))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(huggingface_config(name))
    biases = sum(buffer.numel() for key, buffer in theirs.named_buffers() if key.endswith("e_score_correction_bias"))
    assert ours == biases + sum(parameter.numel() for parameter in theirs.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_gin_file_resolves_to_the_preset(name: str) -> None:
    files = ("base", f"models/{name}", "tasks/small_graphs", "methods/coconut")
    run = resolve_run([f"gin_configs/{file}.gin" for file in files])
    # A run's vocabulary is its tokenizer's.
    assert run.decoder == dataclasses.replace(PRESETS[name], vocab_size=None)
    assert from_json(RunConfig, to_json(run), name) == run


def test_every_gin_file_has_its_preset() -> None:
    assert {path.stem for path in GIN_FILES.glob("*.gin")} - NOT_PUBLISHED == set(PRESETS)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("RotaryScaling.factor = 0.0", "RotaryScaling.factor = 0.0: must be positive"),
        ("RotaryScaling.low_frequency_factor = 4.0", "high_frequency_factor = 4.0: must be larger than"),
        ("DecoderConfig.rotary_scaling = 8.0", "DecoderConfig.rotary_scaling = 8.0: must be"),
        ("DecoderConfig.position_embedding = 'learned'", "rotary_scaling = RotaryScaling"),
    ],
)
def test_bad_scaling_is_named(binding: str, message: str) -> None:
    files = ("base", "models/llama-3.2-1b", "tasks/small_graphs", "methods/coconut")
    with pytest.raises(CoconutError, match=re.escape(message)):
        resolve_run([f"gin_configs/{file}.gin" for file in files], [binding])
