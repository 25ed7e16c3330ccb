"""Between ``config.json`` and `DecoderConfig`.

DeepSeek V2 and V3, Gemma 3 (of text), GPT-2, Llama (SmolLM 2 among them), Mistral, OLMo 2, Phi 3 (3.5, 4), Qwen 2 (2.5)
and Qwen 3. A field of ``config.json`` that changes what is computed, or is not known to change nothing
(`coconut.models.huggingface.fields`), is refused.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coconut.errors import CoconutError
from coconut.hub import local_folder
from coconut.models.config import DecoderConfig, Family, Mlp
from coconut.models.huggingface.deepseek import (
    deepseek_choices,
    deepseek_fields,
    deepseek_json,
    is_deepseek,
)
from coconut.models.huggingface.fields import DEEPSEEK_SIZES, GPT2_SIZES, LLAMA_SIZES, renamed, their_names, unsupported
from coconut.models.huggingface.gemma import gemma_choices, gemma_fields, gemma_json
from coconut.models.huggingface.rotary import LONG_ROTARY_SCALING, rotary_choices, rotary_json
from coconut.models.huggingface.windows import window_choices, window_json, windows_that_fit
from coconut.models.rotary_config import LinearRotaryScaling, LongRotaryScaling

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
"""What PEFT writes beside an adapter; `transformers` applies one that lies beside a model to it."""
EXPORT_FIELD = "coconut"
"""Field of a config.json that ``coconut export`` wrote: the run's method, stage and marker ids."""

ARCHITECTURES: Mapping[Family, str] = MappingProxyType(
    {
        "deepseek_v2": "DeepseekV2ForCausalLM",
        "deepseek_v3": "DeepseekV3ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "olmo2": "Olmo2ForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
)
"""Family, which is the ``model_type`` of a config.json -> the name of its model in `transformers`."""

# What people try besides, and why it is not read.
_REFUSED = {
    "deepseek_v32": "its attention chooses the columns it looks at",
    "gemma2": "its layers look back through a window and on everything in turn, and its scores are capped",
    "gemma3": "it reads images, too",
    "mixtral": "its experts have another router",
    "olmo3": "its layers look back through a window and on everything in turn",
    "phi": "attention and MLP stand side by side, behind one norm",
    "qwen3_moe": "its experts have another router",
    "smollm3": "some of its layers know no positions",
}

# What may be left out; everything else must be there, since a default of ours would be a guess.
_OPTIONAL = ("n_inner", "num_key_value_heads", "head_dim")

_MLPS: Mapping[str, Mlp] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
}


def read_config(folder: Path) -> DecoderConfig:
    """The decoder that ``config.json`` in ``folder`` describes, in float32.

    Raises:
      CoconutError: there is no such file, or it describes what our decoder does not compute; the message names every
        field.
    """
    problems: list[str] = []
    config = described_config(folder, problems)
    if config is None or problems:
        raise CoconutError(f"{folder / CONFIG_FILE}: " + "; ".join(problems))
    return config


def described_config(folder: Path, problems: list[str]) -> DecoderConfig | None:
    """The decoder that a folder's config.json describes; what is wrong is added to ``problems``."""
    if (folder / ADAPTER_FILE).exists():
        adapter = read_json(folder / ADAPTER_FILE, problems)
        problems.append(
            f"{ADAPTER_FILE} says that this is a PEFT adapter (peft_type = {adapter.get('peft_type')!r:.80}) of "
            f"base_model_name_or_path = {adapter.get('base_model_name_or_path')!r:.80}, which is not applied here: "
            "merge it into that model (`coconut.models.huggingface.load_adapter` and "
            "`coconut.models.adapters.merge_adapters`, or `merge_and_unload` of PEFT) and load the result"
        )
        if not (folder / CONFIG_FILE).exists():
            return None
    return decoder_config(read_json(folder / CONFIG_FILE, problems), problems)


def is_our_export(path_or_repo: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written by ``coconut export``: its latent markers are trained."""
    return bool(export_fields(path_or_repo))


def export_fields(path_or_repo: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``coconut export`` wrote into config.json; nothing of other checkpoints."""
    fields = read_json(local_folder(path_or_repo) / CONFIG_FILE, []).get(EXPORT_FIELD, {})
    return fields if isinstance(fields, dict) else {}


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; what is wrong is added to ``problems``, and the object is then empty."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no JSON object")
        return {}
    return content


