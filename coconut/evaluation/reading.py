"""Reading what a model is given: its question, and whatever is thought before it writes by itself."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError
from coconut.latent.generate import Prefix, prefill, run_given, think_on
from coconut.latent.rollout import rollout_batch, walk
from coconut.latent.thinkers import OneByOne, Thinker
from coconut.latent.thoughts import Place
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Ids, Page, Placing, Text, Thoughts, given, has_blocks, with_thoughts
from coconut.tokenizers import TokenizedExample
from coconut.types import Batch, Language, Latent


def given_pages(
    method: Method, placing: Placing, examples: Sequence[TokenizedExample], thoughts: int | None = None
) -> list[Page]:
    """What a model is given of each example.

    Args:
      method: writes the pages.
      placing: the stage the model has reached, and the method's options.
      examples: the questions. Their steps are read where the method makes the number of thoughts depend on them.
      thoughts: of every block; None for what the method says.

    Raises:
      CoconutError: there is no block that as many thoughts could stand in, and the model opens none itself.
    """
    pages = [given(method.write_to_answer(example, placing)) for example in examples]
    if thoughts is None:
        return pages
    opens_blocks = method.halting(placing) is not None
    return [page if opens_blocks and not has_blocks(page) else with_thoughts(page, thoughts) for page in pages]


def open_last_block(page: Page) -> tuple[Page, Ids] | None:
    """A page that is given, up to its last block, which is left open, and what it has behind that block.

    None where it has no block, or one of no thoughts: at this stage the model was trained to think none.
    """
    last = max((index for index, part in enumerate(page) if isinstance(part, Thoughts)), default=None)
    if last is None or not page[last].count:
        return None
    behind = [part.ids for part in page[last + 1 :] if isinstance(part, Text)]
    return page[:last], np.concatenate([np.zeros(0, np.int32), *behind])


def pages_for_inputs(pages: Sequence[Page], inputs: Sequence[np.ndarray]) -> list[Page]:
    """The pages with room for inputs: the only block of a page is as long as its inputs are.

    A page of several blocks stays as it is: nothing says which of them another number of inputs is meant for.
    """
    fitted = []
    for page, own in zip(pages, inputs, strict=True):
        blocks = sum(isinstance(part, Thoughts) for part in page)
        fitted.append(with_thoughts(page, len(own)) if blocks == 1 else page)
    return fitted


def read(
    model: Model,
    batch: Batch,
    think: Thinker,
    *,
    latent_id: int,
    keys: Key[Array, " B"] | None = None,
    inputs: Float[np.ndarray, "B L D"] | None = None,
    given: Int[np.ndarray, " B"] | None = None,
) -> tuple[Prefix, tuple[Float[Array | np.ndarray, "B K D"], ...]]:
    """Reads the columns of a batch span by span, and thinks where it has latent spans.

    Args:
      model: the model.
      batch: what it is given.
      think: how it makes thoughts.
      latent_id: id of the latent marker, which sweeps start from.
      keys: a key for each row, for feedbacks that draw.
      inputs: of all `latent_columns`, to be run in the place of thoughts; None for the model's own thoughts.
      given: how many thoughts of each row, from its first, are run on ``inputs``: behind them the model thinks by
        itself. None for all of them.

    Returns:
      What decoding goes on from, and the thoughts of each latent span; `latent_columns` says where in the batch they
      stand.

    Raises:
      CoconutError: the model makes its thoughts together, so that none come behind others that are given.
    """
    if given is not None and not isinstance(think, OneByOne):
        raise CoconutError(f"{think}: thoughts that are made together are not made again behind some that are given")
    prefix, thoughts, start = None, [], 0
    left = np.full(len(batch.valid), batch.valid.shape[1]) if given is None else given
    for span in batch.schedule:
        columns = slice(start, start + span.length)
        start = columns.stop
        valid = batch.valid[:, columns]
        if isinstance(span, Language):
            prefix = prefill(model.decoder, batch.tokens[:, columns], valid, prefix)
        else:
            assert prefix is not None
            counts = valid.sum(1, dtype=np.int32)
            if inputs is not None:
                own, inputs = inputs[:, : span.length], inputs[:, span.length :]
                first = np.minimum(left, counts).astype(np.int32)
                left = left - first
                prefix = run_given(model.decoder, prefix, own, first, think=think)
                if given is None:
                    thoughts.append(own)
                    continue
            prefix, made = think_on(
                *(model.decoder, model.feedback, prefix, counts if inputs is None else counts - first),
                room=span.length,
                think=think,
                latent_id=None if isinstance(think, OneByOne) else latent_id,
                keys=keys,
            )
            thoughts.append(made if inputs is None else _behind(own, np.asarray(made), first))
    assert prefix is not None
    return prefix, tuple(thoughts)


def _behind(first: np.ndarray, made: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first ``counts`` columns of each row of ``first``, those of ``made`` from its first one behind them."""
    columns = np.arange(first.shape[1])[None] - counts[:, None]
    shifted = np.take_along_axis(made, np.maximum(columns, 0)[..., None], axis=1)
    return np.where((columns < 0)[..., None], first, shifted)


