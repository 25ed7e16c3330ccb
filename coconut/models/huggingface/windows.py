"""Layers that look back through a window: between the fields of a ``config.json`` and ours."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from coconut.errors import CoconutError
from coconut.models.config import MOST_LAYERS, DecoderConfig
from coconut.models.huggingface.fields import renamed
from coconut.models.local_config import LayerType, LocalAttentionConfig

_TYPES: Mapping[str, LayerType] = {"full_attention": "global", "sliding_attention": "local"}
_EVERY_LAYER = ("mistral", "phi3")
"""Families whose window is that of all layers."""
_BY_LAYER = ("gemma3_text", "qwen2", "qwen3")
"""Those whose ``layer_types`` say which layers have it."""
_UNSAID: Mapping[str, int | None] = MappingProxyType(
    {"gemma3_text": 4096, "mistral": 4096, "phi3": None, "qwen2": 4096, "qwen3": 4096}
)
"""The window that a file means to `transformers` which has no field of it."""
_NAMES = {"window": "sliding_window", "pattern": "layer_types", "rotary_base": "rope_local_base_freq"}


def window_choices(family: str, content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Which layers of a config.json look back through a window; what is wrong is added to ``problems``.

    A window that no row is longer than is none, unless its layers have wavelengths of their own (Gemma 3).
    """
    before = len(problems)
    pattern = _pattern(family, content, problems)
    if len(problems) > before:
        return {}
    if family not in _UNSAID:
        problems += _refused(content) if family in ("llama", "olmo2") else []
        return {}
    window = content.get("sliding_window", _UNSAID[family])
    if "local" not in pattern or (window is None and family != "gemma3_text"):
        return {}
    if type(window) is not int or window < 1:
        problems.append(f"sliding_window = {window!r:.80}: must be at least 1, for layers that look through it")
        return {}
    longest = content.get("max_position_embeddings")
    if family != "gemma3_text" and type(longest) is int and window >= longest:
        return {}
    try:
        local = LocalAttentionConfig(window=window, pattern=pattern, **_own_rotary(family, content))
    except CoconutError as error:
        problems.append(renamed(str(error), "LocalAttentionConfig", _NAMES))
        return {}
    return {"local_attention": local.shortest()}


def _pattern(family: str, content: Mapping[str, Any], problems: list[str]) -> tuple[LayerType, ...]:
    """Which layers are local, from the first; the rest repeats it."""
    types, layers = content.get("layer_types"), content.get("num_hidden_layers")
    if types is not None:
        return _checked(family, content, types, layers, problems)
    if family in _EVERY_LAYER:
        return ("local",)
    if type(layers) is not int or layers > MOST_LAYERS:
        return ()  # The decoder's config says so.
    if family == "gemma3_text":
        every = content.get("sliding_window_pattern", 6)
        if type(every) is not int or every < 1:
            problems.append(f"sliding_window_pattern = {every!r:.80}: must be at least 1")
            return ()
        if content.get("_sliding_window_pattern") not in (None, every):
            problems.append(
                f"_sliding_window_pattern = {content['_sliding_window_pattern']!r:.80}: `transformers` takes {every} "
                "where a file has no layer_types"
            )
        return tuple("global" if (layer + 1) % every == 0 else "local" for layer in range(layers))
    if family in _BY_LAYER and content.get("use_sliding_window"):
        first = content.get("max_window_layers", 28)
        if type(first) is not int:
            problems.append(f"max_window_layers = {first!r:.80}: must be a number of layers")
            return ()
        return tuple("local" if layer >= first else "global" for layer in range(layers))
    return ()


def _checked(
    family: str, content: Mapping[str, Any], types: Any, layers: Any, problems: list[str]
) -> tuple[LayerType, ...]:
    """The pattern that ``layer_types`` say."""
    if not isinstance(types, list) or not all(isinstance(one, str) for one in types):
        problems.append(f"layer_types = {types!r:.80}: must be a list of names")
        return ()
    known = list(_TYPES) if family in _BY_LAYER else ["full_attention"]
    if other := sorted(set(types) - set(known)):
        are = "are" if len(known) > 1 else "is"
        problems.append(
            f"layer_types has {', '.join(map(repr, other)):.80}: only {' and '.join(map(repr, known))} {are} supported"
        )
        return ()
    if type(layers) is int and len(types) != layers:
        problems.append(f"layer_types = {types!r:.80}: has {len(types)} layers, and num_hidden_layers = {layers}")
        return ()
    if family in _EVERY_LAYER:
        return ("local",)  # They do not look at it.
    if family.startswith("qwen") and "sliding_attention" in types and not content.get("use_sliding_window"):
        problems.append(
            "layer_types has 'sliding_attention', but use_sliding_window = "
            f"{content.get('use_sliding_window', False)!r:.80} says that no layer looks through a window"
        )
        return ()
    return tuple(_TYPES[one] for one in types)


def _refused(content: Mapping[str, Any]) -> list[str]:
    """A window in a file of a family that has none, which some row could be longer than."""
    window, longest = content.get("sliding_window"), content.get("max_position_embeddings")
    if window is None or (type(window) is int and type(longest) is int and window >= longest):
        return []
    return [
        f"sliding_window = {window!r:.80}: only None is supported, or one that is no shorter than "
        "max_position_embeddings: models of this family look back on everything"
    ]


def _own_rotary(family: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Of Gemma 3, the base of the local layers' wavelengths."""
    if family != "gemma3_text":
        return {}
    rope = content.get("rope_parameters")
    rope = rope.get("sliding_attention") if isinstance(rope, Mapping) else None
    rope = rope if isinstance(rope, Mapping) else {}  # What is no object, `gemma_choices` says.
    return {"rotary_base": rope.get("rope_theta", content.get("rope_local_base_freq", 10_000.0))}


# --- The way back -----------------------------------------------------------------------------------------------


def windows_that_fit(family: str, config: DecoderConfig) -> Any:
    """What a decoder's local layers must be for a family to compute what it does; see `family_of`."""
    local = config.local_attention
    if local is None or family == "gemma3_text":
        return local
    if family not in (*_EVERY_LAYER, *_BY_LAYER):
        return None
    if local.rotary_base is not None or (family in _EVERY_LAYER and not local.alike):
        return "local layers alone" if family in _EVERY_LAYER else "without rotary_base"
    return local


def window_json(family: str, config: DecoderConfig) -> dict[str, Any]:
    """The fields that say which layers look back through a window."""
    local = config.local_attention
    if family in _EVERY_LAYER:
        return {"sliding_window": None if local is None else local.window}  # What is not there may mean 4096.
    if family not in _BY_LAYER or (local is None and family != "gemma3_text"):
        return {}
    names = {ours: theirs for theirs, ours in _TYPES.items()}
    kinds: list[LayerType] = ["local" if config.is_local(layer) else "global" for layer in range(config.num_layers)]
    content: dict[str, Any] = {"layer_types": [names[kind] for kind in kinds]}
    if local is not None:
        content["sliding_window"] = local.window
    if family != "gemma3_text":
        content["use_sliding_window"] = True
    return content
