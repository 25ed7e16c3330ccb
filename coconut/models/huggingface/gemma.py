"""Gemma 3's text models: between the fields of their ``config.json`` and ours."""

from collections.abc import Mapping
from typing import Any

from coconut.errors import CoconutError
from coconut.models.config import DecoderConfig, Mlp
from coconut.models.huggingface.fields import renamed
from coconut.models.latent_config import LARGEST_SIZE
from coconut.models.rotary_config import LinearRotaryScaling

_GATED: Mapping[str, Mlp] = {"gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "gelu": "geglu"}
_TYPES = ("full_attention", "sliding_attention")


def gemma_choices(content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """What Gemma 3 computes unlike Llama; what is wrong is added to ``problems``."""
    activation = content.get("hidden_activation", "gelu_pytorch_tanh")
    if activation not in _GATED:
        problems.append(f"hidden_activation = {activation!r:.80} is not one of {', '.join(_GATED)}")
    if content.get("num_key_value_heads") is None:
        problems.append("num_key_value_heads is missing")
    width = content.get("hidden_size")
    return {
        "mlp": _GATED.get(activation, "geglu_tanh"),
        "norm_placement": "both",
        "norm_around_one": True,
        "query_key_norm": True,
        # What is not in the file means this to `transformers`.
        "head_dim": content.get("head_dim", 256),
        "query_pre_attention_scalar": content.get("query_pre_attn_scalar", 256),
        "tied_head": content.get("tie_word_embeddings", True),
        "embedding_scale": width**0.5 if type(width) is int and 0 < width <= LARGEST_SIZE else 1.0,
        **_rotary(content, problems),
    }


def _rotary(content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Base and scaling of the global layers, by the kind of layer (`transformers` 5) or from the older fields.

    Where a file has both, the entries of ``rope_scaling`` take the place of those of ``rope_parameters``.
    """
    parameters, scaling = (
        {} if content.get(name) is None else content[name] for name in ("rope_parameters", "rope_scaling")
    )
    if not isinstance(parameters, Mapping) or not isinstance(scaling, Mapping):
        return {}  # That has been said by `unsupported`.
    if unknown := sorted(set(parameters) - set(_TYPES)):
        problems.append(f"rope_parameters has {', '.join(unknown):.80}: only {' and '.join(_TYPES)} are supported")
    by_type = {name: {} if parameters.get(name) is None else parameters[name] for name in _TYPES}
    for name, rope in by_type.items():
        if not isinstance(rope, Mapping):
            problems.append(f"rope_parameters: {name} = {rope!r:.80}: must be an object")
            return {}
    whole = {**by_type["full_attention"], **scaling}
    for name, rope in {"full_attention": whole, "sliding_attention": by_type["sliding_attention"]}.items():
        known = ("rope_type", "type", "rope_theta", *(("factor",) if name == "full_attention" else ()))
        if unknown := sorted(set(rope) - set(known)):
            problems.append(
                f"the rotary scaling of {name} has {', '.join(unknown):.80}: only {', '.join(known)} are known"
            )
    local = by_type["sliding_attention"]
    if (kind := local.get("rope_type", local.get("type", "default"))) != "default":
        problems.append(f"rotary scaling of type {kind!r:.80} for sliding_attention: only 'default' is supported")
    choices: dict[str, Any] = {"rotary_base": whole.get("rope_theta", content.get("rope_theta", 1_000_000.0))}
    kind = whole.get("rope_type", whole.get("type", "default"))
    if kind == "linear":
        factor: Any = whole.get("factor")
        try:
            choices["rotary_scaling"] = LinearRotaryScaling(factor=factor)
        except CoconutError as error:
            problems.append(renamed(str(error), "LinearRotaryScaling", {"factor": "factor"}))
    elif kind != "default":
        problems.append(f"rotary scaling of type {kind!r:.80}: only 'default' and 'linear' are supported")
    return choices


# --- The way back -----------------------------------------------------------------------------------------------


def gemma_fields(config: DecoderConfig, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder's config must say for Gemma 3 to compute what it does; see `family_of`."""
    local, scaling = config.local_attention, config.rotary_scaling
    # Local layers turn unstretched.
    stretches = isinstance(scaling, LinearRotaryScaling) and (local is None or local.rotary_base is not None)
    return {
        **plain,
        "mlp": config.mlp if config.mlp in _GATED.values() else "geglu_tanh",
        "norm_placement": "both",
        "norm_around_one": True,
        "query_key_norm": True,
        "embedding_scale": config.embed_dim**0.5,
        "query_pre_attention_scalar": config.query_pre_attention_scalar,
        # `transformers` refuses others.
        "embed_dim": config.embed_dim // config.num_heads * config.num_heads,
        "rotary_scaling": scaling if stretches else None,
        "output_bias": config.qkv_bias,
        "mlp_bias": False,
    }


def gemma_json(config: DecoderConfig) -> dict[str, Any]:
    """The fields that the family has beside those of Llama and of windows."""
    local, scalar = config.local_attention, config.query_pre_attention_scalar
    content: dict[str, Any] = {
        "hidden_activation": {"geglu_tanh": "gelu_pytorch_tanh", "geglu": "gelu"}[config.mlp],
        "query_pre_attn_scalar": config.width_of_head if scalar is None else scalar,
        "attention_bias": config.qkv_bias,
    }
    if local is not None:
        content["rope_local_base_freq"] = config.rotary_base if local.rotary_base is None else local.rotary_base
    return content
