"""Which tensor of a checkpoint holds which of our parameters."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_args

from coconut.models.config import DecoderConfig, Family
from coconut.models.huggingface.configuration import family_of

# Their module -> ours; several of ours lie side by side in one of theirs.
_GPT2 = {
    "transformer.wte": ("tokens",),
    "transformer.wpe": ("positions",),
    "transformer.ln_f": ("norm",),
    "lm_head": ("head",),
}
_GPT2_LAYER = {
    "ln_1": ("attention_norm",),
    "ln_2": ("mlp_norm",),
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": ("attention.output",),
    "mlp.c_fc": ("mlp.up",),
    "mlp.c_proj": ("mlp.down",),
}
_LLAMA = {"model.embed_tokens": ("tokens",), "model.norm": ("norm",), "lm_head": ("head",)}
_LLAMA_LAYER = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("mlp_norm",),
    "self_attn.q_proj": ("attention.query",),
    "self_attn.k_proj": ("attention.key",),
    "self_attn.v_proj": ("attention.value",),
    "self_attn.o_proj": ("attention.output",),
    "self_attn.q_norm": ("attention.query_norm",),
    "self_attn.k_norm": ("attention.key_norm",),
    "mlp.up_proj": ("mlp.up",),
    "mlp.gate_proj": ("mlp.gate",),
    "mlp.down_proj": ("mlp.down",),
}
# Two norms behind attention and MLP, by the names that others' norms before them have.
_OLMO2_LAYER = {
    **{theirs: ours for theirs, ours in _LLAMA_LAYER.items() if not theirs.endswith("layernorm")},
    "post_attention_layernorm": ("attention_norm",),
    "post_feedforward_layernorm": ("mlp_norm",),
}
_GEMMA3_LAYER = {
    **{theirs: ours for theirs, ours in _LLAMA_LAYER.items() if not theirs.endswith("layernorm")},
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("attention_output_norm",),
    "pre_feedforward_layernorm": ("mlp_norm",),
    "post_feedforward_layernorm": ("mlp_output_norm",),
}
_PHI3_LAYER = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("mlp_norm",),
    "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
    "self_attn.o_proj": ("attention.output",),
    "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    "mlp.down_proj": ("mlp.down",),
}
# By what a layer has: queries of one matrix or of two, one MLP or experts.
_DEEPSEEK_LAYER = {
    **{theirs: ours for theirs, ours in _LLAMA_LAYER.items() if not theirs.startswith("self_attn")},
    "self_attn.q_proj": ("attention.query",),
    "self_attn.kv_a_proj_with_mqa": ("attention.latent",),
    "self_attn.kv_a_layernorm": ("attention.latent_norm",),
    "self_attn.kv_b_proj": ("attention.expansion",),
    "self_attn.o_proj": ("attention.output",),
    "mlp.gate": ("mlp.router",),
    **{f"mlp.shared_experts.{name}_proj": (f"mlp.shared.{name}",) for name in ("up", "gate", "down")},
}
_OF_EXPERTS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_TWO_QUERY_MATRICES = {
    "self_attn.q_a_proj": ("attention.query_latent",),
    "self_attn.q_a_layernorm": ("attention.query_norm",),
    "self_attn.q_b_proj": ("attention.query",),
}
# Beside those of its layer; embedding and head are the model's, and copies of them are not looked at.
_OF_FURTHER_TOKENS = {
    "enorm": "token_norm",
    "hnorm": "hidden_norm",
    "eh_proj": "joined",
    "shared_head.norm": "norm",
}
COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
_LAYERS = {"gemma3_text": _GEMMA3_LAYER, "gpt2": _GPT2_LAYER, "olmo2": _OLMO2_LAYER, "phi3": _PHI3_LAYER}
_LEAVES = {
    "embedding": "weight",
    "scale": "weight",
    "kernel": "weight",
    "bias": "bias",
    "correction": "e_score_correction_bias",
}

BASE: Mapping[Family, str] = MappingProxyType(
    {family: "transformer." if family == "gpt2" else "model." for family in get_args(Family)}
)
"""What stands before every name but the head's; files of the model without a head leave it out."""
HEAD = "lm_head.weight"
EMBEDDING: Mapping[Family, str] = MappingProxyType(
    {family: base + ("wte.weight" if family == "gpt2" else "embed_tokens.weight") for family, base in BASE.items()}
)
# Constants that older versions of `transformers` stored beside the parameters.
_CONSTANTS = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")
_OFFICIAL = "base_causallm."


@dataclasses.dataclass(frozen=True)
class Part:
    """The outputs of a tensor that are one of our parameters, or one layer of a stacked one, or one expert's.

    Attributes:
      parameter: its dotted path in the decoder.
      layer: index into its axis of layers, None where it has none.
      expert: index into its axis of experts, None where it has none.
      outputs: where they lie in the tensor: along its last axis, or its first where it is transposed.
    """

    parameter: str
    layer: int | None
    expert: int | None
    outputs: slice

    @property
    def index(self) -> tuple[int, ...]:
        """Indices into the first axes of the parameter."""
        return tuple(own for own in (self.layer, self.expert) if own is not None)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
      parts: what it holds, side by side along the axis of its outputs.
      shape: its shape.
      transposed: whether it holds its parts the other way around, outputs first.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    transposed: bool


