"""Coconut (Hao et al. 2024), and the paper's ablation without its curriculum."""

import dataclasses

from coconut.curriculum import replace_steps
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Text, Thoughts, split_step, take_steps, write_on
from coconut.tokenizers import TokenizedExample


def write_with_thoughts(example: TokenizedExample, placing: Placing) -> Page:
    """``question <start> thoughts <end> steps[s:] answer``: thoughts for the first steps (figure 2 of the paper)."""
    replaced = replace_steps(placing.curriculum, placing.stage, example.num_steps)
    skipped, kept = take_steps(*split_step(example.steps, replaced))
    markers = placing.markers
    front = (Text(example.question), markers.start_text, Thoughts(replaced.thoughts, skipped), markers.end_text)
    return front + write_on(kept, example, markers)


def write_final_stage(example: TokenizedExample, placing: Placing) -> Page:
    """The page of the final stage, at every stage: thoughts have to learn from question and answer alone."""
    final = dataclasses.replace(placing, stage=placing.curriculum.latent_stages + 1)
    return write_with_thoughts(example, final)


COCONUT = Method(name="coconut", pages={"main": write_with_thoughts}, needs_steps=True)

COCONUT_WITHOUT_CURRICULUM = Method(name="coconut_without_curriculum", pages={"main": write_final_stage})
