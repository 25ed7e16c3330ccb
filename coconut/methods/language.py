"""Methods that reason in language or not at all: CoT, No-CoT, Coconut's curriculum without its thoughts.

`MARKED_COT` is for warming up models that were never pretrained.
"""

from coconut.curriculum import CurriculumConfig, SequenceRule, StagePlan, plan_stage
from coconut.methods.method import Method


def keep_every_step(config: CurriculumConfig, stage: int, num_steps: int) -> StagePlan:
    """Chain of thought: every step is written."""
    del config, stage, num_steps
    return StagePlan(0, 0)


def skip_every_step(config: CurriculumConfig, stage: int, num_steps: int) -> StagePlan:
    """The answer follows the question."""
    del config, stage
    return StagePlan(num_steps, 0)


def skip_without_thoughts(config: CurriculumConfig, stage: int, num_steps: int) -> StagePlan:
    """Steps go stage by stage, as in Coconut, and nothing takes their place."""
    return StagePlan(plan_stage(config, stage, num_steps).skipped, 0)


COT = Method(name="cot", rule=SequenceRule(markers=False, filler="thought", plan=keep_every_step))

MARKED_COT = Method(name="marked_cot", rule=SequenceRule(markers=True, filler="step", plan=plan_stage))
"""Chain of thought with the two markers around the first ``stage`` steps.

With ``uniform_prob = 1`` the markers stand anywhere, and a model learns to read on behind them. It is no method of the
paper, whose models are pretrained: a model trained from scratch meets the markers first when it has to think between
them, and learns slowly to look past them.
"""

NO_COT = Method(name="no_cot", rule=SequenceRule(markers=False, filler="thought", plan=skip_every_step))

COCONUT_WITHOUT_THOUGHT = Method(
    name="coconut_without_thought", rule=SequenceRule(markers=False, filler="thought", plan=skip_without_thoughts)
)
