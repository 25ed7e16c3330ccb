"""Reading what a model is given: its question, and whatever is thought before it writes by itself."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Key

from coconut.errors import CoconutError
from coconut.latent.generate import Prefix, prefill, run_given, think_on
from coconut.latent.thinkers import OneByOne, Thinker
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


def read(
    model: Model,
    batch: Batch,
    think: Thinker,
    *,
    latent_id: int,
    keys: Key[Array, " B"] | None = None,
    inputs: Float[np.ndarray, "B L D"] | None = None,
) -> tuple[Prefix, tuple[Float[Array | np.ndarray, "B K D"], ...]]:
    """Reads the columns of a batch span by span, and thinks where it has latent spans.

    Args:
      model: the model.
      batch: what it is given.
      think: how it makes thoughts.
      latent_id: id of the latent marker, which sweeps start from.
      keys: a key for each row, for feedbacks that draw.
      inputs: of all `latent_columns`, to be run in the place of thoughts; None for the model's own thoughts.

    Returns:
      What decoding goes on from, and the thoughts of each latent span; `latent_columns` says where in the batch they
      stand.
    """
    prefix, thoughts, start = None, [], 0
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
                made, inputs = inputs[:, : span.length], inputs[:, span.length :]
                prefix = run_given(model.decoder, prefix, made, counts, think=think)
                thoughts.append(made)
                continue
            prefix, made = think_on(
                *(model.decoder, model.feedback, prefix, counts),
                room=span.length,
                think=think,
                latent_id=None if isinstance(think, OneByOne) else latent_id,
                keys=keys,
            )
            thoughts.append(made)
    assert prefix is not None
    return prefix, tuple(thoughts)


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
