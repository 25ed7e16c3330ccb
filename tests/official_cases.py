"""The two cases computed by the official PyTorch implementation, in our shapes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from coconut.batching import Row, Shape, align
from coconut.methods import get_method
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.types import IGNORED_LABEL, Batch

CASES = ("same_length", "ragged_thoughts")


@dataclasses.dataclass(frozen=True)
class OfficialCase:
    """One case: our decoder and batch, and what the official code returned, cut to our columns."""

    decoder: Decoder
    batch: Batch
    content: dict
    expected: dict[str, np.ndarray]
    official_columns: np.ndarray
    """[B, T]: the official column of each of our valid columns, else -1."""


def load_case(folder: Path, dtype: str) -> OfficialCase:
    """Reads a case with the weights in ``dtype``."""
    content = json.loads((folder / "case.json").read_text())
    sizes, markers, batch = content["config"], content["markers"], content["batch"]
    config = DecoderConfig(
        vocab_size=sizes["vocab_size"],
        num_layers=sizes["n_layer"],
        embed_dim=sizes["n_embd"],
        num_heads=sizes["n_head"],
        max_positions=sizes["n_positions"],
        norm_epsilon=sizes["layer_norm_epsilon"],
        dtype=dtype,
        param_dtype=dtype,
    )
    decoder = gpt2_decoder(config, load_file(folder / "model.safetensors"))
    rows, columns = [], []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        own = [column for column, kept in enumerate(mask) if kept]
        # The end-of-text id also pads; a row's own ends are in its mask alone.
        ids = np.asarray(ids, np.int32)
        start = next(column for column in own if ids[column] == markers["start_latent"])
        end = next(column for column in own if ids[column] == markers["end_latent"])
        assert labels[end + 1 : own[-1] + 1] == ids[end + 1 : own[-1] + 1].tolist()
        rows.append(Row(ids[own[0] : start + 1], end - start - 1, ids[end : end + 1], (ids[end + 1 : own[-1] + 1],)))
        columns.append((own[0], start + 1, end, own[-1] + 1))
    shape = Shape(
        max(len(row.prompt) for row in rows), max(row.latent for row in rows), max(row.suffix for row in rows)
    )
    ours = align(rows, shape, get_method("coconut").rule, pad_id=markers["pad"], latent_id=markers["latent"])
    official = np.full(ours.valid.shape, -1)
    for index, (first, latent, end, stop) in enumerate(columns):
        official[index, ours.valid[index]] = np.arange(first, stop)
        assert (np.asarray(ours.labels)[index] != IGNORED_LABEL).sum() == stop - end - 1
        assert latent - first == len(rows[index].prompt)
    return OfficialCase(decoder, ours, content, load_file(folder / "expected.safetensors"), official)


def gpt2_names(config: DecoderConfig) -> dict[str, list[tuple[str, slice]]]:
    """Hugging Face parameter name -> our parameters, with their slice of its last axis."""
    D = config.embed_dim
    whole = slice(None)
    names = {
        "transformer.wte.weight": [("tokens.embedding", whole)],
        "transformer.wpe.weight": [("positions.embedding", whole)],
        "transformer.ln_f.weight": [("norm.scale", whole)],
        "transformer.ln_f.bias": [("norm.bias", whole)],
    }
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"layers.{layer}"
        for weight, kernel in (("weight", "kernel"), ("bias", "bias")):
            names[f"{theirs}.attn.c_attn.{weight}"] = [
                (f"{ours}.attention.{part}.{kernel}", slice(i * D, (i + 1) * D))
                for i, part in enumerate(("query", "key", "value"))
            ]
            names[f"{theirs}.attn.c_proj.{weight}"] = [(f"{ours}.attention.output.{kernel}", whole)]
            names[f"{theirs}.mlp.c_fc.{weight}"] = [(f"{ours}.mlp.up.{kernel}", whole)]
            names[f"{theirs}.mlp.c_proj.{weight}"] = [(f"{ours}.mlp.down.{kernel}", whole)]
        for norm, own in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            names[f"{theirs}.{norm}.weight"] = [(f"{ours}.{own}.scale", whole)]
            names[f"{theirs}.{norm}.bias"] = [(f"{ours}.{own}.bias", whole)]
    return names


def parameter(tree: Decoder, path: str) -> nnx.Param:
    """The parameter at a dotted path."""
    node: Any = tree
    for name in path.split("."):
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    return node


def gpt2_decoder(config: DecoderConfig, weights: dict[str, np.ndarray]) -> Decoder:
    """A decoder holding the weights of a Hugging Face GPT-2."""
    # Every parameter is replaced: running the initialisers would compile a program for each shape.
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    decoder = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), abstract)
    for theirs, parts in gpt2_names(config).items():
        for path, part in parts:
            target = parameter(decoder, path)
            value = jnp.asarray(weights[theirs][..., part], config.param_dtype)
            assert value.shape == target[...].shape, path
            target[...] = value
    return decoder
