"""Decoders as checkpoints that `transformers` reads."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from coconut.errors import CoconutError
from coconut.models.adapters import is_adapter
from coconut.models.decoder import Decoder
from coconut.models.huggingface.configuration import CONFIG_FILE, config_json
from coconut.models.huggingface.files import INDEX, WEIGHTS
from coconut.models.huggingface.names import Tensor, multi_token_tensors, tensors_of
from coconut.models.multi_token import MULTI_TOKEN, MultiToken
from coconut.models.parameters import decoder_parameters, parameters_by_name

_NOTHING: Mapping[str, Any] = MappingProxyType({})


PARTS_FILE = "coconut_parts.safetensors"
"""Holds the parameters of a model beside its decoder's, which `transformers` does not look at."""


def save_pretrained(
    decoder: Decoder,
    folder: str | os.PathLike[str],
    *,
    config_fields: Mapping[str, Any] = _NOTHING,
    files: Mapping[str, bytes] = _NOTHING,
    max_shard_bytes: int = 2 * 10**9,
    multi_token: MultiToken | None = None,
) -> None:
    """Writes a decoder as a checkpoint in Hugging Face's layout.

    The folder appears under its name when it is complete. The host holds one file's tensors at a time.

    Args:
      decoder: the decoder. Its parameters are written in their own dtype.
      folder: a folder that does not exist yet, or is empty.
      config_fields: further fields of config.json that do not describe the decoder, such as ``eos_token_id``.
      files: further files by name, such as those of the tokenizer.
      max_shard_bytes: size from which weights are split into several files, each at most so large where no single
        tensor is larger.
      multi_token: a module for further tokens, which is written as the layer behind the last.

    Raises:
      CoconutError: the folder holds something, no architecture of `transformers` computes what the decoder does, a
        field or a file of the caller's collides with ours, parameters lie on other hosts, or the disk refuses.
    """
    folder = Path(folder).absolute()
    config = config_json(decoder.config)
    parameters = decoder_parameters(decoder)
    tensors = tensors_of(decoder.config, parameters)
    if multi_token is not None:
        own = {f"{MULTI_TOKEN}.{name}": value for name, value in parameters_by_name(multi_token).items()}
        tensors |= multi_token_tensors(decoder.config, own, under=f"{MULTI_TOKEN}.")
        parameters |= own
        if config["model_type"] == "deepseek_v3":
            config["num_nextn_predict_layers"] = 1
    _check(folder, config, config_fields, files, max_shard_bytes, parameters)
    shards = _split(tensors, parameters, max_shard_bytes)
    with new_folder(folder) as temporary:
        weight_map = {}
        for index, names in enumerate(shards, start=1):
            file = WEIGHTS if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            # "pt" tells `transformers` that matrices lie as torch has them.
            save_file({name: gather(tensors[name], parameters) for name in names}, temporary / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(_size(tensor, parameters) for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        content = {**config, **config_fields}
        (temporary / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, data in files.items():
            (temporary / name).write_bytes(data)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which appears under its name when it is complete.

    Raises:
      CoconutError: a folder of that name holds something, or what is done in it fails.
    """
    folder = folder.absolute()
    _check_folder(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(folder)
    except Exception as error:
        raise CoconutError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CoconutError(f"{folder} exists, and is no empty folder")


def _check(
    folder: Path,
    config: Mapping[str, Any],
    config_fields: Mapping[str, Any],
    files: Mapping[str, bytes],
    max_shard_bytes: int,
    parameters: Mapping[str, Array],
) -> None:
    _check_folder(folder)
    if adapters := [name for name in parameters if is_adapter(name)]:
        raise CoconutError(f"{adapters[0]}: the decoder has adapters, merge them first (`merge_adapters`)")
    if taken := sorted(name for name in config_fields if config.get(name) is not None):
        raise CoconutError(f"config_fields: the decoder's own config says what {', '.join(taken)} are")
    weights = [name for name in files if name.endswith(".safetensors") and name != PARTS_FILE]
    reserved = [*weights, *(name for name in files if name in (CONFIG_FILE, INDEX))]
    if wrong := sorted({*reserved, *(name for name in files if name != Path(name).name or not name.strip("."))}):
        raise CoconutError(f"files: {', '.join(wrong)} are names of our own, or no plain file names")
    if max_shard_bytes < 1:
        raise CoconutError(f"max_shard_bytes = {max_shard_bytes}: must be at least 1")
    if elsewhere := [name for name, array in parameters.items() if not array.is_fully_addressable]:
        raise CoconutError(f"{elsewhere[0]} and {len(elsewhere) - 1} more lie on other hosts: gather them first")


def _size(tensor: Tensor, parameters: Mapping[str, Array]) -> int:
    return int(np.prod(tensor.shape)) * parameters[tensor.parts[0].parameter].dtype.itemsize


def _split(tensors: Mapping[str, Tensor], parameters: Mapping[str, Array], max_bytes: int) -> list[list[str]]:
    """The names each file holds, in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = _size(tensor, parameters)
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def gather(tensor: Tensor, parameters: Mapping[str, Array]) -> np.ndarray:
    """A tensor as a checkpoint stores it, of `decoder_parameters` or of anything of their shapes (gradients)."""
    parts = []
    for part in tensor.parts:
        array = parameters[part.parameter]
        value = np.asarray(array[part.index])
        parts.append(value.T if tensor.transposed else value)
    # Contiguous: safetensors writes memory as it lies, whatever the strides say.
    axis = 0 if tensor.transposed else -1
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis))
