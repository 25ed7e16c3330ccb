"""Runs that train in seconds: a decoder of one layer on the smallest graphs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.latent.generate import SamplingConfig
from coconut.models.config import DecoderConfig
from coconut.pipeline import PipelineConfig
from coconut.training.config import RunConfig
from coconut.training.optimizer import OptimizerConfig

BASE = RunConfig(
    method="coconut",
    data=DataConfig(task="small_graphs", train=44, validation=4, options={"config": "e8"}, tokenizer="symbols"),
    decoder=DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, max_positions=48),
    curriculum=CurriculumConfig(max_latent_stage=1, last_stage=1, epochs_per_stage=None, steps_per_stage=7),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    pipeline=PipelineConfig(batch_size=8),
    sampling=SamplingConfig(max_new_tokens=4),
    save_every=3,
    log_every=2,
)
"""Coconut with two stages of seven steps: 44 examples are five and a half batches, so epochs and stages interleave."""


def tiny_run(**changes: Any) -> RunConfig:
    """`BASE` with changes; a mapping changes fields of the config of that name."""
    values = {
        name: dataclasses.replace(getattr(BASE, name), **value) if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(BASE, **values)
