"""How likely a model finds given texts, each behind a context and the thoughts that follow the context."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from coconut.batching import align, page_shape
from coconut.errors import CoconutError, NotFiniteError
from coconut.evaluation.reading import given_pages, teacher_forced
from coconut.latent.thinkers import Thinker
from coconut.latent.thoughts import check_positions
from coconut.losses import score_labels, scored_columns
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Ids, Page, Placing, Text, has_blocks, question_alone
from coconut.sharding import replicate
from coconut.tokenizers import Tokenizer
from coconut.types import IGNORED_LABEL, Batch


def log_likelihoods(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    contexts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    thoughts: int | None = None,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[Float32[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """The log-probability of each continuation behind its context, and whether it is what the model would write.

    A row is ``context, what the method writes behind a question, continuation``. For Coconut that is ``context <start>
    thoughts <end> continuation``: the thoughts stand behind the whole context, and before the first token of the
    continuation. Blocks that a model opens while it writes are none of them. A
    feedback that draws takes the mean of its distribution.

    Rows of like length share a batch, so that each needs few columns of padding and few programs are compiled.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      method: how a question is written down.
      placing: the stage it has reached, and its method's options.
      contexts: ids of each context, at least one. They take the place of a question whose steps nobody knows.
      continuations: ids of each continuation; for one of none the log-probability is 0.
      thoughts: of every block behind a context; None for as many as a question gets that has as many steps as the
        curriculum replaces at most.
      batch_size: rows scored together.
      advance: called with the number of rows after each batch.

    Returns:
      Sums over the tokens of a continuation, in nats, of the whole vocabulary's log-softmax; and whether each of its
      tokens is the likeliest where it stands.

    Raises:
      CoconutError: the method has no place for the thoughts that are asked for, or lets the model itself end them; or
        all but the last token of a row is longer than a learned table of positions.
      NotFiniteError: the model gives numbers that are not finite.
    """
    examples = [question_alone(context, placing.curriculum) for context in contexts]
    asked = given_pages(method, placing, examples, thoughts)
    _check_thoughts(method, asked, thoughts)
    pages: list[Page] = [(*page, Text(own, True, 0, True)) for page, own in zip(asked, continuations, strict=True)]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (context, own) in enumerate(zip(contexts, continuations, strict=True)):
        groups.setdefault((len(context).bit_length(), len(own).bit_length()), []).append(index)
    scores, greedy = np.zeros(len(pages), np.float32), np.zeros(len(pages), bool)
    for group in groups.values():
        shape = page_shape(pages[index] for index in group)
        for start in range(0, len(group), batch_size):
            here = group[start : start + batch_size]
            rows: list[Page | None] = [pages[index] for index in here]
            batch = align(
                rows + [None] * (batch_size - len(here)),
                shape,
                pad_id=tokenizer.eos_id,
                latent_id=tokenizer.latent_id,
                feeds_back=method.feeds_back(placing.options),
            )
            last = int(np.where(batch.valid, batch.positions, -1).max())
            # A row's last token is predicted, and then nobody looks back on its column: it needs no position.
            check_positions(model.decoder, last, "a context, its thoughts and a continuation")
            batch = dataclasses.replace(batch, positions=np.minimum(batch.positions, max(last - 1, 0)))
            own_scores, own_greedy = _score(model, batch, method.think(placing.options))
            scores[here], greedy[here] = np.asarray(own_scores)[: len(here)], np.asarray(own_greedy)[: len(here)]
            advance(len(here))
    if not np.isfinite(scores).all():
        first = int(np.argmin(np.isfinite(scores)))
        raise NotFiniteError(f"the probability of continuation {first} is not finite: the model is broken")
    return scores, greedy


def _check_thoughts(method: Method, pages: Sequence[Page], thoughts: int | None) -> None:
    """Looks whether the pages say how many thoughts the model has.

    Raises:
      CoconutError: the model says it itself, or they have no block for those that are asked for.
    """
    if thoughts and not all(map(has_blocks, pages)):
        raise CoconutError(
            f"--thoughts {thoughts}: at this stage the method {method.name!r} begins to think where the model writes "
            "so, and has no thoughts straight behind a context"
        )
    if thoughts is None and method.ends_blocks:
        raise CoconutError(
            f"the method {method.name!r} lets the model end its thoughts: the log-probability of a text needs a given "
            "number of them (--thoughts K)"
        )


@functools.partial(jax.jit, static_argnames="think")
def _score(model: Model, batch: Batch, think: Thinker) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The log-probability of each row's labels, in nats, and whether each label is the likeliest token."""
    labels = scored_columns(batch.labels, batch.schedule)
    losses, likeliest = score_labels(model.decoder, teacher_forced(model, batch, None, think), labels)
    return replicate((-losses.sum(1), jnp.where(labels == IGNORED_LABEL, True, likeliest).all(1)))