def decoder_config(content: Mapping[str, Any], problems: list[str]) -> DecoderConfig | None:
    """The decoder that the content of a config.json describes.

    Args:
      content: the JSON object.
      problems: what is wrong is added here; the result is then None.
    """
    try:
        return _decoder_config(content, problems)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        # Whatever a value of an unforeseen type leads to.
        problems.append(f"{CONFIG_FILE} holds a value of the wrong type: {error}")
        return None


def _decoder_config(content: Mapping[str, Any], problems: list[str]) -> DecoderConfig | None:
    found: list[str] = []
    fields: dict[str, Any] = {}
    family: Any = content.get("model_type")
    if not content:
        pass  # Said already by who read it.
    elif family not in ARCHITECTURES:
        why = f" ({_REFUSED[family]})" if family in _REFUSED else ""
        found.append(f"model_type = {family!r} is not one of {', '.join(ARCHITECTURES)}{why}")
    else:
        found += unsupported(family, ARCHITECTURES[family], content)
        for name, their in _sizes(family).items():
            if their not in content and their not in _OPTIONAL:
                found.append(f"{their} is missing")
            fields[name] = content.get(their)
        fields |= (_gpt2_choices if family == "gpt2" else _llama_choices)(str(family), content, found)
    if content and not found:
        try:
            return _shortened(DecoderConfig(**fields), family)
        except CoconutError as error:
            found.append(in_their_words(str(error), str(family)))
    problems += found
    return None


def _sizes(family: Family) -> Mapping[str, str]:
    """Our sizes and what they are called."""
    return DEEPSEEK_SIZES if is_deepseek(family) else GPT2_SIZES if family == "gpt2" else LLAMA_SIZES


def _shortened(config: DecoderConfig, family: Family) -> DecoderConfig:
    """The same config with None where that means the same, as whoever writes a config by hand leaves it out."""
    usual = {
        "num_kv_heads": config.num_heads,
        "head_dim": config.embed_dim / config.num_heads,
        "mlp_dim": 4 * config.embed_dim,
        "query_pre_attention_scalar": config.width_of_head,
    }
    config = dataclasses.replace(
        config, **{name: None for name, size in usual.items() if getattr(config, name) == size}
    )
    return config if family_of(config) == family else dataclasses.replace(config, family=family)


