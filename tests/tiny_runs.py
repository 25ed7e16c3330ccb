"""Runs that train in seconds: a decoder of one layer on the smallest graphs; and runs that never trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.latent.generate import SamplingConfig
from coconut.model import Model, make_parts
from coconut.models.config import DecoderConfig
from coconut.pipeline import PipelineConfig
from coconut.tokenizers import Tokenizer
from coconut.training.config import RunConfig
from coconut.training.optimizer import OptimizerConfig
from coconut.training.progress import Progress
from coconut.training.run import Run
from tests.tiny_models import random_decoder

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


def untrained_run(tokenizer: Tokenizer, **settings: Any) -> tuple[Run, Model, Progress]:
    """What `coconut.training.loading.load_model` returns, of a run that never trained and stands at stage 2.

    It thinks four thoughts, none of its numbers is at a special value, and its embedding has two rows more than there
    are tokens.
    """
    decoder = dataclasses.replace(settings.pop("decoder", BASE.decoder), vocab_size=tokenizer.vocab_size + 2)
    curriculum = {"c_thought": 2, "max_latent_stage": 2, "last_stage": 2}
    config = tiny_run(decoder=decoder, curriculum=curriculum, **settings)
    parts, rng = make_parts(config.decoder, jax.random.key(0), feedback=config.feedback), np.random.default_rng(1)
    parts = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), parts)
    return Run(config, tokenizer, data=""), Model(random_decoder(config.decoder, seed=2), parts), Progress(stage=2)
