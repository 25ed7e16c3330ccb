"""What the original CODI and SIM-CoT compute for four small cases, in our shapes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from coconut.batching import align, page_shape
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_weights
from coconut.pages import Page, Text
from coconut.types import Batch

FOLDER = Path(__file__).with_name("official_methods")


def read_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The content of a case, its weights, and what was computed from them."""
    folder = FOLDER / name
    content = json.loads((folder / "case.json").read_text())
    return content, load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")


def decoder_of_case(weights: dict[str, np.ndarray], config: dict[str, Any], folder: Path, dtype: str) -> Decoder:
    """The decoder among the weights, whose names begin with ``transformer.``."""
    save_file({k: v for k, v in weights.items() if k.startswith("transformer.")}, folder / "model.safetensors")
    ours = DecoderConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["n_layer"],
        embed_dim=config["n_embd"],
        num_heads=config["n_head"],
        mlp_dim=config["n_inner"],
        max_positions=config["n_positions"],
        norm_epsilon=config["layer_norm_epsilon"],
        param_dtype=dtype,
    )
    return load_weights(folder, ours, ExecutionConfig(dtype=dtype))


def aligned(pages: list[Page], *, pad_id: int, latent_id: int) -> Batch:
    """The pages as a batch of their own shape."""
    batch = align(pages, page_shape(pages), pad_id=pad_id, latent_id=latent_id, feeds_back=True)
    return jax.tree.map(jnp.asarray, batch)


def text(*ids: int, **kind: Any) -> Text:
    """A text of some ids."""
    return Text(np.asarray(ids, np.int32), **kind)


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    """The norm of the difference over that of the original."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
