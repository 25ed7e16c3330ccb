"""Thoughts and written steps by turns: a sequence that thinks, writes and thinks again."""

from coconut.curriculum import plan_stage
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Text, Thoughts, write_on
from coconut.tokenizers import TokenizedExample
from coconut.types import Think


def write_by_turns(example: TokenizedExample, placing: Placing) -> Page:
    """``question <start> thoughts <end> step 2 <start> thoughts <end> step 4 ... answer``.

    At stage ``s`` the first ``s`` of the odd-numbered steps are each replaced in place by ``c_thought`` thoughts, past
    ``max_latent_stage`` all of them; even-numbered steps stay written.
    """
    odd = (example.num_steps + 1) // 2
    left = plan_stage(placing.curriculum, placing.stage, odd).skipped
    parts, number = [], 0
    for step in example.steps:
        if isinstance(step, Think):
            parts.append(step)
            continue
        number += 1
        if number % 2 and left:
            parts.append(Thoughts(placing.curriculum.c_thought, (step,)))
            left -= 1
        else:
            parts.append(step)
    return (Text(example.question), *write_on(parts, example.answer, placing.markers))


INTERLEAVED = Method(name="interleaved", pages={"main": write_by_turns})
