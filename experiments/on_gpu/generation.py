"""Generation with thoughts against Hugging Face's cached ``generate`` of as many tokens without."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coconut.model import make_model
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.training.optimizer import OptimizerConfig
from experiments.benchmarks.generate import SMOKE, Generator, Workload
from experiments.benchmarks.latent_step import GPT2_SMALL
from experiments.benchmarks.pytorch_steps import TorchTrainer, load
from experiments.on_gpu.record import Measurement, Progress
from experiments.on_gpu.sides import compare

ROUNDS = 4
WORKLOAD = Workload(
    dataclasses.replace(GPT2_SMALL, param_dtype="bfloat16"),
    ExecutionConfig(dtype="bfloat16", scan_layers=True),
    batches=(64, 1, 512),
)


def measurements(*, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """A measurement for each batch size, in bfloat16, parameters included."""
    del work
    workload = SMOKE if smoke else WORKLOAD
    return {f"batch {x}": functools.partial(measure, workload, x, smoke=smoke) for x in workload.batches}


def measure(workload: Workload, batch: int, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """Examples per second of both, from numpy and back."""
    decoder = workload.decoder
    prompts = np.random.default_rng(0).integers(0, decoder.vocabulary, (batch, workload.prompt), np.int32)

    loading = threading.Thread(target=load, daemon=True)
    loading.start()

    def ours() -> tuple[Callable[[], object], Callable[[], Mapping[str, Any]]]:
        model = jax.jit(lambda key: make_model(decoder, key, execution=workload.execution))(jax.random.key(0))
        generator = Generator(workload, model)
        return lambda: generator.answer(prompts), lambda: {"thoughts": workload.thoughts}

    def theirs() -> tuple[Callable[[], object], Callable[[], Mapping[str, Any]]]:
        loading.join()
        return pytorch_generation(decoder, prompts, workload.new_tokens), lambda: {"thoughts": 0}

    sides = {"ours, with thoughts": ours, "Hugging Face's generate, without": theirs}
    result = compare(sides, 2 if smoke else ROUNDS, title=f"batch {batch}", progress=progress)
    for side in result["sides"].values():
        side["examples_per_second"] = batch / side["median_seconds"]
    sizes = {"batch": batch, "prompt": workload.prompt, "new_tokens": workload.new_tokens}
    return {
        **sizes,
        "dtype": workload.execution.dtype,
        "param_dtype": decoder.param_dtype,
        **result,
        "scan_layers": workload.execution.scan_layers,
    }


def pytorch_generation(decoder: DecoderConfig, prompts: np.ndarray, new_tokens: int) -> Callable[[], np.ndarray]:
    """Hugging Face's ``generate``: the most likely tokens, no end before the last."""
    import torch

    trainer = TorchTrainer(decoder, OptimizerConfig())
    model = trainer.model.eval().to(getattr(torch, decoder.param_dtype))
    model.generation_config.pad_token_id = 0

    def generate() -> np.ndarray:
        ids = trainer.ids(prompts)
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
            )
        if written.shape[1] != prompts.shape[1] + new_tokens:
            raise AssertionError("a row ended early")
        return written.cpu().numpy()

    return generate
