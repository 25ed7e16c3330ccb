"""Methods that reason in language or not at all: CoT, No-CoT, Coconut's curriculum without its thoughts.

`MARKED_COT` is for warming up models that were never pretrained.
"""

import numpy as np

from coconut.curriculum import replace_steps
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Text, index_behind, split_step, take_steps, write_on
from coconut.tokenizers import TokenizedExample
from coconut.types import Think


def write_every_step(example: TokenizedExample, placing: Placing) -> Page:
    """Chain of thought: every step is written."""
    return (Text(example.question), *write_on(example.steps, example, placing.markers))


def write_no_step(example: TokenizedExample, placing: Placing) -> Page:
    """The answer follows the question."""
    return _write_without(example, placing, example.steps, example.num_steps)


def write_fewer_steps(example: TokenizedExample, placing: Placing) -> Page:
    """Steps go stage by stage, as in Coconut, and nothing takes their place."""
    replaced = replace_steps(placing.curriculum, placing.stage, example.num_steps)
    return _write_without(example, placing, *split_step(example.steps, replaced))


def _write_without(
    example: TokenizedExample, placing: Placing, steps: tuple[np.ndarray | Think, ...], count: int
) -> Page:
    """The page without the first ``count`` of ``steps``."""
    _, kept = take_steps(steps, count)
    return (Text(example.question), *write_on(kept, example, placing.markers))


def write_marked_steps(example: TokenizedExample, placing: Placing) -> Page:
    """``question <start> steps[:s] <end> steps[s:] answer``; to be answered it is ``question <start> <end>``."""
    replaced = replace_steps(placing.curriculum, placing.stage, example.num_steps)
    steps, count = (example.steps, 0) if placing.answering else split_step(example.steps, replaced)
    markers, end = placing.markers, index_behind(steps, count)
    # In training what the model writes begins behind the start marker, also where the end marker is the next token.
    front = () if placing.answering else (Text(np.zeros(0, np.int32), scored=True),)
    behind = write_on((*steps[:end], markers.end_text, *steps[end:]), example, markers)
    return (Text(example.question), markers.start_text, *front, *behind)


COT = Method(name="cot", pages={"main": write_every_step}, needs_steps=True)

MARKED_COT = Method(name="marked_cot", pages={"main": write_marked_steps}, needs_steps=True)
"""Chain of thought with the two markers around the first ``stage`` steps.

With ``uniform_prob = 1`` the markers stand anywhere, and a model learns to read on behind them. It is no method of the
paper, whose models are pretrained: a model trained from scratch meets the markers first when it has to think between
them, and learns slowly to look past them.
"""

NO_COT = Method(name="no_cot", pages={"main": write_no_step})

COCONUT_WITHOUT_THOUGHT = Method(name="coconut_without_thought", pages={"main": write_fewer_steps}, needs_steps=True)
