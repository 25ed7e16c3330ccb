"""Which tensor of a checkpoint holds which of our parameters."""

import dataclasses
import re
from collections.abc import Mapping
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
_PHI3_LAYER = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("mlp_norm",),
    "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
    "self_attn.o_proj": ("attention.output",),
    "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    "mlp.down_proj": ("mlp.down",),
}
_LAYERS = {"gpt2": _GPT2_LAYER, "olmo2": _OLMO2_LAYER, "phi3": _PHI3_LAYER}
_LEAVES = {"embedding": "weight", "scale": "weight", "kernel": "weight", "bias": "bias"}

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
    """The outputs of a tensor that are one of our parameters, or one layer of a stacked one.

    Attributes:
      parameter: its dotted path in the decoder.
      layer: index into its first axis, None for all of it.
      outputs: where they lie in the tensor: along its last axis, or its first where it is transposed.
    """

    parameter: str
    layer: int | None
    outputs: slice


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
    outer, layer = _GPT2 if family == "gpt2" else _LLAMA, _LAYERS.get(family, _LLAMA_LAYER)
    layers = _layers(family)
    # (their module, our modules, index into stacked layers)
    modules = [(theirs, ours, None) for theirs, ours in outer.items()]
    for index in range(config.num_layers):
        prefix, stacked = (f"layers.{index}", None) if one_by_one else ("layers", index)
        modules += [
            (f"{layers}.{index}.{theirs}", tuple(f"{prefix}.{name}" for name in ours), stacked)
            for theirs, ours in layer.items()
        ]
    tensors = {}
    for theirs, ours, index in modules:
        for leaf, their_leaf in _LEAVES.items():
            names = [f"{name}.{leaf}" for name in ours if f"{name}.{leaf}" in shapes]
            if names:
                own = [tuple(shapes[name].shape)[0 if index is None else 1 :] for name in names]
                # torch's Linear keeps outputs first, GPT-2's Conv1D inputs first.
                transposed = leaf == "kernel" and (family != "gpt2" or theirs == "lm_head")
                tensors[f"{theirs}.{their_leaf}"] = _tensor(names, index, own, transposed)
    return tensors


def _tensor(names: list[str], index: int | None, shapes: list[tuple[int, ...]], transposed: bool) -> Tensor:
    parts, start = [], 0
    for name, shape in zip(names, shapes, strict=True):
        parts.append(Part(name, index, slice(start, start + shape[-1])))
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
