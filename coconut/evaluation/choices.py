"""Choosing between the two options of a graph question, whatever the model would rather write.

A model whose thoughts were taken away often writes no option at all: its accuracy by generation then falls below that
of a coin, which says more about its format than about what it knows. Here it only has to find the right option
likelier than the wrong one.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from coconut.batching import Row, Shape, align, write_row
from coconut.curriculum import SequenceRule, StagePlan
from coconut.errors import CoconutError
from coconut.latent.rollout import rollout_batch
from coconut.losses import scored_columns, token_losses
from coconut.model import Model
from coconut.sharding import replicate
from coconut.tokenizers import TextFormat, Tokenizer, encode_example
from coconut.types import Batch, Example


def with_other_option(example: Example) -> Example:
    """The example with the wrong option for an answer.

    Raises:
      CoconutError: it has no graph, or its answer does not name the target.
    """
    if example.graph is None:
        raise CoconutError("choosing between two options needs questions with a graph")
    target, negative = (example.graph.symbols[node] for node in (example.graph.target, example.graph.negative))
    words = example.answer.replace(".", " .").split()
    if target not in words:
        raise CoconutError(f"the answer {example.answer!r} does not name the target {target!r}")
    answer = " ".join(negative if word == target else word for word in words).replace(" .", ".")
    return dataclasses.replace(example, answer=answer)


def choose(
    model: Model,
    tokenizer: Tokenizer,
    rule: SequenceRule,
    examples: Sequence[Example],
    text_format: TextFormat,
    *,
    thoughts: int,
    batch_size: int = 64,
) -> int:
    """How many times the right option is likelier than the wrong one, straight behind ``thoughts`` fillers.

    The probability of an option is that of its whole answer, token by token. A tie is a wrong choice.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      rule: how its method writes an example down.
      examples: graph questions.
      text_format: how the parts of an example are written.
      thoughts: fillers of every question; no step is written.
      batch_size: options scored together.

    Raises:
      CoconutError: an example has no graph.
    """
    options = [option for example in examples for option in (example, with_other_option(example))]
    rows = [
        write_row(
            encode_example(tokenizer, option, text_format), StagePlan(len(option.steps), thoughts), rule, tokenizer
        )
        for option in options
    ]
    shape = Shape(max(len(row.prompt) for row in rows), thoughts, max(row.suffix for row in rows))
    losses = []
    for start in range(0, len(rows), batch_size):
        filled: list[Row | None] = list(rows[start : start + batch_size])
        filled += [None] * (batch_size - len(filled))
        batch = align(filled, shape, rule, pad_id=tokenizer.eos_id, latent_id=tokenizer.latent_id)
        losses.append(np.asarray(_answer_losses(model, batch)))
    right, wrong = np.concatenate(losses)[: len(rows)].reshape(-1, 2).T
    return int((right < wrong).sum())


@jax.jit
def _answer_losses(model: Model, batch: Batch) -> Float[Array, " B"]:
    """Minus the log-probability of each row's labels, in nats."""
    output = rollout_batch(model.decoder, model.feedback, batch)
    logits = model.decoder.unembed(output.predictors)
    return replicate(token_losses(logits, scored_columns(batch.labels, batch.schedule)).sum(1))
