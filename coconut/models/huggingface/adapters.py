"""Adapters as the files that PEFT writes and reads: ``adapter_config.json`` and ``adapter_model.safetensors``.

GPT-2 keeps query, key and value side by side in one matrix, ``attn.c_attn``, so an adapter there is one, too. Three
adapters of a rank are one of three times that rank: their ``A`` below each other, their ``B`` on the diagonal of a
block matrix. An adapter that PEFT trained there is three that share their ``A``.
"""

import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from coconut.errors import CoconutError
from coconut.hub import local_folder
from coconut.models.adapters import AdapterConfig, add_adapters, matrices_of
from coconut.models.decoder import Decoder
from coconut.models.huggingface.configuration import ADAPTER_FILE, family_of, read_json
from coconut.models.huggingface.files import DTYPES, Stored, read_header
from coconut.models.huggingface.names import EMBEDDING, Part, Tensor, canonical_name, tensors_of
from coconut.models.huggingface.save import new_folder
from coconut.models.parameters import decoder_parameters

LOG = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_NOTHING: Mapping[str, bytes] = MappingProxyType({})

# Fields that change what is computed -> the values under which it is what we compute. A field that is not there has
# the first of them.
_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "use_rslora": (False, True),
    # The others change the base, too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# Fields that say how the adapter was trained, or again what the tensors say. Any other must be empty.
_TOLD = (
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version", "runtime_config"),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("eva_config", "loftq_config", "megatron_core", "qalora_group_size"),
)


