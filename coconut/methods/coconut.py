"""Coconut (Hao et al. 2024), and the paper's ablation without its curriculum."""

from coconut.curriculum import CurriculumConfig, SequenceRule, StagePlan, plan_stage
from coconut.methods.method import Method


def plan_final_stage(config: CurriculumConfig, stage: int, num_steps: int) -> StagePlan:
    """The plan of the final stage, at every stage: thoughts have to learn from question and answer alone."""
    del stage
    return plan_stage(config, config.max_latent_stage + 1, num_steps)


COCONUT = Method(name="coconut", rule=SequenceRule(markers=True, filler="thought", plan=plan_stage))

COCONUT_WITHOUT_CURRICULUM = Method(
    name="coconut_without_curriculum", rule=SequenceRule(markers=True, filler="thought", plan=plan_final_stage)
)
