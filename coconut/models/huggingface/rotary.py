"""Rotary wavelengths: between the fields of a ``config.json`` and ours."""

import math
from collections.abc import Mapping
from typing import Any

from coconut.errors import CoconutError
from coconut.models.config import DecoderConfig
from coconut.models.huggingface.deepseek import is_deepseek, yarn_choices, yarn_json
from coconut.models.huggingface.fields import renamed
from coconut.models.latent_config import YarnRotaryScaling
from coconut.models.rotary_config import LinearRotaryScaling, LongRotaryScaling, RotaryScaling

_ROTARY_SCALING = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
LONG_ROTARY_SCALING = {
    "short_factors": "short_factor",
    "long_factors": "long_factor",
    "original_positions": "original_max_position_embeddings",
    "attention_factor": "attention_factor",
}


def rotary_choices(family: str, content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Base and scaling, from `transformers` 5's ``rope_parameters`` or from the older two fields.

    Where a file has both, ``rope_scaling`` counts and nothing of the other, as in `transformers`.
    """
    rope = content.get("rope_scaling") or content.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}  # What is no object has been said by `unsupported`.
    kind = rope.get("rope_type", rope.get("type", "default"))
    choices = {"rotary_base": rope.get("rope_theta", content.get("rope_theta", 10_000.0))}
    fraction = rope.get("partial_rotary_factor", content.get("partial_rotary_factor"))
    if family == "phi3" and fraction is not None:
        choices["rotary_fraction"] = fraction
    elif fraction not in (None, 1.0):
        problems.append(f"partial_rotary_factor = {fraction!r}: only 1.0 is supported")
    # Phi's files call it by three names; `transformers` takes the other two for this one, too.
    if family == "phi3" and kind in ("longrope", "su", "yarn"):
        return choices | _long_rotary_choices(content, rope, problems)
    if is_deepseek(family) and kind == "yarn":
        return choices | yarn_choices(rope, problems)
    if kind == "llama3" and family != "phi3" and not is_deepseek(family):
        names = tuple(_ROTARY_SCALING.values())
        if missing := [name for name in names if name not in rope]:
            problems.append(f"the rotary scaling lacks {', '.join(missing)}")
            return choices
        factor, low, high, original = (rope[name] for name in names)
        try:
            choices["rotary_scaling"] = RotaryScaling(
                factor=factor, low_frequency_factor=low, high_frequency_factor=high, original_positions=original
            )
        except CoconutError as error:
            problems.append(renamed(str(error), "RotaryScaling", _ROTARY_SCALING))
    elif kind != "default":
        other = "yarn" if is_deepseek(family) else "longrope" if family == "phi3" else "llama3"
        problems.append(f"rotary scaling of type {kind!r}: only 'default' and {other!r} are supported")
    return choices


def _long_rotary_choices(content: Mapping[str, Any], rope: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """LongRoPE's factors, and no more positions than those of the short ones: see `LongRotaryScaling`."""
    if missing := [name for name in ("short_factor", "long_factor") if not isinstance(rope.get(name), list)]:
        problems.append(f"the rotary scaling lacks {', '.join(missing)}")
        return {}
    longest = content.get("max_position_embeddings")
    # As in `transformers` not that of `rope`; and this, where the file does not say.
    original = content.get("original_max_position_embeddings", 4096)
    if type(longest) is not int or type(original) is not int or original < 2 or longest < 1:
        problems.append(
            f"original_max_position_embeddings = {original!r:.80}, max_position_embeddings = {longest!r:.80}"
        )
        return {}
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        factor = rope.get("factor")
        factor = longest / original if factor is None else factor
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    try:
        scaling = LongRotaryScaling(
            short_factors=tuple(rope["short_factor"]),
            long_factors=tuple(rope["long_factor"]),
            original_positions=original,
            attention_factor=attention_factor,
        )
    except CoconutError as error:
        problems.append(renamed(str(error), "LongRotaryScaling", LONG_ROTARY_SCALING))
        return {}
    return {"rotary_scaling": scaling, "max_positions": min(longest, original)}


def rotary_json(config: DecoderConfig) -> dict[str, Any] | None:
    """The rotary scaling as `transformers` has it; None for none."""
    scaling = config.rotary_scaling
    if scaling is None:
        return None
    if isinstance(scaling, LinearRotaryScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, YarnRotaryScaling):
        return yarn_json(scaling)
    if isinstance(scaling, LongRotaryScaling):
        fields = {their: getattr(scaling, name) for name, their in LONG_ROTARY_SCALING.items()}
        return {"rope_type": "longrope", **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}
    return {"rope_type": "llama3", **{their: getattr(scaling, name) for name, their in _ROTARY_SCALING.items()}}