def tensors_of(config: DecoderConfig, shapes: Mapping[str, Any], family: Family | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint of this config, by name, in the order of the layers.

    Args:
      config: the decoder's.
      shapes: our parameters or their abstract values by name, with layers one by one or stacked.
      family: whose names; None for those of the config's.

    Raises:
      CoconutError: no architecture of `transformers` is this config's.
    """
    family = family or family_of(config)
    one_by_one = any(name.startswith("layers.0.") for name in shapes)
    outer = _GPT2 if family == "gpt2" else _LLAMA
    layers = _layers(family)
    # (their module, our modules, index into stacked layers, index into experts)
    modules: list[tuple[str, tuple[str, ...], int | None, int | None]] = [
        (theirs, ours, None, None) for theirs, ours in outer.items()
    ]
    for index in range(config.num_layers):
        prefix, stacked = (f"layers.{index}", None) if one_by_one else ("layers", index)
        modules += [
            (f"{layers}.{index}.{theirs}", tuple(f"{prefix}.{name}" for name in ours), stacked, expert)
            for theirs, ours, expert in _of_layer(config, family, index)
        ]
    return _tensors(modules, shapes, family)


def multi_token_tensors(
    config: DecoderConfig, shapes: Mapping[str, Any], family: Family | None = None, *, under: str = ""
) -> dict[str, Tensor]:
    """The tensors of a module for further tokens, in the place of the layer behind the last; see `tensors_of`.

    Args:
      config: the decoder's.
      shapes: the module's parameters or their abstract values, by name.
      family: whose names; None for those of the config's.
      under: what stands before the names of ``shapes``.

    Raises:
      CoconutError: no architecture of `transformers` is this config's.
    """
    family = family or family_of(config)
    before = f"{_layers(family)}.{config.num_layers}"
    modules: list[tuple[str, tuple[str, ...], int | None, int | None]] = [
        (f"{before}.{theirs}", (under + ours,), None, None) for theirs, ours in _OF_FURTHER_TOKENS.items()
    ]
    modules += [
        (f"{before}.{theirs}", tuple(f"{under}layer.{name}" for name in ours), None, expert)
        for theirs, ours, expert in _of_layer(config, family, config.num_layers)
    ]
    return _tensors(modules, shapes, family)


def _tensors(
    modules: Iterable[tuple[str, tuple[str, ...], int | None, int | None]], shapes: Mapping[str, Any], family: Family
) -> dict[str, Tensor]:
    tensors = {}
    for theirs, ours, index, expert in modules:
        for leaf, their_leaf in _LEAVES.items():
            names = [f"{name}.{leaf}" for name in ours if f"{name}.{leaf}" in shapes]
            if names:
                before = (index is not None) + (expert is not None)
                own = [tuple(shapes[name].shape)[before:] for name in names]
                # torch's Linear keeps outputs first, GPT-2's Conv1D inputs first.
                transposed = leaf == "kernel" and (family != "gpt2" or theirs == "lm_head")
                tensors[f"{theirs}.{their_leaf}"] = _tensor(names, index, expert, own, transposed)
    return tensors


def _of_layer(config: DecoderConfig, family: Family, index: int) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """Their modules of a layer, ours, and which of ours' experts it is."""
    latent = config.latent_attention
    if latent is None:
        yield from ((theirs, ours, None) for theirs, ours in _LAYERS.get(family, _LLAMA_LAYER).items())
        return
    names = dict(_DEEPSEEK_LAYER)
    if latent.query_latent_dim is not None:
        del names["self_attn.q_proj"]
        names |= _TWO_QUERY_MATRICES
    of_experts = config.experts is not None and config.mlp_of(index) == "experts"
    for theirs, ours in names.items():
        if not (of_experts and theirs in _OF_EXPERTS):
            yield theirs, ours, None
    if config.experts is not None and of_experts:
        for expert in range(config.experts.count):
            for theirs in _OF_EXPERTS:
                yield theirs.replace("mlp.", f"mlp.experts.{expert}."), names[theirs], expert


def _tensor(
    names: list[str], index: int | None, expert: int | None, shapes: list[tuple[int, ...]], transposed: bool
) -> Tensor:
    parts, start = [], 0
    for name, shape in zip(names, shapes, strict=True):
        parts.append(Part(name, index, expert, slice(start, start + shape[-1])))
        start += shape[-1]
    whole = (*shapes[0][:-1], start)
    return Tensor(tuple(parts), whole[::-1] if transposed else whole, transposed)


def _layers(family: Family) -> str:
    return "transformer.h" if family == "gpt2" else "model.layers"


def layer_of(name: str, family: Family) -> str | None:
    """The number of the layer that a tensor of this canonical name belongs to; None for one of no layer."""
    before, _, after = name.partition(f"{_layers(family)}.")
    number = after.partition(".")[0]
    return number if not before and number.isdecimal() else None


_PREDICTING = re.compile(r"^(?:model\.layers|transformer\.h)\.(\d+)\.eh_proj\.weight$")


def predicting_layers(names: Iterable[str]) -> frozenset[str]:
    """The numbers of the layers that are modules for predicting further tokens, and none of the decoder's."""
    return frozenset(found[1] for name in names if (found := _PREDICTING.match(name)))


def is_of_router(name: str) -> bool:
    """Whether a tensor of this name is a router's, which stays in float32 beside others of narrower dtypes."""
    return name.endswith((".mlp.gate.weight", ".mlp.gate.e_score_correction_bias"))


def canonical_name(stored: str, family: Family) -> str | None:
    """The name `tensors_of` knows a stored tensor by; None for a constant, which is not read.

    Understood are names without the base model's prefix, and those of the official Coconut checkpoints, which hold the
    token embedding a second time.
    """
    name = stored.removeprefix(_OFFICIAL)
    if _CONSTANTS.search(name):
        return None
    if name == "embedding.weight":
        return EMBEDDING[family]
    if name.startswith(BASE[family]) or name == HEAD:
        return name
    return BASE[family] + name
