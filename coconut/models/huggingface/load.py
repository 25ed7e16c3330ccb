"""Checkpoints of `transformers` as decoders, one tensor at a time."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from coconut.errors import CoconutError
from coconut.hub import local_folder
from coconut.models.config import DecoderConfig, ExecutionConfig, Family
from coconut.models.decoder import Decoder
from coconut.models.huggingface.configuration import CONFIG_FILE, described_config, family_of, read_config
from coconut.models.huggingface.fields import their_names
from coconut.models.huggingface.files import DTYPES, Stored, equal, stored_tensors, widest_dtype
from coconut.models.huggingface.names import (
    COPIES,
    EMBEDDING,
    HEAD,
    Tensor,
    canonical_name,
    is_of_router,
    layer_of,
    multi_token_tensors,
    predicting_layers,
    tensors_of,
)
from coconut.models.multi_token import MultiToken
from coconut.models.parameters import (
    abstract_decoder,
    decoder_of,
    decoder_parameters,
    parameter_axes,
    parameters_by_name,
)
from coconut.sharding import Axes, parameter_sharding

# What a caller may choose; in everything else a config must say what config.json says.
_CHOICES = (
    "max_positions",
    "embedding_stddev",
    "kernel_stddev",
    "offset_bias",
    "dropout",
    "param_dtype",
    "family",
)


def load_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    config: DecoderConfig | None = None,
    execution: ExecutionConfig | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> Decoder:
    """A decoder with the weights of a checkpoint in Hugging Face's layout.

    Tensors are read one at a time and go straight to their place: beside the result, the host holds a few copies of
    one tensor.

    Args:
      path_or_repo: a folder with ``config.json`` and safetensors, or the id of a repository of the Hugging Face hub
        (which needs the extra ``[hf]``).
      config: a decoder of this architecture, such as a preset, for choices that config.json does not make:
        ``param_dtype``, dropout, fewer positions (with rotary ones). None for parameters in the dtype of the files.
      execution: how the decoder is run; None for layers one by one that compute in the dtype of the parameters.
      mesh: devices to put the parameters on (`coconut.sharding`); None for the default device. A vocabulary that it
        does not divide is not split: training wants it resized (`coconut.models.vocabulary`).
      dtype: dtype of parameters and activations, whatever the configs or the files say.
      revision: branch, tag or commit of a repository.

    Returns:
      The decoder; its ``config`` is the architecture.

    Raises:
      CoconutError: no such folder or repository, or anything about it that does not fit: an architecture or a field
        that is not supported, files that are missing, damaged or pickles, tensors that are missing, unknown,
        misshapen or no floats, a ``config`` that says otherwise. The message names them all.
    """
    folder = local_folder(path_or_repo, revision, weights=True)
    problems: list[str] = []
    described = described_config(folder, problems)
    stored = stored_tensors(folder, problems)
    family = None if described is None else family_of(described)
    if described is not None:
        if config is not None:
            described = _merge(described, config, problems)
            kept = described.param_dtype
        else:
            floats = [tensor for tensor in stored if tensor.dtype in DTYPES and not is_of_router(tensor.name)]
            kept = widest_dtype(floats) if floats else "float32"
        described = dataclasses.replace(described, param_dtype=dtype or kept)
        if execution is None:
            execution = ExecutionConfig(dtype=described.param_dtype)
        elif dtype is not None:
            execution = dataclasses.replace(execution, dtype=dtype)
    return _load(folder, described, execution, stored, problems, mesh, family)


def agreed_config(path_or_repo: str | os.PathLike[str], config: DecoderConfig) -> DecoderConfig:
    """``config`` with the vocabulary and the family of a checkpoint, whose weights are not looked at.

    Raises:
      CoconutError: `load_pretrained` would refuse the checkpoint's config.json, or ``config`` beside it; the message
        names all that differs.
    """
    folder = local_folder(path_or_repo)
    problems: list[str] = []
    agreed = _merge(read_config(folder), config, problems)
    if problems:
        raise CoconutError(f"{folder}: " + "; ".join(problems))
    return agreed


def load_weights(
    folder: Path,
    config: DecoderConfig,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - immutable
    *,
    mesh: Mesh | None = None,
) -> Decoder:
    """`load_pretrained` for a folder without a config.json.

    Raises:
      CoconutError: the files or their tensors do not fit ``config``; the message names all that does not.
    """
    problems: list[str] = []
    return _load(folder, config, execution, stored_tensors(folder, problems), problems, mesh, family_of(config))


def load_multi_token(
    path_or_repo: str | os.PathLike[str],
    like: MultiToken,
    *,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> MultiToken | None:
    """The module for further tokens of a checkpoint, the layer behind its last; None where it has none.

    Args:
      path_or_repo: see `load_pretrained`.
      like: a module of the same decoder, which may be abstract: what it is, and the dtypes of its parameters.
      mesh: devices to put the parameters on; None for the default device.
      revision: branch, tag or commit of a repository.

    Raises:
      CoconutError: no such folder or repository, or the module's tensors do not fit; the message names them all.
    """
    folder = local_folder(path_or_repo, revision, weights=True)
    problems: list[str] = []
    config, own = like.config, stored_tensors(folder, problems)
    family = family_of(config)
    named = {one: canonical_name(one.name, family) or "" for one in own}
    number = str(config.num_layers)
    if number not in predicting_layers(named.values()) and not problems:
        return None
    own = [one for one, name in named.items() if layer_of(name, family) == number and not name.endswith(COPIES)]
    shapes, axes = parameters_by_name(like), parameter_axes(like)
    matched = _match(own, config, family, multi_token_tensors(config, shapes, family), problems)
    if problems:
        raise CoconutError(f"{folder} cannot be loaded:\n  " + "\n  ".join(problems))
    found = _place(matched, shapes, axes, mesh)
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in shapes])


def _load(
    folder: Path,
    config: DecoderConfig | None,
    execution: ExecutionConfig | None,
    stored: list[Stored],
    problems: list[str],
    mesh: Mesh | None,
    family: Family | None,
) -> Decoder:
    if scales := [one for one in stored if one.name.endswith("_scale_inv")]:
        problems.append(
            f"{scales[0].path.name}: tensor {scales[0].name} and {len(scales) - 1} more scale blocks of fp8 matrices, "
            "which are not read: convert the checkpoint to bfloat16 first"
        )
    elif config is not None and execution is not None and family is not None:
        further = predicting_layers(canonical_name(one.name, family) or "" for one in stored)
        stored = [one for one in stored if layer_of(canonical_name(one.name, family) or "", family) not in further]
        if jnp.dtype(config.param_dtype) != jax.dtypes.canonicalize_dtype(config.param_dtype):
            raise CoconutError(f"DecoderConfig.param_dtype = {config.param_dtype!r}: JAX needs jax_enable_x64 for it")
        # Before anything is built: a config may ask for any number of layers.
        if not _has_all_layers(stored, config, family, problems):
            raise CoconutError(f"{folder} cannot be loaded:\n  " + "\n  ".join(problems))
        abstract = abstract_decoder(config, execution)
        shapes, axes = decoder_parameters(abstract), parameter_axes(abstract)
        tensors = tensors_of(config, shapes, family)
        for name, expected in shapes.items():
            try:
                _sharding(name, expected.shape, axes[name], mesh)
            except CoconutError as error:
                problems.append(str(error))
        matched = _match(stored, config, family, tensors, problems)
        if not problems:
            return decoder_of(config, execution, _place(matched, shapes, axes, mesh))
    raise CoconutError(f"{folder} cannot be loaded:\n  " + "\n  ".join(problems))


def _merge(described: DecoderConfig, config: DecoderConfig, problems: list[str]) -> DecoderConfig:
    """The config a caller asks for, its vocabulary and its family known."""
    if config.vocab_size is None:
        config = dataclasses.replace(config, vocab_size=described.vocab_size)
    if config.family is None:
        config = dataclasses.replace(config, family=described.family)

    def spelled_out(config: DecoderConfig) -> dict[str, Any]:
        derived: dict[str, Any] = {
            "num_kv_heads": config.kv_heads,
            "head_dim": config.width_of_head,
            "mlp_dim": config.width_of_mlp,
        }
        derived["query_pre_attention_scalar"] = config.query_pre_attention_scalar or config.width_of_head
        derived["local_attention"] = config.local_attention and config.local_attention.shortest()
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | derived

    theirs, ours = spelled_out(described), spelled_out(config)
    differing = [name for name in theirs if theirs[name] != ours[name] and name not in _CHOICES]
    if config.max_positions > described.max_positions or (
        config.position_embedding == "learned" and config.max_positions != described.max_positions
    ):
        differing.append("max_positions")
    known_as = their_names(family_of(described))
    problems += [
        f"DecoderConfig.{name} = {ours[name]!r}, but {CONFIG_FILE} says {known_as.get(name, name)} = {theirs[name]!r}"
        for name in differing
    ]
    return config


def _has_all_layers(stored: Sequence[Stored], config: DecoderConfig, family: Family, problems: list[str]) -> bool:
    """Whether the files hold a tensor of every layer of the config, and of no other."""
    found = {layer_of(canonical_name(one.name, family) or "", family) for one in stored} - {None}
    # Where files are missing or damaged their layers are, too, and that is said already.
    if len(found) == config.num_layers or problems:
        return len(found) == config.num_layers
    name = their_names(family)["num_layers"]
    problems.append(f"{name} = {config.num_layers}, but the files hold tensors of {len(found)} layers")
    return False


def _match(
    stored: Sequence[Stored],
    config: DecoderConfig,
    family: Family,
    tensors: Mapping[str, Tensor],
    problems: list[str],
) -> list[tuple[Tensor, Stored]]:
    """What each stored tensor holds, in the order of the files; what does not fit is added to ``problems``."""
    # Where files are missing or damaged, so are their tensors: naming these as well would say nothing new.
    complete = not problems
    found: dict[str, Stored] = {}
    copies: list[tuple[Stored, Stored]] = []
    for one in stored:
        name = canonical_name(one.name, family)
        if name is None:
            continue
        if name == HEAD and config.tied_head:
            name = EMBEDDING[family]
        if name not in tensors:
            problems.append(f"tensor {one.name} is unknown")
            continue
        if one.shape != tensors[name].shape:
            problems.append(f"tensor {one.name} has shape {one.shape}, the config gives it {tensors[name].shape}")
        if one.dtype not in DTYPES:
            problems.append(f"tensor {one.name} has dtype {one.dtype}: only {', '.join(DTYPES)} are supported")
        if name in found:
            copies.append((found[name], one))
        else:
            found[name] = one
    if complete:
        problems += [f"tensor {name} is missing" for name in tensors if name not in found]
    if not problems:
        # Files repeat a tied head, and the official Coconut ones the embedding, too.
        problems += [
            f"tensors {first.name} and {second.name} stand for the same parameter, and differ"
            for first, second in copies
            if not equal(first, second)
        ]
    return [(tensors[name], one) for name, one in found.items()]


def _place(
    matched: Sequence[tuple[Tensor, Stored]], shapes: Mapping[str, Any], axes: Mapping[str, Axes], mesh: Mesh | None
) -> dict[str, Array]:
    """Reads tensor after tensor, and puts each where it belongs."""
    parameters: dict[str, Array] = {}
    for tensor, stored in matched:
        for part in tensor.parts:
            name, abstract = part.parameter, shapes[part.parameter]
            # Our matrices are the other way around than torch's: XLA turns them, in a fifth of the time numpy takes.
            where = {"rows": part.outputs} if tensor.transposed else {"columns": part.outputs}
            value: Any = stored.read(**where).astype(abstract.dtype, copy=False)
            shape = value.shape[::-1] if tensor.transposed else value.shape
            own_axes = axes[name]
            if own_axes is not None:
                own_axes = own_axes[len(part.index) :]
            value = _put(value, _sharding(name, shape, own_axes, mesh), tensor.transposed)
            if part.index:
                whole = _sharding(name, abstract.shape, axes[name], mesh)
                if name not in parameters:
                    parameters[name] = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=whole)(
                        abstract.shape, abstract.dtype
                    )
                value = _with_part(whole)(parameters[name], value, part.index)
            # JAX would let us read on, and hold what it has not copied yet.
            parameters[name] = value.block_until_ready()
    return parameters


def _sharding(name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh | None) -> NamedSharding | None:
    # Without a mesh arrays lie as JAX's own functions place them: on the default device, and free to move.
    if mesh is None:
        return None
    # Published vocabularies are often odd, until `coconut.models.vocabulary` adds the markers.
    return parameter_sharding(name, shape, axes, mesh, may_stay_whole=("vocabulary",))


def _put(value: np.ndarray, sharding: NamedSharding | None, transposed: bool) -> Array:
    if not transposed:
        return jax.device_put(value, sharding)
    before = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[::-1]))
    return _transpose(sharding)(jax.device_put(value, before))


@functools.cache
def _transpose(sharding: NamedSharding | None) -> Callable[[Array], Array]:
    return jax.jit(jnp.transpose, out_shardings=sharding)


@functools.cache
def _with_part(sharding: NamedSharding | None) -> Callable[[Array, Array, tuple[int, ...]], Array]:
    """Writes one layer of a stacked parameter, or one expert's matrix, in place."""
    return jax.jit(
        lambda whole, value, index: whole.at[index].set(value),
        donate_argnums=0,
        out_shardings=sharding,
    )
