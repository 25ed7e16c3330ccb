"""The multi-stage curriculum: which written steps have become thoughts at a stage, and when a stage ends.

Pure functions of the stage, which is a number the run carries with it; it is never derived from an epoch typed by hand.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, no_type_check

from coconut.errors import CoconutError, check_fields

ResetOptimizer = Literal["never", "stage", "epoch"]
UniformStages = Literal["all", "reached"]
StageWeights = Literal["equal", "rising"]
StageAdds = Literal["step", "thought"]

MOST_STAGES = 10_000
"""Stages, and thoughts for a step, beyond this are slips or malice: what looks at each of them would take for ever."""


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """The curriculum of Hao et al. 2024, section 3 and 4.2. The defaults are ProsQA's and ProntoQA's.

    Attributes:
      c_thought: thoughts that replace one step.
      max_latent_stage: steps replaced at most.
      stage_adds: what a stage has more than the one before: the ``c_thought`` thoughts of a whole ``step``, or one
        ``thought``, which takes the place of ``1 / c_thought`` of a step's tokens, rounded down as they add up. The
        latter is what Hao et al. propose for the loss that jumps where three thoughts come at once; they did not try
        it. There are ``c_thought`` times as many stages then, and what is said of epochs and steps is said of each.
      pad_latent_to_max: in the final stage give every example ``c_thought * max_latent_stage`` thoughts, also one with
        fewer steps.
      uniform_prob: probability with which an example, each epoch, is put at a stage that is drawn instead.
      uniform_stages: what is drawn from: ``all`` up to the one that replaces each of its steps (the official code), or
        the stages ``reached``, ``{0, .., current stage}``.
      stage_weights: how likely the stages that are drawn from are: ``equal``, or ``rising`` with ``i + 1`` for stage
        ``i``. Rising weights over the stages reached with ``uniform_prob = 1`` are stage mixing (arXiv 2602.22441),
        which keeps what earlier stages taught.
      first_stage: stage at which the run begins; above 0 for a run whose parameters come from one that has done the
        earlier stages.
      last_stage: stage at which the run ends; None for the final stage, one past those that add thoughts.
      epochs_per_stage: epochs after which a stage ends; may be fractional. None for no such end.
      steps_per_stage: optimizer steps after which a stage ends. None for no such end. Where ``advance_metric`` is set,
        whichever of the two is set is a cap, at which the run reports that the stage was not learnt.
      first_stage_factor: the stage the run begins with lasts this many times as long.
      last_stage_factor: the last stage lasts this many times as long.
      total_epochs: epochs of the whole run, from its first stage on; the last stage lasts what the earlier ones leave,
        and a run of one stage all of them. None where ``last_stage_factor`` says how long it lasts.
      advance_metric: name of a training metric that ends a stage early; None for none.
      advance_below: the stage ends once the metric's moving average is below this bound.
      advance_above: likewise, above.
      advance_last_stage: whether the metric may end the last stage, too, and with it the run.
      advance_window: optimizer steps over which the metric is averaged; a stage lasts at least as long.
      reset_optimizer: when the optimizer's state is made anew: ``never``, at each ``stage`` (the paper's text), or at
        each ``epoch`` (the official code).

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    c_thought: int = 1
    max_latent_stage: int = 6
    stage_adds: StageAdds = "step"
    pad_latent_to_max: bool = True
    uniform_prob: float = 0.0
    uniform_stages: UniformStages = "all"
    stage_weights: StageWeights = "equal"
    first_stage: int = 0
    last_stage: int | None = None
    epochs_per_stage: float | None = 5
    steps_per_stage: int | None = None
    first_stage_factor: float = 1.0
    last_stage_factor: float = 1.0
    total_epochs: float | None = None
    advance_metric: str | None = None
    advance_below: float | None = None
    advance_above: float | None = None
    advance_last_stage: bool = False
    advance_window: int = 50
    reset_optimizer: ResetOptimizer = "stage"

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"CurriculumConfig.{field} = {getattr(self, field)!r}: {why}")

        for field in ("c_thought", "max_latent_stage"):
            if getattr(self, field) < 0:
                reject(field, "must be an integer of at least 0")
        for field in ("c_thought", "max_latent_stage", "last_stage"):
            if (getattr(self, field) or 0) > MOST_STAGES:
                reject(field, f"must be at most {MOST_STAGES:,}")
        if self.final_stage > MOST_STAGES:
            reject("max_latent_stage", f"{self.final_stage:,} stages are too many: must be at most {MOST_STAGES:,}")
        if not 0.0 <= self.uniform_prob <= 1.0:
            reject("uniform_prob", "must be a probability")
        if self.stage_weights != "equal" and self.uniform_prob == 0.0:
            reject("stage_weights", "means nothing with uniform_prob = 0, which draws no stage")
        if self.stage_adds == "thought" and self.c_thought < 1:
            reject("stage_adds", f"c_thought = {self.c_thought} leaves no thought to add")
        if self.last_stage is not None and self.last_stage < 0:
            reject("last_stage", "must be None or an integer of at least 0")
        if not 0 <= self.first_stage <= self.final_stage:
            reject("first_stage", f"must be in 0 .. {self.final_stage}, the last stage")
        if (self.epochs_per_stage is None) == (self.steps_per_stage is None):
            reject("steps_per_stage", f"set this or epochs_per_stage = {self.epochs_per_stage!r}, and not both")
        lengths = ("epochs_per_stage", "steps_per_stage", "first_stage_factor", "last_stage_factor", "total_epochs")
        for field in (*lengths, "advance_window"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                reject(field, "must be positive")
        if self.total_epochs is not None:
            if self.epochs_per_stage is None or self.last_stage_factor != 1.0:
                reject("total_epochs", "needs epochs_per_stage, and no last_stage_factor beside it")
            # As if an epoch were one step: the stages before the last, in epochs.
            earlier = sum(_steps_of_stage(self, stage, 1) for stage in range(self.first_stage, self.final_stage))
            if earlier >= self.total_epochs:
                reject("total_epochs", f"the stages before the last take {earlier:g} epochs")
        bounds = (self.advance_below is not None) + (self.advance_above is not None)
        if bounds != (self.advance_metric is not None):
            reject("advance_metric", "needs exactly one of advance_below and advance_above, and they need it")

    @property
    def final_stage(self) -> int:
        """The stage the run ends with."""
        return self.latent_stages + 1 if self.last_stage is None else self.last_stage

    @property
    def stages_per_step(self) -> int:
        """Stages after which one more step is replaced."""
        return self.c_thought if self.stage_adds == "thought" else 1

    @property
    def latent_stages(self) -> int:
        """The last stage that adds thoughts; behind it every step is left out."""
        return self.max_latent_stage * self.stages_per_step

    @property
    def max_thoughts(self) -> int:
        """The most thoughts that a stage makes."""
        return self.c_thought * self.max_latent_stage


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What an example looks like at a stage.

    Attributes:
      skipped: written steps left out, from the first.
      thoughts: thoughts put in their place.
      share: share of the tokens of the step behind them that is left out as well, from its first; below 1.
    """

    skipped: int
    thoughts: int
    share: Fraction = Fraction(0)


def replace_steps(config: CurriculumConfig, stage: int, num_steps: int) -> Replacement:
    """Which steps of an example have become thoughts (Hao et al. 2024, figure 2).

    Up to ``max_latent_stage`` a stage skips as many steps, and inserts ``stage * c_thought`` thoughts, also for an
    example with fewer steps. Past it every step is skipped; there are ``c_thought * max_latent_stage`` thoughts where
    ``pad_latent_to_max``, else ``c_thought * min(num_steps, max_latent_stage)``. Where a stage adds a thought, it
    inserts ``stage`` of them, and skips ``stage / c_thought`` steps: the last one in part.

    The official code evaluates by another rule than it trains by where padding is off (it also caps the thoughts of
    early stages by the number of steps). Here training and evaluation use this one rule.
    """
    if stage <= config.latent_stages:
        if config.stage_adds == "step":
            return Replacement(min(stage, num_steps), stage * config.c_thought)
        skipped, begun = divmod(stage, config.c_thought)
        if skipped >= num_steps:
            return Replacement(num_steps, stage)
        return Replacement(skipped, stage, Fraction(begun, config.c_thought))
    steps = config.max_latent_stage if config.pad_latent_to_max else min(num_steps, config.max_latent_stage)
    return Replacement(num_steps, steps * config.c_thought)


def drawable_stages(config: CurriculumConfig, stage: int, num_steps: int) -> range:
    """The stages an example may be put at while the run is at ``stage``, beside ``stage`` itself."""
    if config.uniform_prob == 0.0:
        return range(0)
    return range((num_steps * config.stages_per_step if config.uniform_stages == "all" else stage) + 1)


def draw_stage(config: CurriculumConfig, stage: int, num_steps: int, uniform: float, choice: float) -> int:
    """The stage of one example in one epoch.

    Args:
      config: the curriculum.
      stage: the run's stage.
      num_steps: written steps of the example.
      uniform: a draw from [0, 1) that decides whether the stage is drawn.
      choice: a draw from [0, 1) that decides which.
    """
    if uniform >= config.uniform_prob:
        return stage
    stages = drawable_stages(config, stage, num_steps)
    if config.stage_weights == "equal":
        return stages[int(choice * len(stages))]
    # Stage i weighs i + 1, and the stages up to it (i + 1)(i + 2) / 2.
    drawn = choice * len(stages) * (len(stages) + 1) / 2
    return next(i for i in stages if drawn < (i + 1) * (i + 2) / 2)


def stage_steps(config: CurriculumConfig, stage: int, steps_per_epoch: int) -> int:
    """Optimizer steps after which ``stage`` ends at the latest."""
    if config.total_epochs is not None and stage == config.final_stage:
        earlier = sum(stage_steps(config, before, steps_per_epoch) for before in range(config.first_stage, stage))
        steps = config.total_epochs * steps_per_epoch - earlier
    else:
        steps = _steps_of_stage(config, stage, steps_per_epoch)
    return max(1, round(steps))


def _steps_of_stage(config: CurriculumConfig, stage: int, steps_per_epoch: int) -> float:
    """Steps of a stage by its own fields, before they are rounded."""
    if config.steps_per_stage is not None:
        steps = float(config.steps_per_stage)
    else:
        assert config.epochs_per_stage is not None
        steps = float(config.epochs_per_stage * steps_per_epoch)
    if stage == config.first_stage:
        steps *= config.first_stage_factor
    if stage == config.final_stage:
        steps *= config.last_stage_factor
    return steps


def may_advance(config: CurriculumConfig, stage: int) -> bool:
    """Whether a metric may end ``stage`` before its cap."""
    return config.advance_metric is not None and (config.advance_last_stage or stage != config.final_stage)


def has_learnt(config: CurriculumConfig, averages: Mapping[str, float]) -> bool:
    """Whether the metric that ends a stage early has passed its bound.

    Raises:
      CoconutError: the metric is not among ``averages``; the message lists those that are.
    """
    if config.advance_metric is None:
        return False
    if config.advance_metric not in averages:
        raise CoconutError(
            f"CurriculumConfig.advance_metric = {config.advance_metric!r} is none of {', '.join(sorted(averages))}"
        )
    value = averages[config.advance_metric]
    if config.advance_below is not None:
        return value < config.advance_below
    assert config.advance_above is not None
    return value > config.advance_above
