"""What ``coconut export`` writes beside the weights: how to think with them in `transformers`, and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import coconut.models.huggingface
from coconut.datasets import text_format_of
from coconut.evaluation.reading import given_pages
from coconut.latent.feedback import FeedbackConfig
from coconut.latent.thinkers import Sweeps
from coconut.methods import get_method
from coconut.pages import Page, Text, Thoughts, question_alone
from coconut.training.progress import Progress
from coconut.training.run import Run

LOOP, CARD = "think.py", "README.md"
FEEDBACKS_OF_LOOP = ("identity", "scale", "match_norm", "norm", "projection", "mixture", "gated")
"""Those that the loop has, too."""


def thinking_fields(run: Run, progress: Progress) -> dict[str, Any]:
    """What the loop has to know, for config.json.

    Returns:
      ``behind_question``: what the model is given behind a question, in order: ids, or a number of thoughts;
      ``question_suffix``: text behind a question; ``sweeps``: None where thoughts are made one by one; ``vocab_size``:
      ids that are tokens; ``max_new_tokens``: the run's.
    """
    think = get_method(run.config.method).think(run.placing(progress.stage).options)
    return {
        "behind_question": [
            part.count if isinstance(part, Thoughts) else part.ids.tolist() for part in _behind(run, progress)
        ],
        "question_suffix": text_format_of(run.config.data).question_suffix,
        "sweeps": think.count if isinstance(think, Sweeps) else None,
        "vocab_size": run.tokenizer.vocab_size,
        "max_new_tokens": run.config.sampling.max_new_tokens,
    }


def _behind(run: Run, progress: Progress) -> Page:
    """What the model is given behind a question whose steps nobody knows."""
    placing = run.placing(progress.stage)
    example = question_alone(np.zeros(1, np.int32), placing.curriculum)
    [page] = given_pages(get_method(run.config.method), placing, [example])
    return page[1:]


def without_loop(run: Run, progress: Progress) -> str | None:
    """Why the loop would not give this run's tokens; None where it does."""
    method, kind, page = get_method(run.config.method), run.config.feedback.kind, _behind(run, progress)
    if method.halting(run.placing(progress.stage)) is not None or run.config.halting is not None:
        return "the model itself decides when it thinks, or for how long"
    if any(isinstance(part, Text) and part.skips for part in page):
        return "the model leaves positions free behind a question"
    if not any(isinstance(part, Thoughts) and part.count for part in page):
        return None
    if kind not in FEEDBACKS_OF_LOOP:
        how = "draws its thoughts" if kind == "gaussian" else f"feeds back by {kind!r}"
        return f"the model {how}, which the loop does not have"
    return None


def loop_source() -> bytes:
    """The loop, a file of PyTorch and `transformers` alone."""
    return Path(coconut.models.huggingface.__file__).with_name(LOOP).read_bytes()


def model_card(run: Run, progress: Progress, fields: Mapping[str, Any], origin: str) -> str:
    """The card of an export, in Markdown.

    Args:
      run: the run.
      progress: of the checkpoint.
      fields: what config.json says of it.
      origin: where it comes from (`coconut.commands.model_origin`).
    """
    config, reason = run.config, without_loop(run, progress)
    blocks = [part for part in fields["behind_question"] if isinstance(part, int)]
    facts = {
        "method": f"`{config.method}`",
        "thoughts before an answer": str(sum(blocks)),
        "feedback": "the hidden state itself" if config.feedback == FeedbackConfig() else f"`{config.feedback.kind}`",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["coconut", "latent-reasoning"]}
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
    title = f"# {config.method} on {config.data.task}"
    return "\n\n".join((f"---\n{front}\n---", title, _about(fields), table, _use(reason, blocks), origin))


def _about(fields: Mapping[str, Any]) -> str:
    trained = "It was trained with coconut-jax."
    if not any(part for part in fields["behind_question"] if isinstance(part, int)):
        return f"A language model that answers without continuous thoughts. {trained}"
    if fields["sweeps"] == 0:
        paper = "Goyal et al. 2024, arXiv 2310.02226"
        return f"A language model that reads pause tokens before it writes ({paper}). {trained}"
    return (
        "A language model that thinks before it writes: its last hidden states are fed back as inputs in the place of\n"
        f"written steps (Hao et al. 2024, arXiv 2412.06769). {trained}"
    )


def _use(reason: str | None, blocks: list[int]) -> str:
    if reason is not None:
        return f"""## Use

`transformers` loads the weights and the tokenizer. It has no loop that thinks, and there is none here: {reason}.
What `generate` of that library writes is not what this model answers; `coconut generate` answers from the run itself.
"""
    count = f"It takes as many thoughts as were trained ({sum(blocks)}), and" if sum(blocks) else "It takes"
    another = "\n`answer(..., thoughts=K)` or `--thoughts K` takes another number in each block." if blocks else ""
    return f"""## Use

`generate` of `transformers` does not put behind a question what this model was trained to read there. `think.py` does,
in plain PyTorch:

```bash
python think.py "QUESTION"
```

```python
from think import answer, load

model, tokenizer = load(".")
text, ids, thoughts = answer(model, tokenizer, "QUESTION")
```

{count} the likeliest token at every step.{another}
Computed in float32 the tokens are those of `coconut generate`; in another precision they may differ where two tokens
are almost equally likely. Write questions as the training data do.
"""
