"""SIM-CoT (Wei et al. 2025, arXiv 2509.20317): a reader has to write each step from the thoughts that replace it.

The reader is a second decoder that only training needs. It sees the thoughts of one step as the beginning of its
input and writes the step; its loss reaches the thoughts. It is a term beside another method's: `SIMCOT` is Coconut with
a reader, `SIMCOT_CODI` CODI with one.

The released script of the Coconut variant never calls the code with this loss; the terms here are those of that code.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, no_type_check

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from coconut.errors import CoconutError, check_fields
from coconut.losses import Loss, Ratio, Term, score_labels
from coconut.methods.coconut import write_final_stage, write_with_thoughts
from coconut.methods.codi import CodiOptions, distilled, write_for_teacher
from coconut.methods.method import LossContext, Method, Views, imitate
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.models.parameters import decoder_of, decoder_parameters
from coconut.pages import Page, Placing, Text, Thoughts
from coconut.tokenizers import TokenizedExample
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, ModelOutput, Think

Ids = Int32[np.ndarray, "_"]


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How the reader reads.

    Attributes:
      reader: factor of the reader's loss; 0 leaves the reader out of training.
      missing: what a slot has to be read as whose example has no step for it: the ``answer`` (Coconut's variant),
        ``nothing`` (CODI's), or an ``error``, which ends the run before it starts.
      average: what the loss of a slot is divided by: ``rows`` that have something to read there, so that long steps
        weigh more (Coconut's variant), or ``tokens``.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    reader: float = 1.0
    missing: Literal["answer", "nothing", "error"] = "answer"
    average: Literal["rows", "tokens"] = "rows"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.reader < np.inf:
            raise CoconutError(f"{type(self).__name__}.reader = {self.reader!r}: must be at least 0")


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class SimcotCodiOptions(ReaderOptions, CodiOptions):
    """Options of `SIMCOT_CODI`: those of CODI and of the reader, with the defaults of the original's CODI variant."""

    missing: Literal["answer", "nothing", "error"] = "nothing"
    average: Literal["rows", "tokens"] = "tokens"

    def __post_init__(self) -> None:
        ReaderOptions.__post_init__(self)
        CodiOptions.__post_init__(self)


# --- What is read -------------------------------------------------------------------------------------------------


def steps_of_slots(steps: Sequence[Ids], slots: int, answer: Ids, missing: str) -> list[Ids]:
    """What each slot is read as, EOS at its end; empty for nothing.

    Steps are dealt out one a slot; the last slot gets all that are left.

    Raises:
      CoconutError: there are fewer steps than slots, and that is to be an error.
    """
    end = answer[-1:]
    texts = [*steps[: slots - 1], *([np.concatenate(steps[slots - 1 :])] if len(steps) >= slots else [])]
    texts = [np.concatenate([text, end]) for text in texts]
    if missing == "error" and len(texts) < slots:
        raise CoconutError(
            f"ReaderOptions.missing = 'error': an example has {len(texts)} steps for {slots} slots of thoughts"
        )
    filling = answer if missing == "answer" else answer[:0]
    return texts + [filling] * (slots - len(texts))


def _read_page(example: TokenizedExample, placing: Placing, steps: Sequence[Ids], slots: int, count: int) -> Page:
    """``question``, and for each slot its ``count`` thoughts and what they are read as."""
    if not slots:
        # A page needs something to learn from; without thoughts nobody reads it.
        return (Text(example.question), Text(example.answer, True, 0))
    texts = steps_of_slots(steps, slots, example.answer, placing.options.missing)
    parts = [part for n, text in enumerate(texts) for part in (Thoughts(count), Text(text, True, n))]
    return (Text(example.question), *parts)


