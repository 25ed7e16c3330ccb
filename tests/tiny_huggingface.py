"""Models of `transformers` small enough to compare with in a second, one a family, and the way to our decoders."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForCausalLM,
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

CONFIGS: dict[str, PretrainedConfig] = {
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
    "gpt2_untied": GPT2Config(**_GPT2, n_inner=24, activation_function="gelu", tie_word_embeddings=False),
    "llama_biased": LlamaConfig(**_LLAMA_STYLE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama_wide_heads": LlamaConfig(**_ONE_LAYER, head_dim=16, rope_parameters=_LLAMA3),
    "mistral": MistralConfig(**_LLAMA_STYLE, head_dim=8, sliding_window=None),
    "olmo2_biased": Olmo2Config(**_LLAMA_STYLE, attention_bias=True, tie_word_embeddings=True, pad_token_id=None),
    "phi3_plain": Phi3Config(**_LLAMA_STYLE, pad_token_id=None),
    "qwen2_untied": Qwen2Config(**_LLAMA_STYLE, tie_word_embeddings=False),
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
        for path, parameter in model.named_parameters():
            scale = 0.25 if parameter.ndim == 2 else 0.1
            is_norm_scale = parameter.ndim == 1 and path.endswith("weight")
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + is_norm_scale)
    return model.to(dtype or torch.float32).eval()


def write_model(folder: Path, name: str, **options: Any) -> Path:
    """The folder of a `random_model`, as `transformers` writes it."""
    random_model(name).save_pretrained(folder, **options)
    return folder


def tensors_of_decoder(decoder: Decoder) -> dict[str, np.ndarray]:
    """Arrays of a decoder, such as gradients, by the names `transformers` has for them."""
    parameters = decoder_parameters(decoder)
    return {name: gather(tensor, parameters) for name, tensor in tensors_of(decoder.config, parameters).items()}