def teacher_forced(
    model: Model, batch: Batch, inputs: Float[Array, "B L D"] | None, think: Thinker
) -> Float[Array, "B S D"]:
    """The hidden states that predict the scored columns of a batch, whose text is given. Traceable.

    Args:
      model: the model.
      batch: rows with what they are asked and what they should write.
      inputs: of all `latent_columns`, run in the place of thoughts (`place_inputs`); None for the model's own.
      think: how it makes its own.
    """
    if inputs is None:
        return rollout_batch(model.decoder, model.feedback, batch, think=think).predictors
    # Nothing has to be made: columns of given inputs are read as text is.
    embedded = model.decoder.embed(batch.tokens).at[:, latent_columns(batch)].set(inputs)
    schedule = tuple(Language(span.length) if isinstance(span, Latent) else span for span in batch.schedule)
    return walk(
        model.decoder,
        model.feedback,
        schedule,
        embedded=embedded,
        place=Place(batch.positions, batch.valid, jnp.arange(embedded.shape[1])),
        past=(),
        last=jnp.zeros_like(embedded[:, 0]),
        think=think,
    ).predictors


def latent_columns(batch: Batch) -> Bool[np.ndarray, " T"]:
    """Which columns of a batch stand in latent spans."""
    return np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in batch.schedule])


def place_inputs(batch: Batch, inputs: Sequence[np.ndarray]) -> Float[np.ndarray, "B L D"]:
    """The inputs of each row in the `latent_columns` that it uses; zero in the others.

    Args:
      batch: whose rows they belong to.
      inputs: ``[K, D]`` of the first rows; the others use no latent columns.

    Raises:
      CoconutError: a row uses another number of latent columns than it has inputs.
    """
    used = batch.valid[:, latent_columns(batch)]
    placed = np.zeros((*used.shape, inputs[0].shape[1]), inputs[0].dtype)
    for row, own in enumerate(inputs):
        if len(own) != used[row].sum():
            raise CoconutError(f"row {row}: {len(own)} inputs are given in the place of {used[row].sum()} thoughts")
        placed[row, used[row]] = own
    return placed


def place_first_inputs(
    batch: Batch, inputs: Sequence[np.ndarray]
) -> tuple[Float[np.ndarray, "B L D"], Int[np.ndarray, " B"]]:
    """`place_inputs` in the first latent columns that each row uses, and how many these are.

    Args:
      batch: whose rows they belong to.
      inputs: ``[m, D]`` of the first rows; zero for the others.

    Raises:
      CoconutError: a row has more inputs than it uses latent columns.
    """
    used = batch.valid[:, latent_columns(batch)]
    placed = np.zeros((*used.shape, inputs[0].shape[1]), inputs[0].dtype)
    counts = np.zeros(len(used), np.int32)
    for row, own in enumerate(inputs):
        columns = np.flatnonzero(used[row])
        if len(own) > len(columns):
            raise CoconutError(f"row {row}: {len(own)} inputs are given in the place of {len(columns)} thoughts")
        placed[row, columns[: len(own)]], counts[row] = own, len(own)
    return placed, counts
