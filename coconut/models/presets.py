"""Published decoders by name, in their published sizes.

Each has a gin file of the same name in ``gin_configs/models``, which leaves the vocabulary to the run's tokenizer.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from coconut.models.config import DecoderConfig
from coconut.models.experts_config import ExpertsConfig
from coconut.models.latent_config import LatentAttentionConfig, YarnRotaryScaling
from coconut.models.local_config import LocalAttentionConfig
from coconut.models.rotary_config import RotaryScaling


def _gpt2(num_layers: int, embed_dim: int, num_heads: int) -> DecoderConfig:
    """GPT-2 (Radford et al. 2019)."""
    return DecoderConfig(
        vocab_size=50_257,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        max_positions=1024,
        dropout=0.1,
    )


def _gemma3(num_layers: int, embed_dim: int, mlp_dim: int) -> DecoderConfig:
    """Gemma 3 of text alone (Gemma Team 2025): five local layers and a global one in turn, norms on both sides."""
    return DecoderConfig(
        vocab_size=262_144,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=mlp_dim,
        max_positions=32_768,
        position_embedding="rotary",
        rotary_base=1_000_000.0,
        normalization="rmsnorm",
        norm_placement="both",
        norm_epsilon=1e-6,
        norm_around_one=True,
        mlp="geglu_tanh",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        query_key_norm=True,
        local_attention=LocalAttentionConfig(
            window=512, pattern=("local", "local", "local", "local", "local", "global"), rotary_base=10_000.0
        ),
        embedding_scale=embed_dim**0.5,
    )


def _llama_style(**fields: Any) -> DecoderConfig:
    return DecoderConfig(
        position_embedding="rotary",
        normalization="rmsnorm",
        mlp="swiglu",
        output_bias=False,
        mlp_bias=False,
        **fields,
    )


def _llama3(
    num_layers: int, embed_dim: int, num_heads: int, mlp_dim: int, *, factor: float, tied_head: bool
) -> DecoderConfig:
    """Llama 3.1 and 3.2 (Grattafiori et al. 2024)."""
    return _llama_style(
        vocab_size=128_256,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=8,
        mlp_dim=mlp_dim,
        max_positions=131_072,
        rotary_base=500_000.0,
        rotary_scaling=RotaryScaling(factor=factor),
        norm_epsilon=1e-5,
        qkv_bias=False,
        tied_head=tied_head,
    )


def _qwen25(
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    *,
    vocab_size: int = 151_936,
    max_positions: int = 131_072,
    tied_head: bool = True,
) -> DecoderConfig:
    """Qwen 2.5 (Qwen Team 2024)."""
    return _llama_style(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
        max_positions=max_positions,
        rotary_base=1_000_000.0,
        norm_epsilon=1e-6,
        qkv_bias=True,
        tied_head=tied_head,
    )


def _qwen3(num_layers: int, embed_dim: int, num_heads: int, mlp_dim: int) -> DecoderConfig:
    """Qwen 3 (Yang et al. 2025): heads of 128 whatever the width, their queries and keys normalised."""
    return _llama_style(
        vocab_size=151_936,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=mlp_dim,
        max_positions=40_960,
        rotary_base=1_000_000.0,
        norm_epsilon=1e-6,
        qkv_bias=False,
        query_key_norm=True,
        tied_head=True,
    )


def _smollm2(
    num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int, *, rotary_base: float = 100_000.0
) -> DecoderConfig:
    """SmolLM 2 (Allal et al. 2025)."""
    return _llama_style(
        vocab_size=49_152,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
        max_positions=8192,
        rotary_base=rotary_base,
        norm_epsilon=1e-5,
        qkv_bias=False,
        tied_head=True,
    )


def _mistral(
    num_layers: int, embed_dim: int, *, vocab_size: int, max_positions: int, head_dim: int | None = None
) -> DecoderConfig:
    """Mistral 7B v0.3 and Nemo, which have no window (Jiang et al. 2023, and their model cards)."""
    return _llama_style(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        mlp_dim=14_336,
        max_positions=max_positions,
        rotary_base=1_000_000.0,
        norm_epsilon=1e-5,
        qkv_bias=False,
        tied_head=False,
        family="mistral",
    )


def _olmo2(num_layers: int, embed_dim: int, num_heads: int, mlp_dim: int) -> DecoderConfig:
    """OLMo 2 (OLMo Team 2025): norms behind attention and MLP, queries and keys normalised over all heads."""
    return _llama_style(
        vocab_size=100_352,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        max_positions=4096,
        rotary_base=500_000.0,
        norm_epsilon=1e-6,
        norm_placement="after",
        qkv_bias=False,
        query_key_norm=True,
        query_key_norm_over="all",
        tied_head=False,
    )


def _phi4() -> DecoderConfig:
    """Phi 4, 14 B (Abdin et al. 2024)."""
    return _llama_style(
        vocab_size=100_352,
        num_layers=40,
        embed_dim=5120,
        num_heads=40,
        num_kv_heads=10,
        mlp_dim=17_920,
        max_positions=16_384,
        rotary_base=250_000.0,
        norm_epsilon=1e-5,
        qkv_bias=False,
        tied_head=False,
        family="phi3",
    )


def _deepseek_v2_lite() -> DecoderConfig:
    """DeepSeek-V2-Lite, of which a token uses 2.7 B parameters (DeepSeek-AI 2024, appendix B)."""
    return _llama_style(
        vocab_size=102_400,
        num_layers=27,
        embed_dim=2048,
        num_heads=16,
        mlp_dim=10_944,
        max_positions=163_840,
        rotary_scaling=YarnRotaryScaling(factor=40.0, original_positions=4096, mscale=0.707, mscale_all_dim=0.707),
        norm_epsilon=1e-6,
        qkv_bias=False,
        tied_head=False,
        latent_attention=_LATENT_ATTENTION,
        experts=ExpertsConfig(count=64, chosen=6, width=1408, shared=2, first_layer=1, router="softmax"),
    )


def _moonlight() -> DecoderConfig:
    """Moonlight-16B-A3B (Liu et al. 2025, "Muon is scalable for LLM training"), of DeepSeek V3's kind."""
    return _llama_style(
        vocab_size=163_840,
        num_layers=27,
        embed_dim=2048,
        num_heads=16,
        mlp_dim=11_264,
        max_positions=8192,
        rotary_base=50_000.0,
        norm_epsilon=1e-5,
        qkv_bias=False,
        tied_head=False,
        latent_attention=_LATENT_ATTENTION,
        experts=ExpertsConfig(
            count=64, chosen=6, width=1408, shared=2, first_layer=1, router="sigmoid", normalized=True, scaling=2.446
        ),
    )


