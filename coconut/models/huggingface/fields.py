"""Which fields of a ``config.json`` are known: those we compute, and those that change nothing we compute.

Any other is refused. Makers of models take a known ``model_type`` and add a field (``scale_emb``, ``use_qk_norm``, ...)
that their own code reads: loaded without it, such a model gives wrong numbers and no error.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Our field -> theirs.
GPT2_SIZES: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "num_layers": "n_layer",
        "embed_dim": "n_embd",
        "num_heads": "n_head",
        "mlp_dim": "n_inner",
        "max_positions": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
    }
)
LLAMA_SIZES: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "embed_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp_dim": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
    }
)
DEEPSEEK_SIZES: Mapping[str, str] = MappingProxyType(
    {name: their for name, their in LLAMA_SIZES.items() if name not in ("num_kv_heads", "head_dim")}
)
LATENT_ATTENTION: Mapping[str, str] = MappingProxyType(
    {
        "latent_dim": "kv_lora_rank",
        "query_latent_dim": "q_lora_rank",
        "plain_dim": "qk_nope_head_dim",
        "rotary_dim": "qk_rope_head_dim",
        "value_dim": "v_head_dim",
        "interleaved": "rope_interleave",
    }
)
EXPERTS: Mapping[str, str] = MappingProxyType(
    {
        "count": "n_routed_experts",
        "chosen": "num_experts_per_tok",
        "width": "moe_intermediate_size",
        "shared": "n_shared_experts",
        "first_layer": "first_k_dense_replace",
        "groups": "n_group",
        "groups_chosen": "topk_group",
        "normalized": "norm_topk_prob",
        "scaling": "routed_scaling_factor",
    }
)
YARN: Mapping[str, str] = MappingProxyType(
    {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    }
)
# What a choice of ours is called in their files.
_GPT2_CHOICES = {"mlp": "activation_function", "dropout": "resid_pdrop", "tied_head": "tie_word_embeddings"}
_LLAMA_CHOICES = {
    "mlp": "hidden_act",
    "tied_head": "tie_word_embeddings",
    "rotary_base": "rope_theta",
    "rotary_fraction": "partial_rotary_factor",
    "rotary_scaling": "rope_scaling",
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}

RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")
"""Dropout rates: they change nothing in a model that is read, as long as they are rates."""

# Their field -> the only values we compute; a field that is not there has the first of them, or what `_UNSAID` says.
_ANY_FAMILY: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "is_causal": (True,),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False, None),
    "pruned_heads": (None, {}),
    # Not of these families, yet seen in files of them; so they say that there is nothing of the kind.
    "alibi": (False, None),
    "num_nextn_predict_layers": (0, None),
    "use_qk_norm": (False, None),
}
_GPT2_ONLY: Mapping[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False, None),
}
_LLAMA_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # Two names of one function.
    "use_sliding_window": (False, None),  # Of Qwen `coconut.models.huggingface.windows` looks at it.
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
}
_GEMMA_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),  # `transformers` does not look at it, and no Gemma 3 has it.
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "use_sliding_window": (None,),
    "mlp_bias": (False, None),
}
_NO_BIAS: Mapping[str, tuple[Any, ...]] = {"attention_bias": (False, None), "mlp_bias": (False, None)}
_WHOLE: Mapping[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0, None)}
_DEEPSEEK_ONLY: Mapping[str, tuple[Any, ...]] = {**_WHOLE, "mlp_bias": (False, None), "moe_layer_freq": (1, None)}
_WINDOWED: Mapping[str, tuple[Any, ...]] = {"use_sliding_window": (False, True, None)}
# Beside the family's.
_OWN_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "deepseek_v2": {
        **_DEEPSEEK_ONLY,
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, None),  # `transformers` does not look at it, and DeepSeek's own code does.
        "rope_interleave": (True, None),
    },
    "deepseek_v3": {**_DEEPSEEK_ONLY, "scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)},
    "gemma3_text": {},
    "gpt2": {},
    "llama": _WHOLE,
    "mistral": {**_WHOLE, **_NO_BIAS},
    "olmo2": {**_WHOLE, "mlp_bias": (False, None)},
    # Files of Phi bring code of their own, which does what that of `transformers` does.
    "phi3": {
        **_NO_BIAS,
        "lm_head_bias": (False, None),
        "full_attn_mod": (1, None),
        "interpolate_factor": (1, None),
    },
    "qwen2": {**_WHOLE, **_WINDOWED, "attention_bias": (True, None), "mlp_bias": (False, None)},
    "qwen3": {**_WHOLE, **_WINDOWED, "mlp_bias": (False, None)},
}
_OWN_CODE = {
    **{
        f"deepseek_v{number}": {
            "AutoConfig": f"configuration_deepseek.DeepseekV{number}Config",
            "AutoModel": f"modeling_deepseek.DeepseekV{number}Model",
            "AutoModelForCausalLM": f"modeling_deepseek.DeepseekV{number}ForCausalLM",
        }
        for number in (2, 3)
    },
    "phi3": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
}

# fmt: off
# What decides no number of the forward pass: names, versions, and defaults of training and of generation.
_HARMLESS = frozenset(
    [
        "model_type", "transformers_version", "architectures", "torch_dtype", "dtype", "tie_word_embeddings",
        "coconut", "_name_or_path", "name_or_path", "_model_name_or_path", "_commit_hash", "tokenizer_class",
        "task_specific_params", "finetuning_task", "problem_type", "id2label", "label2id", "num_labels", "prefix",
        "is_decoder", "use_cache",
        "output_past", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript",
        "use_bfloat16", "tf_legacy_loss", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset", "chunk_size_feed_forward", "initializer_range", "gradient_checkpointing",
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
        "decoder_start_token_id", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
        "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
        "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
        "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
        "unsloth_fixed", "unsloth_version", "transformers.js_config", "is_llama_config",
    ]
)
_GPT2_HARMLESS = frozenset(
    [
        "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn",
        "predict_special_tokens", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "summary_first_dropout", "summary_last_dropout", "classifier_dropout", "hidden_dropout",
    ]
)
_LLAMA_HARMLESS = frozenset(
    [
        "attention_dropout", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "attention_bias",
        "mlp_bias", "pretraining_tp", "sliding_window", "max_window_layers",
    ]
)
# Losses of training, and how many devices hold the experts.
_DEEPSEEK_HARMLESS = frozenset(
    [
        "auto_map", "aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits", "head_dim", "qk_head_dim",
        "num_key_value_heads", *LATENT_ATTENTION.values(), *EXPERTS.values(),
    ]
)
_OWN_HARMLESS = {
    "deepseek_v2": _DEEPSEEK_HARMLESS,
    # Modules that predict further tokens, which the model itself does not use: their weights are not read.
    "deepseek_v3": _DEEPSEEK_HARMLESS | {"num_nextn_predict_layers", "num_mtp_layers"},
    "gemma3_text": frozenset(
        ["cache_implementation", "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"]
    ),
    "phi3": frozenset(["resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "auto_map"]),
}
# What `rope_scaling` and `rope_parameters` may hold; another entry is one layer's own, or a scaling's we do not know.
_ROPE = frozenset(
    [
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings",
    ]
)
_LONG_ROPE = frozenset(["short_factor", "long_factor", "attention_factor"])
_YARN_ROPE = frozenset(["attention_factor", *YARN.values()])
# fmt: on
_GEMMA_CHOICES = {
    **_LLAMA_CHOICES,
    "mlp": "hidden_activation",
    "query_pre_attention_scalar": "query_pre_attn_scalar",
}


def their_names(family: str) -> dict[str, str]:
    """Our fields of a `DecoderConfig` and what a file of the family calls them."""
    if family == "gpt2":
        return {**GPT2_SIZES, **_GPT2_CHOICES}
    choices = _GEMMA_CHOICES if family == "gemma3_text" else _LLAMA_CHOICES
    return {**(DEEPSEEK_SIZES if family.startswith("deepseek") else LLAMA_SIZES), **choices}


def renamed(message: str, config: str, names: Mapping[str, str]) -> str:
    """An error of a config with the names that its fields have in a config.json."""
    return re.sub(rf"({config}\.)?\b({'|'.join(names)})\b", lambda match: names[match[2]], message)


def unsupported(family: str, causal_model: str, content: Mapping[str, Any]) -> list[str]:
    """Says of each field that changes what is computed, or may, that we do not compute it.

    Args:
      family: ``model_type``.
      causal_model: the family's model in `transformers`; the one without a head is known, too.
      content: the config.json.
    """
    gpt2 = family == "gpt2"
    of_kin = {"gpt2": _GPT2_ONLY, "gemma3_text": _GEMMA_ONLY}.get(family, _LLAMA_ONLY)
    only = {**_ANY_FAMILY, **of_kin, **_OWN_ONLY[family]}
    of_rope = _ROPE | {"phi3": _LONG_ROPE, "deepseek_v2": _YARN_ROPE, "deepseek_v3": _YARN_ROPE}.get(family, _ROPE)
    harmless = _OWN_HARMLESS.get(family, frozenset())
    found = [
        f"{name} = {content[name]!r:.80}: only {' or '.join(map(repr, values))} is supported"
        for name, values in only.items()
        if not _is_one_of(content.get(name, values[0]), values)
        and not (name in harmless and name not in _OWN_ONLY[family])
    ]
    found += _code(family, content)
    known = _HARMLESS | (_GPT2_HARMLESS if gpt2 else _LLAMA_HARMLESS) | only.keys() | set(their_names(family).values())
    known |= harmless
    found += [
        f"{name!s:.80} = {value!r:.80}: an unknown field, which may change what the model computes; take it out if it "
        "does not"
        for name, value in content.items()
        if name not in known and value is not None
    ]
    base = causal_model.replace("LMHeadModel", "Model").replace("ForCausalLM", "Model")
    entries = content.get("architectures") or []
    if not isinstance(entries, list) or any(entry not in (causal_model, base) for entry in entries):
        found.append(f"architectures = {entries!r:.80}: only {causal_model!r} and {base!r} are supported")
    for name in RATES:
        rate = content.get(name)
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 <= rate < 1):
            found.append(f"{name} = {rate!r:.80}: must be a rate in [0, 1)")
    for name in () if gpt2 else ("rope_scaling", "rope_parameters"):
        rope = content.get(name)
        if rope is not None and not isinstance(rope, Mapping):
            found.append(f"{name} = {rope!r:.80}: must be an object")
        elif family != "gemma3_text" and (unknown := sorted(set(rope or ()) - of_rope)):
            found.append(f"{name} has {', '.join(unknown):.80}: only {', '.join(sorted(of_rope))} are supported")
    return found


def _code(family: str, content: Mapping[str, Any]) -> list[str]:
    """Code that a checkpoint brings along, unless it is known to compute what `transformers` does."""
    own, known = content.get("auto_map"), _OWN_CODE.get(family)
    if own is None or known is None or (isinstance(own, Mapping) and own.items() <= known.items()):
        return []
    return [f"auto_map = {own!r:.80}: only {known} is known to compute what `transformers` does"]


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # In Python 0 is False and 1 is True; files that mix them up are read as their makers meant them.
    return any(value == one for one in values)