def save_adapter(
    decoder: Decoder,
    config: AdapterConfig,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    files: Mapping[str, bytes] = _NOTHING,
) -> None:
    """Writes the adapters of a decoder, and its trained rows, for PEFT.

    With them PEFT computes what the decoder does, on a base that is this decoder without them. Embedding rows that the
    base lacks must be trained rows; whoever loads the adapter resizes the base's embedding first.

    Args:
      decoder: the decoder.
      config: what `coconut.models.adapters.add_adapters` was told.
      folder: a folder that does not exist yet, or is empty.
      base: folder or repository of the base.
      files: further files by name, such as those of the tokenizer.

    Raises:
      CoconutError: the folder holds something, no architecture of `transformers` computes what the decoder does, the
        MLPs of a decoder with experts have adapters, or the disk refuses.
    """
    family, own = family_of(decoder.config), decoder_parameters(decoder)
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, list[str]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors_of(decoder.config, own).items():
        module = name.removesuffix(".weight")
        pairs = [_pair(part, own) for part in tensor.parts]
        if not any(pairs):
            continue
        blocks = len(pairs)
        if decoder.config.experts is not None and ".mlp." in module:
            raise CoconutError(
                f"{module}: PEFT takes adapters of this name for those of the experts, which have none; merge it "
                "(`merge_adapters`), or leave MLPs out of AdapterConfig.targets"
            )
        if blocks > 1:
            ranks[module] = blocks * config.rank
            alphas[module] = config.alpha * (math.sqrt(blocks) if config.rank_stabilized else blocks)
        modules.setdefault(_within_layer(module), []).append(module)
        tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"] = _joined(
            pairs, tensor, config.rank
        )
    # A name without its layer stands for that module in every layer.
    targets = [
        name
        for short, names in modules.items()
        for name in ([short] if len(names) == decoder.config.num_layers else names)
    ]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "bias": "none",
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": family == "gpt2",
    }
    if decoder.tokens.trained_rows is not None:
        content["trainable_token_indices"] = list(decoder.tokens.trained_ids)
        tensors[_PREFIX + EMBEDDING[family].removesuffix(".weight") + _ROWS] = np.asarray(own["tokens.trained_rows"])
    with new_folder(Path(folder)) as temporary:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, temporary / ADAPTER_WEIGHTS)
        (temporary / ADAPTER_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, data in files.items():
            (temporary / name).write_bytes(data)


class _Pair(NamedTuple):
    """An adapter of one matrix of ours: ``[D, rank]`` and ``[rank, F]``."""

    a: np.ndarray
    b: np.ndarray


def _pair(part: Part, own: Mapping[str, Any]) -> _Pair | None:
    module, _, leaf = part.parameter.rpartition(".")
    if leaf != "kernel" or f"{module}.lora_a" not in own:
        return None
    a, b = np.asarray(own[f"{module}.lora_a"]), np.asarray(own[f"{module}.lora_b"])
    return _Pair(a, b) if part.layer is None else _Pair(a[part.layer], b[part.layer])


def _joined(pairs: list[_Pair | None], tensor: Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's ``lora_A`` and ``lora_B``, outputs first; a part without an adapter has zeros in both."""
    first = next(pair for pair in pairs if pair is not None)
    outputs = tensor.shape[0] if tensor.transposed else tensor.shape[1]
    a = np.zeros((len(pairs) * rank, len(first.a)), first.a.dtype)
    b = np.zeros((outputs, len(pairs) * rank), first.b.dtype)
    for index, (pair, part) in enumerate(zip(pairs, tensor.parts, strict=True)):
        if pair is not None:
            block = slice(index * rank, (index + 1) * rank)
            a[block], b[part.outputs, block] = pair.a.T, pair.b.T
    return a, b


def load_adapter(
    path_or_repo: str | os.PathLike[str], decoder: Decoder, *, revision: str | None = None
) -> tuple[Decoder, AdapterConfig]:
    """A decoder with the adapter that PEFT, or `save_adapter`, wrote.

    Args:
      path_or_repo: a folder, or the id of a repository of the Hugging Face hub (which needs the extra ``[hf]``).
      decoder: the base, without adapters. It stays as it is.
      revision: branch, tag or commit of a repository.

    Returns:
      The decoder with the adapter, and the config that `coconut.models.adapters.add_adapters` would be told for one of
      its kind.

    Raises:
      CoconutError: no such folder, files that are missing or damaged, an adapter of another kind or another base, or
        one whose matrices differ in rank or scaling. The message names all that is wrong.
    """
    folder = local_folder(path_or_repo, revision, weights=True)
    problems: list[str] = []
    content = read_json(folder / ADAPTER_FILE, problems)
    stored = read_header(folder / ADAPTER_WEIGHTS, problems)
    loaded = None
    try:
        if not problems:
            loaded = _loaded(content, stored, decoder, problems)
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        # Whatever a value of an unforeseen type leads to; and what `AdapterConfig` refuses.
        problems.append(str(error) if isinstance(error, CoconutError) else f"{ADAPTER_FILE}: a wrong value: {error}")
    if loaded is None:
        base = content.get("base_model_name_or_path")
        lines = "\n  ".join(problems)
        raise CoconutError(f"{folder}, an adapter of {base!r:.80}, cannot be loaded:\n  {lines}")
    return loaded


def _loaded(
    content: Mapping[str, Any], stored: list[Stored], decoder: Decoder, problems: list[str]
) -> tuple[Decoder, AdapterConfig] | None:
    problems += _unsupported(content)
    family, own = family_of(decoder.config), decoder_parameters(decoder)
    tensors, rows, found = tensors_of(decoder.config, own), None, dict[str, dict[str, Stored]]()
    matrices = matrices_of(decoder)
    for one in stored:
        name = canonical_name(one.name.removeprefix(_PREFIX), family) or ""
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if one.dtype not in DTYPES:
            problems.append(f"tensor {one.name} has dtype {one.dtype}: only {', '.join(DTYPES)} are supported")
        elif name == EMBEDDING[family].removesuffix(".weight") + _ROWS:
            rows = one
        elif leaf not in ("lora_A", "lora_B") or not _adapted(tensors.get(f"{module}.weight"), matrices):
            problems.append(f"tensor {one.name} belongs to no matrix of this decoder's layers that has adapters here")
        else:
            found.setdefault(module, {})[leaf] = one
    pairs: dict[str, dict[int | None, _Pair]] = {}  # By our module, and by layer where layers are stacked.
    kinds: dict[tuple[int, float], str] = {}
    for module, pair in found.items():
        for part, own_pair, scaling in _split(module, pair, tensors[f"{module}.weight"], content, problems):
            pairs.setdefault(part.parameter.removesuffix(".kernel"), {})[part.layer] = own_pair
            # Of rounded scalings: that of three blocks goes through a root.
            kinds.setdefault((len(own_pair.b), float(f"{scaling:.12g}")), module)
    if len(kinds) > 1:
        problems.append(f"rank_pattern, alpha_pattern: {' and '.join(kinds.values())} differ in rank or in scaling")
    if not found:
        problems.append(f"{ADAPTER_WEIGHTS} holds no adapter")
    ids = _row_ids(content, rows, decoder, problems)
    if problems:
        return None
    ((rank, scaling),) = kinds
    stabilized = bool(content.get("use_rslora", False))
    alpha = scaling * (math.sqrt(rank) if stabilized else rank)
    dropout = float(content.get("lora_dropout", 0.0))
    if dropout and (taken_in := [name for name in pairs if not matrices[name].of_rows]):
        LOG.warning("%s: lora_dropout = %s is left out: %s can drop nothing here", ADAPTER_FILE, dropout, taken_in[0])
        dropout = 0.0
    config = AdapterConfig(
        rank=rank,
        alpha=content["lora_alpha"] if math.isclose(alpha, content["lora_alpha"], rel_tol=1e-9) else alpha,
        dropout=dropout,
        targets=_targets(pairs, decoder.config.num_layers),
        trained_rows=ids,
        rank_stabilized=stabilized,
    )
    abstract = jax.eval_shape(lambda: add_adapters(decoder, config, jax.random.key(0)))
    read: dict[str, np.ndarray] = {} if rows is None else {"tokens.trained_rows": rows.read()}
    for module, layers in pairs.items():
        for leaf in _Pair._fields:
            stacked = [getattr(layers[index], leaf) for index in sorted(index for index in layers if index is not None)]
            read[f"{module}.lora_{leaf}"] = np.stack(stacked) if stacked else getattr(layers[None], leaf)
    values = [
        own[name] if name in own else jnp.asarray(read[name], leaf.dtype)
        for name, leaf in decoder_parameters(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), values), config


def _unsupported(content: Mapping[str, Any]) -> Iterator[str]:
    """What an adapter's config says that we do not compute."""
    for name, value in content.items():
        known = _COMPUTED.get(name, (None, False, [], {}))
        if name not in _TOLD and not any(value == one and type(value) is type(one) for one in known):
            yield f"{ADAPTER_FILE}: {name} = {value!r:.80} is not supported"


def _adapted(tensor: Tensor | None, matrices: Collection[str]) -> bool:
    """Whether all that a tensor holds are matrices that may have an adapter: a router's and an expert's may not."""
    return tensor is not None and all(
        part.parameter.endswith(".kernel") and part.parameter.removesuffix(".kernel") in matrices
        for part in tensor.parts
    )


def _split(
    module: str, pair: Mapping[str, Stored], tensor: Tensor, content: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[Part, _Pair, float]]:
    """The adapter of one of their matrices as those of ours, each with its scaling."""
    rank, alpha = _told(module, "r", content), _told(module, "lora_alpha", content)
    inputs, outputs = tensor.shape[::-1] if tensor.transposed else tensor.shape
    for leaf, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
        if leaf not in pair:
            problems.append(f"tensor {module}.{leaf} is missing")
            return
        if pair[leaf].shape != shape:
            problems.append(f"tensor {pair[leaf].name} has shape {pair[leaf].shape}, here it would have {shape}")
            return
    a, b, parts = pair["lora_A"].read(), pair["lora_B"].read(), tensor.parts
    scaling = alpha / (math.sqrt(rank) if content.get("use_rslora", False) else rank)
    width = rank // len(parts)
    blocks = [slice(index * width, (index + 1) * width) for index in range(len(parts))]
    inside = np.zeros(b.shape, bool)
    for part, block in zip(parts, blocks, strict=True):
        inside[part.outputs, block] = True
    if rank == len(parts) * content["r"] and not b[~inside].any():
        for part, block in zip(parts, blocks, strict=True):
            if a[block].any() or b[part.outputs, block].any() or len(parts) == 1:
                yield part, _Pair(a[block].T, b[part.outputs, block].T), scaling
    else:
        for part in parts:
            yield part, _Pair(a.T, b[part.outputs].T), scaling


def _told(module: str, field: str, content: Mapping[str, Any]) -> Any:
    """The rank or the alpha of a module: that of the first name in the pattern which is its own, or ends it."""
    pattern = content.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[field]) or {}
    value = next((value for key, value in pattern.items() if f".{module}".endswith(f".{key}")), content[field])
    if isinstance(value, bool) or not isinstance(value, int if field == "r" else int | float) or not value > 0:
        raise CoconutError(f"{ADAPTER_FILE}: {field} = {value!r:.80} of {module} is no positive number")
    return value


def _row_ids(content: Mapping[str, Any], rows: Stored | None, decoder: Decoder, problems: list[str]) -> tuple[int, ...]:
    ids = content.get("trainable_token_indices") or []
    if isinstance(ids, dict) and len(ids) == 1:
        ((name, ids),) = ids.items()
        if not EMBEDDING[family_of(decoder.config)].removesuffix(".weight").endswith(name):
            problems.append(f"{ADAPTER_FILE}: trainable_token_indices are of {name!r:.80}, not of the embedding")
    if not isinstance(ids, list) or any(isinstance(x, bool) or not isinstance(x, int) for x in ids):
        problems.append(f"{ADAPTER_FILE}: trainable_token_indices = {ids!r:.80} must be ids")
        return ()
    there, here = None if rows is None else rows.shape, (len(ids), decoder.config.embed_dim) if ids else None
    if there != here:
        problems.append(f"trainable_token_indices: the rows have shape {there}, here they would have {here}")
    return tuple(ids)


def _targets(pairs: Mapping[str, Mapping[int | None, Any]], num_layers: int) -> tuple[str, ...]:
    """Patterns for matrices that have an adapter: one for all layers where all have it."""
    layers: dict[str, set[int]] = {}
    for module, own in pairs.items():
        _, first, rest = module.split(".", 2)
        indices = {int(first)} if None in own else {index for index in own if index is not None}
        layers.setdefault(rest if None in own else f"{first}.{rest}", set()).update(indices)
    return tuple(
        target
        for path, own in layers.items()
        for target in ([f"layers.*.{path}"] if len(own) == num_layers else [f"layers.{i}.{path}" for i in sorted(own)])
    )


def _within_layer(module: str) -> str:
    """``model.layers.3.self_attn.q_proj`` -> ``self_attn.q_proj``."""
    parts = module.split(".")
    return ".".join(parts[next(i for i, part in enumerate(parts) if part.isdecimal()) + 1 :])
