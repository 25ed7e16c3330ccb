"""Choosing between the two options of a graph question, whatever the model would rather write.

A model whose thoughts were taken away often writes no option at all: its accuracy by generation then falls below that
of a coin, which says more about its format than about what it knows. Here it only has to find the right option
likelier than the wrong one.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from coconut.batching import align, page_shape
from coconut.errors import CoconutError, NotFiniteError
from coconut.evaluation.reading import given_pages, pages_for_inputs, place_inputs, teacher_forced
from coconut.latent.thinkers import Thinker
from coconut.latent.thoughts import check_positions
from coconut.losses import scored_columns, token_losses
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Page, Placing, Text
from coconut.sharding import replicate, rows_together
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
    method: Method,
    placing: Placing,
    examples: Sequence[Example],
    text_format: TextFormat,
    *,
    thoughts: int | None = None,
    inputs: Sequence[np.ndarray] | None = None,
    batch_size: int = 64,
) -> Bool[np.ndarray, " N"]:
    """Where the right option is likelier than the wrong one, straight behind the question and its thoughts.

    The probability of an option is that of its whole answer, token by token. A tie is a wrong choice.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      method: how an example is written down.
      placing: the stage it has reached, and its method's options.
      examples: graph questions.
      text_format: how the parts of an example are written.
      thoughts: of every block a question is given with; None for what the method says. No step is written.
      inputs: ``[K, D]`` of each question, run in the place of its thoughts (`coconut.evaluation.interventions`); None
        for the model's own.
      batch_size: options scored together, at most.

    Raises:
      CoconutError: an example has no graph, or no place for the thoughts that are asked for; a row is longer than a
        learned table of positions; or inputs are not as many as thoughts.
      NotFiniteError: the model gives numbers that are not finite.
    """
    options = [option for example in examples for option in (example, with_other_option(example))]
    encoded = [encode_example(tokenizer, option, text_format) for option in options]
    asked = given_pages(method, placing, encoded, thoughts)
    if inputs is not None:
        # A question stands in two rows.
        inputs = [own for own in inputs for _ in range(2)]
        asked = pages_for_inputs(asked, inputs)
    pages: list[Page] = [
        (*page, Text(option.answer, True, 0, True)) for page, option in zip(asked, encoded, strict=True)
    ]
    shape, batch_size = page_shape(pages), rows_together(batch_size, len(pages))
    losses = []
    for start in range(0, len(pages), batch_size):
        rows: list[Page | None] = list(pages[start : start + batch_size])
        batch = align(
            rows + [None] * (batch_size - len(rows)),
            shape,
            pad_id=tokenizer.eos_id,
            latent_id=tokenizer.latent_id,
            feeds_back=method.feeds_back(placing.options),
        )
        positions = np.where(batch.valid, batch.positions, -1)
        check_positions(model.decoder, int(positions.max()) + 1, "a question, its thoughts and an option")
        given = None if inputs is None else place_inputs(batch, inputs[start : start + batch_size])
        losses.append(np.asarray(_answer_losses(model, batch, given, method.think(placing.options))))
    scores = np.concatenate(losses)[: len(pages)]
    if not np.isfinite(scores).all():
        raise NotFiniteError("the probability of an option is not finite: the model is broken")
    right, wrong = scores.reshape(-1, 2).T
    return right < wrong


@functools.partial(jax.jit, static_argnames="think")
def _answer_losses(
    model: Model, batch: Batch, inputs: Float[Array, "B L D"] | None, think: Thinker
) -> Float[Array, " B"]:
    """Minus the log-probability of each row's labels, in nats."""
    logits = model.decoder.unembed(teacher_forced(model, batch, inputs, think))
    return replicate(token_losses(logits, scored_columns(batch.labels, batch.schedule)).sum(1))