_LATENT_ATTENTION = LatentAttentionConfig(latent_dim=512, plain_dim=128, rotary_dim=64, value_dim=128)

PRESETS: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "deepseek-v2-lite": _deepseek_v2_lite(),
        "gemma-3-270m": _gemma3(18, 640, 2048),
        "gemma-3-1b": _gemma3(26, 1152, 6912),
        "gpt2": _gpt2(12, 768, 12),
        "gpt2-medium": _gpt2(24, 1024, 16),
        "gpt2-large": _gpt2(36, 1280, 20),
        "gpt2-xl": _gpt2(48, 1600, 25),
        "llama-3.1-8b": _llama3(32, 4096, 32, 14_336, factor=8.0, tied_head=False),
        "llama-3.2-1b": _llama3(16, 2048, 32, 8192, factor=32.0, tied_head=True),
        "llama-3.2-3b": _llama3(28, 3072, 24, 8192, factor=32.0, tied_head=True),
        "mistral-7b": _mistral(32, 4096, vocab_size=32_768, max_positions=32_768),
        "mistral-nemo-12b": _mistral(40, 5120, vocab_size=131_072, max_positions=128_000, head_dim=128),
        "moonlight-16b-a3b": _moonlight(),
        "olmo-2-1b": _olmo2(16, 2048, 16, 8192),
        "olmo-2-7b": _olmo2(32, 4096, 32, 11_008),
        "phi-4": _phi4(),
        "qwen2.5-0.5b": _qwen25(24, 896, 14, 2, 4864, max_positions=32_768),
        "qwen2.5-1.5b": _qwen25(28, 1536, 12, 2, 8960),
        "qwen2.5-7b": _qwen25(28, 3584, 28, 4, 18_944, vocab_size=152_064, tied_head=False),
        "qwen3-0.6b": _qwen3(28, 1024, 16, 3072),
        "qwen3-1.7b": _qwen3(28, 2048, 16, 6144),
        "qwen3-4b": _qwen3(36, 2560, 32, 9728),
        "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
        "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
        "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, rotary_base=130_000.0),
    }
)
"""Preset name -> the decoder, with the vocabulary its published checkpoint has."""
