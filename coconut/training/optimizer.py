"""AdamW and its learning rate."""

import dataclasses
from typing import Literal, no_type_check

import numpy as np
import optax

from coconut.errors import CoconutError, check_fields
from coconut.models.stacking import is_stacked

Decay = Literal["constant", "linear", "cosine"]


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019). The defaults are the official Coconut recipe: constant, no clipping.

    Attributes:
      learning_rate: the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      epsilon: added to the root of the second moment.
      weight_decay: per step, times the learning rate.
      decay_matrices_only: leave biases, norms and other vectors out of the weight decay. The official code decays all.
      clip_norm: global gradient norm above which gradients are scaled down; None for no clipping.
      warmup_steps: steps over which the learning rate rises linearly from 0 at the start of the run.
      stage_warmup_steps: likewise, at the start of each stage but the first. Where both apply the lower rate holds.
      decay: shape of the decay at the end of the last stage.
      decay_share: share of the last stage's steps over which the learning rate decays.
      final_share: share of the peak that is left at the end.
      correction_rate: by how much a step moves the correction bias of each expert of a sigmoid router that is trained:
        down where more columns chose the expert than the mean of its layer, up where fewer did
        (`coconut.training.balancing`). DeepSeek-V3 was trained with 0.001, and with 0 in the end. 0 leaves the biases
        as they are, as they should be where a pretrained model learns the questions of one task.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    decay_matrices_only: bool = False
    clip_norm: float | None = None
    warmup_steps: int = 0
    stage_warmup_steps: int = 0
    decay: Decay = "constant"
    decay_share: float = 1.0
    final_share: float = 0.0
    correction_rate: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"OptimizerConfig.{field} = {getattr(self, field)!r}: {why}")

        if not self.learning_rate > 0:
            reject("learning_rate", "must be positive")
        for field in ("b1", "b2"):
            if not 0.0 <= getattr(self, field) < 1.0:
                reject(field, "must be in [0, 1)")
        if not self.epsilon > 0:
            reject("epsilon", "must be positive")
        if not self.weight_decay >= 0:
            reject("weight_decay", "must be at least 0")
        if not 0.0 <= self.correction_rate <= 1.0:
            reject("correction_rate", "must be in [0, 1]")
        if self.clip_norm is not None and not self.clip_norm > 0:
            reject("clip_norm", "must be None or positive")
        for field in ("warmup_steps", "stage_warmup_steps"):
            if getattr(self, field) < 0:
                reject(field, "must be at least 0")
        for field in ("decay_share", "final_share"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                reject(field, "must be in [0, 1]")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW up to the learning rate, which the train step multiplies in: it is data, and known to the log."""
    # A vector of each layer is no matrix, where layers are stacked.
    matrices = lambda params: {name: x.ndim - is_stacked(name) > 1 for name, x in params.items()}
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=matrices if config.decay_matrices_only else None),
    )


def learning_rate_at(
    config: OptimizerConfig, *, step: int, stage_step: int, stage_steps: int, is_last_stage: bool
) -> float:
    """The learning rate of one step: a function of numbers that every checkpoint holds, so that it resumes exactly.

    Args:
      config: the optimizer.
      step: steps taken before this one, in the run.
      stage_step: steps taken before this one, in the stage.
      stage_steps: steps the stage takes at most.
      is_last_stage: whether the run ends with this stage.
    """

    def rise(taken: int, steps: int) -> float:
        return min(1.0, (taken + 1) / steps) if steps else 1.0

    first_stage = stage_step == step
    warmed = 1.0 if first_stage else rise(stage_step, config.stage_warmup_steps)
    rate = config.learning_rate * min(warmed, rise(step, config.warmup_steps))
    decay_steps = round(config.decay_share * stage_steps)
    if config.decay != "constant" and is_last_stage and decay_steps:
        decayed = max(0, stage_step + decay_steps - stage_steps)
        schedule = {
            "linear": lambda: optax.linear_schedule(1.0, config.final_share, decay_steps),
            "cosine": lambda: optax.cosine_decay_schedule(1.0, decay_steps, config.final_share),
        }[config.decay]()
        rate *= float(np.asarray(schedule(decayed)))
    return rate
