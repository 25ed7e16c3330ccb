"""Models of `transformers` small enough to compare with in a second, one a family, and the way to our decoders."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
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
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from coconut.models.decoder import Decoder
from coconut.models.huggingface.names import tensors_of
from coconut.models.huggingface.save import gather
from coconut.models.parameters import decoder_parameters

VOCABULARY = 29
_LLAMA_STYLE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ONE_LAYER: dict[str, Any] = _LLAMA_STYLE | {"num_hidden_layers": 1}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
# Of four wavelengths one stays, one is stretched by less than the factor, and two by all of it.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Three pairs of features turn, each by its own factor, and the fourth does not.
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 3.0],
    "long_factor": [2.0, 5.0, 9.0],
    "original_max_position_embeddings": 32,
}

# Of four pairs of features one stays, one is stretched, and two lie between.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.2,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
_DEEPSEEK: dict[str, Any] = _LLAMA_STYLE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
}
# Wider heads than their scores are divided for; pads have gradients.
_GEMMA3: dict[str, Any] = _LLAMA_STYLE | {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "sliding_window": 3,
    "pad_token_id": None,
}
_BY_TYPE: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
_BARE_GEMMA3: dict[str, Any] = _GEMMA3 | {"head_dim": 4, "sliding_window": 1, "num_hidden_layers": 4}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "deepseek_v2": DeepseekV2Config(
        **_DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2}, attention_bias=True, first_k_dense_replace=0
    ),
    "deepseek_v3": DeepseekV3Config(**_DEEPSEEK, **_GROUPS, rope_parameters=_YARN, first_k_dense_replace=1),
    "gemma3_text": Gemma3TextConfig(
        **_GEMMA3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=_BY_TYPE,
    ),
    "gpt2": GPT2Config(**_GPT2),
    "llama": LlamaConfig(**_LLAMA_STYLE, head_dim=8, rope_parameters=_LLAMA3, rms_norm_eps=1e-5),
    "olmo2": Olmo2Config(**_LLAMA_STYLE, pad_token_id=None),
    "phi3": Phi3Config(
        **{**_LLAMA_STYLE, "hidden_size": 32},
        rope_parameters=_LONG_ROPE,
        original_max_position_embeddings=32,
        pad_token_id=None,
        tie_word_embeddings=True,
    ),
    "qwen2": Qwen2Config(**_LLAMA_STYLE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_LLAMA_STYLE, head_dim=8, tie_word_embeddings=False),
}
"""A model of each family that computes what no other does: heads tied and not, of the usual width and wider."""

MORE_CONFIGS: dict[str, PretrainedConfig] = {
    "deepseek_v2_grouped": DeepseekV2Config(
        **_DEEPSEEK, **_GROUPS, topk_method="group_limited_greedy", rope_parameters=_YARN, first_k_dense_replace=1
    ),
    "deepseek_v3_plain": DeepseekV3Config(
        **_DEEPSEEK | {"q_lora_rank": None, "rms_norm_eps": 1e-3},
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rope_interleave=False,
        attention_bias=True,
        first_k_dense_replace=0,
        tie_word_embeddings=True,
    ),
    "gemma3_text_biased": Gemma3TextConfig(
        **_BARE_GEMMA3,
        layer_types=["full_attention", "sliding_attention"] * 2,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma3_text_global": Gemma3TextConfig(**_GEMMA3, layer_types=["full_attention"] * 3, hidden_activation="gelu"),
    "gpt2_untied": GPT2Config(**_GPT2, n_inner=24, activation_function="gelu", tie_word_embeddings=False),
    "llama_biased": LlamaConfig(**_LLAMA_STYLE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama_wide_heads": LlamaConfig(**_ONE_LAYER, head_dim=16, rope_parameters=_LLAMA3),
    "mistral": MistralConfig(**_LLAMA_STYLE, head_dim=8, sliding_window=None),
    "mistral_window": MistralConfig(**_LLAMA_STYLE, sliding_window=4),
    "olmo2_biased": Olmo2Config(**_LLAMA_STYLE, attention_bias=True, tie_word_embeddings=True, pad_token_id=None),
    "phi3_plain": Phi3Config(**_LLAMA_STYLE, pad_token_id=None),
    "phi3_window": Phi3Config(**_LLAMA_STYLE, pad_token_id=None, sliding_window=2),
    "qwen2_untied": Qwen2Config(**_LLAMA_STYLE, tie_word_embeddings=False),
    "qwen2_window": Qwen2Config(**_LLAMA_STYLE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3_biased": Qwen3Config(**_LLAMA_STYLE, head_dim=8, attention_bias=True, tie_word_embeddings=True),
}
"""What the families can be configured to be besides."""

ALL_CONFIGS = CONFIGS | MORE_CONFIGS


def random_model(name: str, seed: int = 0, dtype: Any = None) -> Any:
    """A model none of whose parameters is at a special value, whose logits have a scale of one; in float32 by default.

    PyTorch is imported here, not above: what else is in this file is used where it is not installed, too.
    """
    import torch

    model = AutoModelForCausalLM.from_config(copy.deepcopy(ALL_CONFIGS[name]), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in (*model.named_parameters(), *corrections(model)):
            scale = 0.25 if parameter.ndim > 1 else 0.1
            is_norm_scale = parameter.ndim == 1 and path.endswith("weight")
            if is_norm_scale and name.startswith("gemma"):
                is_norm_scale, scale = False, 0.3  # One is added to it.
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + is_norm_scale)
    return model.to(dtype or torch.float32).eval()


def corrections(model: Any) -> list[tuple[str, Any]]:
    """The correction biases of its routers, by name: no parameters to PyTorch."""
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def write_model(folder: Path, name: str, **options: Any) -> Path:
    """The folder of a `random_model`, as `transformers` writes it."""
    random_model(name).save_pretrained(folder, **options)
    return folder


def tensors_of_decoder(decoder: Decoder) -> dict[str, np.ndarray]:
    """Arrays of a decoder, such as gradients, by the names `transformers` has for them in memory."""
    parameters = decoder_parameters(decoder)
    found = {name: gather(tensor, parameters) for name, tensor in tensors_of(decoder.config, parameters).items()}
    of_expert = {name: re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)_proj\.weight", name) for name in found}
    joined: dict[str, list[np.ndarray]] = {}
    for name, match in of_expert.items():
        if match:
            joined.setdefault(f"{match[1]}.{match[2]}", []).append(found[name])
    stacked = {name: np.stack(values) for name, values in joined.items()}
    whole = {name: value for name, value in found.items() if not of_expert[name]}
    for name in {name.rpartition(".")[0] for name in stacked}:
        whole[f"{name}.gate_up_proj"] = np.concatenate([stacked[f"{name}.gate"], stacked[f"{name}.up"]], 1)
        whole[f"{name}.down_proj"] = stacked[f"{name}.down"]
    return whole