def write_to_read(example: TokenizedExample, placing: Placing) -> Page:
    """What the reader of Coconut's thoughts sees: a slot for each ``c_thought`` thoughts of the stage.

    A step keeps its line's end, which the original cuts off before EOS.
    """
    [block] = [part for part in write_with_thoughts(example, placing) if isinstance(part, Thoughts)][:1]
    count = placing.curriculum.c_thought
    return _read_page(example, placing, block.stands_for, block.count // count if count else 0, count)


def write_to_read_codi(example: TokenizedExample, placing: Placing) -> Page:
    """What the reader of CODI's thoughts sees: each thought a slot, and one more behind the last thought.

    The steps are those that the teacher reads.
    """
    [block] = [part for part in write_final_stage(example, placing) if isinstance(part, Thoughts)][:1]
    steps = [step for step in example.steps if not isinstance(step, Think)]
    kept = steps if placing.options.keep_last_step else steps[:-1]
    return _read_page(example, placing, kept, block.count + 1 if block.count else 0, 1)


# --- Reading it ---------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """What the reader has to read, ``G`` slots of each row.

    Attributes:
      tokens: of each slot.
      labels: likewise; `IGNORED_LABEL` behind its end.
    """

    tokens: Int[Array, "B G S"]
    labels: Int[Array, "B G S"]


def slots_of(batch: Batch) -> Slots | None:
    """The slots of a view that `write_to_read` wrote; None where it has no thoughts."""
    starts, start, widths = [], 0, []
    for span, following in zip(batch.schedule, (*batch.schedule[1:], None), strict=True):
        start += span.length
        if isinstance(span, Latent):
            starts.append(start)
            widths.append(following.length if isinstance(following, Language) else 0)
    if not any(widths):
        return None
    room = max(widths)
    cut = lambda x, filling: jnp.stack(
        [
            jnp.pad(x[:, a : a + width], ((0, 0), (0, room - width)), constant_values=filling)
            for a, width in zip(starts, widths, strict=True)
        ],
        1,
    )
    return Slots(cut(batch.tokens, 0), cut(batch.labels, IGNORED_LABEL))


def read_slots(
    reader: Decoder, decoder: Decoder, thoughts: Float[Array, "B G C D"], slots: Slots, context: LossContext
) -> tuple[Float[Array, "B G S"], Bool[Array, "B G S"]]:
    """Cross-entropy of each token of each slot, and whether it is most likely.

    The reader sees a slot's thoughts and then its tokens, embedded by the *decoder's* own table; positions count from 1
    (both as in the original code). The last thought has to predict the first token.
    """
    # It runs as the model's own decoder does, layer by layer.
    execution = dataclasses.replace(decoder.execution, scan_layers=False)
    reader = decoder_of(reader.config, execution, decoder_parameters(reader))
    B, G, C, D = thoughts.shape
    S = slots.tokens.shape[2]
    inputs = jnp.concatenate([thoughts, decoder.embed(slots.tokens.reshape(B, -1)).reshape(B, G, S, D)], 2)
    labels = slots.labels.reshape(B * G, S)
    there = jnp.concatenate([jnp.ones((B * G, C), bool), labels != IGNORED_LABEL], 1)
    positions = jnp.broadcast_to(jnp.arange(1, C + S + 1), there.shape)
    dropout = context.dropout(reader, jnp.arange(C + S), C + S)
    hidden, _ = reader.trunk(inputs.reshape(B * G, C + S, D), positions=positions, valid=there, dropout=dropout)
    losses, right = score_labels(reader, hidden[:, C - 1 : -1], labels)
    return losses.reshape(B, G, S), right.reshape(B, G, S)


def reading_terms(
    model: Model, batch: Batch, thoughts: Float[Array, "B K D"], context: LossContext
) -> tuple[dict[str, Term], dict[str, Ratio]]:
    """The term ``steps``: the mean over all slots that have something to read of the mean loss of each.

    As in the original code, both means are those of a microbatch.

    Args:
      model: the model, with its reader.
      batch: the view that says what is to be read.
      thoughts: the thoughts of each row, those of a slot side by side.
      context: of the loss; its options say how it is averaged.
    """
    options: ReaderOptions = context.options
    slots = slots_of(batch)
    if slots is None:
        return {}, {}
    B, G, _ = slots.tokens.shape
    grouped = thoughts.reshape(B, G, -1, thoughts.shape[-1])
    losses, right = read_slots(model.parts["reader"], model.decoder, grouped, slots, context)
    known = slots.labels != IGNORED_LABEL
    weights = known if options.average == "tokens" else known.any(2, keepdims=True)
    number = weights.sum((0, 2))
    means = losses.sum((0, 2)) / jnp.maximum(number, 1)
    steps = Ratio(means.sum(), (number > 0).sum().astype(losses.dtype))
    read = Ratio(jnp.sum(right & known).astype(losses.dtype), known.sum().astype(losses.dtype))
    return {"steps": Term(steps, options.reader)}, {"reader_accuracy": read}


def make_reader(options: ReaderOptions, decoder: DecoderConfig, key: Key[Array, ""]) -> Mapping[str, Any]:
    """The reader: a decoder like the model's own. Its table has rows for the markers, which the original's has not."""
    del options
    return {"reader": Decoder(decoder, rngs=nnx.Rngs(key))}


def _with_terms(loss: Loss, terms: Mapping[str, Term], metrics: Mapping[str, Ratio]) -> Loss:
    return Loss({**loss.terms, **terms}, {**loss.metrics, **metrics})


def simcot_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """Coconut's loss and the reader's."""
    loss, output = imitate(model, views["main"], context)
    if not (context.options.reader and output.thoughts):
        return loss
    return _with_terms(loss, *reading_terms(model, views["read"], output.thoughts[0], context))


def simcot_codi_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """CODI's loss and the reader's, whose last slot is what would be thought next."""
    options = context.options
    loss, output, _ = distilled(model, views, context, every_hidden=bool(options.reader))
    if not (options.reader and output.thoughts):
        return loss
    return _with_terms(
        loss, *reading_terms(model, views["read"], _with_following(model, views["main"], output), context)
    )


def _with_following(model: Model, batch: Batch, output: ModelOutput) -> Float[Array, "B K D"]:
    """The thoughts of the only block, and the one that its last state would become."""
    index = next(index for index, span in enumerate(batch.schedule) if isinstance(span, Latent))
    end = sum(span.length for span in batch.schedule[: index + 1])
    assert output.hidden is not None
    following = model.feedback(model.decoder, output.hidden[:, end - 1 : end])
    return jnp.concatenate([output.thoughts[0], following.astype(output.thoughts[0].dtype)], 1)


SIMCOT = Method(
    name="simcot",
    pages={"main": write_with_thoughts, "read": write_to_read},
    options=ReaderOptions,
    parts=make_reader,
    train_only=frozenset({"reader"}),
    needs_steps=True,
    loss=simcot_loss,
)

SIMCOT_CODI = Method(
    name="simcot_codi",
    pages={"main": write_final_stage, "teacher": write_for_teacher, "read": write_to_read_codi},
    options=SimcotCodiOptions,
    parts=make_reader,
    train_only=frozenset({"reader"}),
    needs_steps=True,
    loss=simcot_codi_loss,
)