def _gpt2_choices(family: str, content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    activation = content.get("activation_function", "gelu_new")
    if activation not in _MLPS:
        problems.append(f"activation_function = {activation!r} is not one of {', '.join(_MLPS)}")
    # A decoder has one rate. Where the file has several, none of them: whoever trains chooses one.
    rates = {content.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return {
        "mlp": _MLPS.get(activation, "gelu_tanh"),
        "dropout": rates.pop() if len(rates) == 1 else 0.0,
        "tied_head": content.get("tie_word_embeddings", True),
    }


def _llama_choices(family: str, content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    # Qwen 2 has these biases always, the others where they say so.
    attention_bias = _switch(content, "attention_bias")
    # Qwen 3's heads are not D / N wide where the file does not say how wide they are.
    head_dim = {"head_dim": 128} if family == "qwen3" and content.get("head_dim") is None else {}
    return {
        "position_embedding": "rotary",
        "normalization": "rmsnorm",
        "mlp": "swiglu",
        "qkv_bias": family == "qwen2" or attention_bias,
        "output_bias": family != "qwen2" and attention_bias,
        "mlp_bias": family == "llama" and _switch(content, "mlp_bias"),
        "query_key_norm": family in ("olmo2", "qwen3"),
        "query_key_norm_over": "all" if family == "olmo2" else "head",
        "norm_placement": "after" if family == "olmo2" else "before",
        "tied_head": content.get("tie_word_embeddings", False),
        **({} if family == "gemma3_text" else rotary_choices(family, content, problems)),
        **window_choices(family, content, problems),
        **(gemma_choices(content, problems) if family == "gemma3_text" else {}),
        **(deepseek_choices(family, content, problems) if is_deepseek(family) else {}),
        **head_dim,
    }


def _switch(content: Mapping[str, Any], name: str) -> Any:
    """A flag that is off where the file has none. What is no flag stays as it is, for the config to refuse."""
    value = content.get(name)
    return False if value is None else value


def in_their_words(message: str, family: str) -> str:
    """An error of a `DecoderConfig` with the names that the fields have in a config.json."""
    if "LongRotaryScaling" in message:
        message = renamed(message, "LongRotaryScaling", LONG_ROTARY_SCALING)
    return renamed(message, "DecoderConfig", their_names(family))


# --- The way back -----------------------------------------------------------------------------------------------


def family_of(config: DecoderConfig) -> Family:
    """The family whose model computes what a decoder of this config does: its own, or the first that does.

    Raises:
      CoconutError: none does, or its own does not; the message says for each family which fields are in the way.
    """
    is_long = isinstance(config.rotary_scaling, LongRotaryScaling)
    is_own = is_long or isinstance(config.rotary_scaling, LinearRotaryScaling)
    scalar = config.query_pre_attention_scalar
    of_layers = {
        "mixer": "attention",
        "experts": None,
        "local_attention": None,
        "norm_around_one": False,
        "embedding_scale": 1.0,
        "query_pre_attention_scalar": scalar if scalar == config.width_of_head else None,
    }
    plain = {
        **of_layers,
        "position_embedding": "rotary",
        "normalization": "rmsnorm",
        "mlp": "swiglu",
        "logit_scale": 1.0,
        "norm_placement": "before",
        "query_key_norm_over": "head",
        "rotary_fraction": 1.0,
        "rotary_scaling": None if is_own else config.rotary_scaling,
    }
    no_bias = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    wanted: dict[Family, dict[str, Any]] = {
        "gpt2": {
            **of_layers,
            "position_embedding": "learned",
            "normalization": "layernorm",
            "mlp": config.mlp if config.mlp in _MLPS.values() else "gelu_tanh",
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "norm_placement": "before",
            "query_key_norm": False,
            "kv_heads": config.num_heads,
            "width_of_head": config.embed_dim / config.num_heads,
            "logit_scale": 1.0,
        },
        # In this order: what several could be, Llama is.
        "llama": {**plain, "query_key_norm": False, "output_bias": config.qkv_bias},
        "qwen2": {**plain, "query_key_norm": False, "qkv_bias": True, "output_bias": False, "mlp_bias": False},
        "qwen3": {**plain, "query_key_norm": True, "output_bias": config.qkv_bias, "mlp_bias": False},
        "olmo2": {
            **plain,
            "norm_placement": "after",
            "query_key_norm": True,
            "query_key_norm_over": "all",
            "output_bias": config.qkv_bias,
            "mlp_bias": False,
        },
        "phi3": {
            **plain,
            **no_bias,
            "query_key_norm": False,
            "rotary_fraction": config.rotary_fraction,
            "rotary_scaling": config.rotary_scaling if is_long else None,
        },
        "mistral": {**plain, **no_bias, "query_key_norm": False},
        "gemma3_text": gemma_fields(config, plain),
        "deepseek_v3": deepseek_fields("deepseek_v3", config, plain),
        "deepseek_v2": deepseek_fields("deepseek_v2", config, plain),
    }
    for family, fields in wanted.items():
        fields["local_attention"] = windows_that_fit(family, config)
    if config.family is not None:
        wanted = {config.family: wanted[config.family]}
    reasons = []
    for family, fields in wanted.items():
        wrong = {name: getattr(config, name) for name, value in fields.items() if getattr(config, name) != value}
        if not wrong:
            return family
        reasons.append(f"not {family}: " + ", ".join(f"{name} = {value!r}" for name, value in wrong.items()))
    raise CoconutError("no architecture of `transformers` computes what this decoder does: " + "; ".join(reasons))


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """The content of the config.json of a decoder, as `transformers` 4 and 5 both read it (LongRoPE: 5 alone).

    Dropout of the Llama family, which `transformers` applies to attention weights alone, is not written.

    Raises:
      CoconutError: see `family_of`.
    """
    family = family_of(config)
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": config.param_dtype,
        # Else `transformers` takes the family's first model's, such as Llama 1's end of text, 2.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    values = {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.width_of_head,
        "mlp_dim": config.width_of_mlp,
    }
    for name, their in _sizes(family).items():
        content[their] = values.get(name, getattr(config, name))
    if family == "gpt2":
        content["activation_function"] = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.mlp]
        content |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        return content
    content |= {"hidden_act": "silu", "rope_theta": config.rotary_base, "rope_scaling": rotary_json(config)}
    content |= window_json(family, config)
    if is_deepseek(family):
        return content | deepseek_json(family, config)
    if family == "gemma3_text":
        del content["hidden_act"]
        return content | gemma_json(config)
    if family in ("llama", "olmo2", "qwen3"):
        content["attention_bias"] = config.qkv_bias
    if family == "llama":
        content["mlp_bias"] = config.mlp_bias
    if family == "phi3":
        content["partial_rotary_factor"] = config.rotary_fraction
        if isinstance(config.rotary_scaling, LongRotaryScaling):
            content["original_max_position_embeddings"] = config.rotary_scaling.original_positions
    return content
