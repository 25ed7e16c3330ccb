"""Memory of a training step of larger models, with thoughts and without."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from coconut.models.config import DecoderConfig, ExecutionConfig
from experiments.benchmarks import latent_step
from experiments.benchmarks.latent_step import Asked, Geometry, Trainer, latent_schedule, plain_schedule
from experiments.on_gpu.record import Measurement, Progress

THOUGHTS = 6
BATCH = 32
SIZES = {"GPT-2 medium": (24, 1_024, 16), "GPT-2 large": (36, 1_280, 20)}
"""Layers, features and heads."""


def measurements(*, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """Each model, from small to large, for the peak only grows; then the same with layers recomputed."""
    del work
    return {
        f"{model}, remat {remat}": functools.partial(measure, model, remat, smoke=smoke)
        for remat in ("none", "full")
        for model in SIZES
    }


def measure(model: str, remat: Any, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """What the compiler plans for a step, and the most that the device has held in this process.

    Layers are scanned and activations bfloat16, as in ``gin_configs/pretrained.gin`` and ``larger_models.gin``.
    """
    del progress
    layers, features, heads = SIZES[model]
    decoder = DecoderConfig(
        vocab_size=50_260, num_layers=layers, embed_dim=features, num_heads=heads, max_positions=1_024
    )
    geometry = Geometry(decoder, batch=BATCH, thoughts=(THOUGHTS,), rounds=1)
    geometry = latent_step.smoke(geometry) if smoke else geometry
    execution = ExecutionConfig(dtype="bfloat16", scan_layers=True, remat=remat)
    geometry = dataclasses.replace(geometry, execution=execution)
    trainer = Trainer(geometry)
    asked = {
        "plain": Asked(THOUGHTS, plain_schedule(geometry, THOUGHTS)),
        "with thoughts": Asked(THOUGHTS, latent_schedule(geometry, THOUGHTS)),
    }
    steps = trainer.steps(list(asked.values()))
    state = sum(x.nbytes for x in jax.tree.leaves(trainer.state))
    result: dict[str, Any] = {"state_bytes": state, "parameters": trainer.parameters, "batch": geometry.batch}
    for name, (take, temporary) in zip(asked, steps, strict=True):
        before = _peak()
        take()
        after = _peak()
        grew = None if before is None or after is None else after > before
        result[name] = {"temporary_bytes": temporary, "peak_bytes": after, "peak_is_its_own": grew}
        print(f"{model}, {name}: state {state:,}, temporary {temporary:,}, peak {after}", flush=True)
    return result


def _peak() -> int | None:
    """The most bytes that JAX held on the device so far; None where it does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
