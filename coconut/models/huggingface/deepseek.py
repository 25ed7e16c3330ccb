"""DeepSeek V2 and V3: between the fields of their ``config.json`` and ours."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from coconut.errors import CoconutError
from coconut.models.config import DecoderConfig
from coconut.models.experts_config import ExpertsConfig
from coconut.models.huggingface.fields import EXPERTS, LATENT_ATTENTION, YARN, renamed
from coconut.models.latent_config import LatentAttentionConfig, YarnRotaryScaling

ROUTERS: Mapping[str, Any] = MappingProxyType({"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"})
"""Family -> the router it has."""
# What may be left out: a null in a file means that there is none of it, and so does nothing at all.
_OPTIONAL = ("rope_interleave", "n_group", "topk_group", "norm_topk_prob")


def is_deepseek(family: str) -> bool:
    """Whether a family's layers have latent attention and experts."""
    return family in ROUTERS


def deepseek_choices(family: str, content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Latent attention and experts of a config.json; what is wrong is added to ``problems``."""
    wanted = [*LATENT_ATTENTION.values(), *EXPERTS.values()]
    if missing := [name for name in wanted if name not in content and name not in _OPTIONAL]:
        problems.append(f"{', '.join(missing)}: missing")
        return {}
    _check_derived(content, problems)
    first, layers = content["first_k_dense_replace"], content.get("num_hidden_layers")
    if type(first) is int and type(layers) is int and first >= layers:
        problems.append(f"first_k_dense_replace = {first}: must be less than num_hidden_layers = {layers}")
    sizes = {name: content.get(their) for name, their in LATENT_ATTENTION.items()}
    sizes["interleaved"] = True if family == "deepseek_v2" else _said(content, "rope_interleave", True)
    experts = {name: content.get(their) for name, their in EXPERTS.items()}
    experts["normalized"] = family == "deepseek_v3" and _said(content, "norm_topk_prob", True)
    if content.get("n_shared_experts") == 0:
        problems.append("n_shared_experts = 0: must be at least 1")
    if family == "deepseek_v2" and content.get("topk_method", "greedy") == "greedy":
        experts |= {"groups": 1, "groups_chosen": 1}  # Whatever the file says.
    return {
        **_made(LatentAttentionConfig, sizes, "latent_attention", LATENT_ATTENTION, problems),
        **_made(ExpertsConfig, {**experts, "router": ROUTERS[family]}, "experts", EXPERTS, problems),
    }


def _check_derived(content: Mapping[str, Any], problems: list[str]) -> None:
    """Fields that `transformers` makes of others, where a file has them."""
    plain, turning = content["qk_nope_head_dim"], content["qk_rope_head_dim"]
    both = plain + turning if type(plain) is int and type(turning) is int else None
    heads = content.get("num_attention_heads")
    for name, value in (("head_dim", turning), ("qk_head_dim", both), ("num_key_value_heads", heads)):
        if content.get(name) not in (None, value):
            problems.append(f"{name} = {content[name]!r:.80}: only None or {value!r:.80} is supported here")


def _said(content: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """A field that is not None, or what `transformers` takes where a file does not have it."""
    value = content.get(name, otherwise)
    return False if value is None else value


def yarn_choices(rope: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The rotary scaling of a file whose ``rope_type`` is ``yarn``; what is wrong is added to ``problems``."""
    if missing := [name for name in ("factor", "original_max_position_embeddings") if rope.get(name) is None]:
        problems.append(f"the rotary scaling lacks {', '.join(missing)}")
        return {}
    if rope.get("attention_factor") is not None:
        problems.append(f"attention_factor = {rope['attention_factor']!r:.80}: only None is supported")
    # As in `transformers`: 0 is no number of turns, and means the usual one.
    usual = {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
    given = {name: rope[their] for name, their in YARN.items() if their in rope}
    return _made(YarnRotaryScaling, given | usual, "rotary_scaling", YARN, problems)


def _made(kind: Any, values: dict[str, Any], field: str, names: Mapping[str, str], problems: list[str]) -> dict:
    try:
        return {field: kind(**values)}
    except CoconutError as error:
        problems.append(renamed(str(error), kind.__name__, names))
        return {}


# --- The way back -----------------------------------------------------------------------------------------------


def deepseek_fields(family: str, config: DecoderConfig, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder's config must say for a family to compute what it does; see `family_of`."""
    latent, experts = config.latent_attention, config.experts
    fits = experts is not None and experts.router == ROUTERS[family] and experts.shared > 0
    turns = latent is not None and (latent.interleaved or family == "deepseek_v3")
    return {
        **plain,
        "mixer": "latent_attention",
        "latent_attention": latent if turns else "interleaved pairs",
        "experts": experts if fits else f"of a {ROUTERS[family]} router, some of them shared",
        # `transformers` refuses others, although they mean nothing here.
        "embed_dim": config.embed_dim // config.num_heads * config.num_heads,
        "rotary_scaling": config.rotary_scaling,
        "query_key_norm": False,
        "output_bias": config.qkv_bias,
        "mlp_bias": False,
    }


def deepseek_json(family: str, config: DecoderConfig) -> dict[str, Any]:
    """The fields that the family has beside those of Llama."""
    latent, experts = config.latent_attention, config.experts
    assert latent is not None and experts is not None
    content = {their: getattr(latent, name) for name, their in LATENT_ATTENTION.items()}
    content |= {their: getattr(experts, name) for name, their in EXPERTS.items()}
    content |= {"head_dim": latent.rotary_dim, "attention_bias": config.qkv_bias}
    content["num_key_value_heads"] = config.num_heads  # What is not there means 128 to V3.
    if family == "deepseek_v2":
        del content["rope_interleave"]
        content["topk_method"] = "greedy" if experts.groups == 1 else "group_limited_greedy"
    else:
        content["num_nextn_predict_layers"] = 0  # Their weights are not read, and so there are none to write.
    return content


def yarn_json(scaling: YarnRotaryScaling) -> dict[str, Any]:
    """The rotary scaling as `transformers` has it; what is None is left out."""
    values = {their: getattr(scaling, name) for name, their in YARN.items()}
    return {"rope_type": "yarn", **{name: value for name, value in values.items() if value is not None}}
