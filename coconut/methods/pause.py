"""Pause tokens (Goyal et al. 2024), alone and in the place of Coconut's thoughts.

The filler is the latent marker's own learned embedding, between the same two markers as Coconut's thoughts: a pause run
and a Coconut run differ by the feedback alone.
"""

from coconut.curriculum import SequenceRule, plan_stage
from coconut.methods.coconut import plan_final_stage
from coconut.methods.method import Method

PAUSE = Method(name="pause", rule=SequenceRule(markers=True, filler="pause", plan=plan_final_stage))

PAUSE_AS_THOUGHT = Method(name="pause_as_thought", rule=SequenceRule(markers=True, filler="pause", plan=plan_stage))
