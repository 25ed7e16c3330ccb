"""The two cases computed by the official PyTorch implementation, in our shapes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from coconut.batching import align, page_shape
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_weights
from coconut.pages import Text, Thoughts
from coconut.types import IGNORED_LABEL, Batch

CASES = ("same_length", "ragged_thoughts")
FOLDER = Path(__file__).with_name("official_forward")


@dataclasses.dataclass(frozen=True)
class OfficialCase:
    """One case: our decoder and batch, and what the official code returned, cut to our columns."""

    decoder: Decoder
    batch: Batch
    content: dict
    expected: dict[str, np.ndarray]
    official_columns: np.ndarray
    """[B, T]: the official column of each of our valid columns, else -1."""


def load_case(name: str, dtype: str) -> OfficialCase:
    """Reads a case with the weights in ``dtype``."""
    folder = FOLDER / name
    content = json.loads((folder / "case.json").read_text())
    sizes, markers, batch = content["config"], content["markers"], content["batch"]
    config = DecoderConfig(
        vocab_size=sizes["vocab_size"],
        num_layers=sizes["n_layer"],
        embed_dim=sizes["n_embd"],
        num_heads=sizes["n_head"],
        max_positions=sizes["n_positions"],
        norm_epsilon=sizes["layer_norm_epsilon"],
        param_dtype=dtype,
    )
    decoder = load_weights(folder, config, ExecutionConfig(dtype=dtype))
    pages, columns = [], []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        own = [column for column, kept in enumerate(mask) if kept]
        # The end-of-text id also pads; a row's own ends are in its mask alone.
        ids = np.asarray(ids, np.int32)
        start = next(column for column in own if ids[column] == markers["start_latent"])
        end = next(column for column in own if ids[column] == markers["end_latent"])
        assert labels[end + 1 : own[-1] + 1] == ids[end + 1 : own[-1] + 1].tolist()
        prompt, answer = Text(ids[own[0] : start + 1]), Text(ids[end + 1 : own[-1] + 1], True, 0, True)
        pages.append((prompt, Thoughts(end - start - 1), Text(ids[end : end + 1]), answer))
        columns.append((own[0], start + 1, end, own[-1] + 1))
    ids = {"pad_id": markers["pad"], "latent_id": markers["latent"]}
    ours = align(pages, page_shape(pages), **ids, feeds_back=True)
    official = np.full(ours.valid.shape, -1)
    for index, (first, latent, end, stop) in enumerate(columns):
        official[index, ours.valid[index]] = np.arange(first, stop)
        assert (np.asarray(ours.labels)[index] != IGNORED_LABEL).sum() == stop - end - 1
        assert latent - first == len(pages[index][0].ids)
    return OfficialCase(decoder, ours, content, load_file(folder / "expected.safetensors"), official)
