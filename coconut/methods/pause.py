"""Pause tokens (Goyal et al. 2024), alone and in the place of Coconut's thoughts.

A pause is the latent marker's own learned embedding, between the same two markers as Coconut's thoughts: a pause run
and a Coconut run differ by the feedback alone.

There is no method for *multi-pass* pause, the control that reads as many pause tokens in passes of their own. Attention
is causal and keys are kept, so it computes what one parallel pass computes, gradients included, as a test shows in
tests/latent/test_rollout.py. Its row of a table is that of `PAUSE_AS_THOUGHT`, or of `PAUSE` without a curriculum.
"""

from typing import Any

from coconut.latent.thinkers import Sweeps
from coconut.methods.coconut import write_final_stage, write_with_thoughts
from coconut.methods.method import Method


def without_sweeps(options: Any) -> Sweeps:
    """The markers stay as they are: nothing is fed back."""
    del options
    return Sweeps(count=0)


PAUSE = Method(name="pause", pages={"main": write_final_stage}, think=without_sweeps)

PAUSE_AS_THOUGHT = Method(
    name="pause_as_thought", pages={"main": write_with_thoughts}, think=without_sweeps, needs_steps=True
)
