"""The contract of a method."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from coconut.latent.feedback import draws
from coconut.latent.halting import HaltingConfig
from coconut.latent.rollout import rollout_batch
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.losses import Loss, Term, language_loss, thought_metrics
from coconut.methods.multi_token import second_token_loss
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.models.dropout import Dropout
from coconut.models.multi_token import MULTI_TOKEN, MultiToken
from coconut.pages import Page, Placing, Write
from coconut.tokenizers import TokenizedExample
from coconut.types import Batch, ModelOutput

Views = Mapping[str, Batch]
"""The batches of one step: ``main`` and whatever other views of the same examples a method asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a method that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossContext:
    """What a loss is told beside the model and its batches.

    Attributes:
      options: of the method.
      think: how the method makes its thoughts.
      key: of this step and microbatch, for dropout and for what a feedback draws; None for neither.
    """

    options: Any = NoOptions()
    think: Thinker = OneByOne()  # noqa: RUF009 - immutable
    key: Key[Array, ""] | None = None

    def dropout(self, decoder: Decoder, columns: Int[Array, " T"], total: int) -> Dropout | None:
        """The dropout of some columns of a sequence of ``total``, for losses that call a decoder themselves."""
        if self.key is None or not decoder.drops:
            return None
        return Dropout(self.key, columns, total, decoder.config.dropout)

    def rollout(
        self, model: Model, batch: Batch, *, every_hidden: bool = False, observed: Int[Array, "B O"] | None = None
    ) -> ModelOutput:
        """The rollout of a view, as the method thinks; see `coconut.latent.rollout.rollout` for the arguments."""
        keys = None
        if self.key is not None and draws(model.feedback):
            rows = jnp.arange(batch.tokens.shape[0])
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(self.key, _DRAWS), rows)
        return rollout_batch(
            *(model.decoder, model.feedback, batch, self.key),
            think=self.think,
            keys=keys,
            every_hidden=every_hidden,
            observed=observed,
        )


_DRAWS = 1  # Keeps what a feedback draws apart from dropout.


LossFunction = Callable[[Model, Views, LossContext], Loss]
MakeParts = Callable[[Any, DecoderConfig, Key[Array, ""]], Mapping[str, Any]]


def imitation_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """Cross-entropy of what is written, given the thoughts before it: Coconut's loss, and that of its controls."""
    return imitate(model, views["main"], context)[0]


def imitate(
    model: Model,
    batch: Batch,
    context: LossContext,
    *,
    every_hidden: bool = False,
    observed: Int[Array, "B O"] | None = None,
) -> tuple[Loss, ModelOutput]:
    """`imitation_loss` of a view, and the rollout it is made of, for methods that add terms to it.

    A model with a module for further tokens has their term, too (`coconut.methods.multi_token`).
    """
    module: MultiToken | None = model.parts.get(MULTI_TOKEN)
    output = context.rollout(model, batch, every_hidden=every_hidden or module is not None, observed=observed)
    loss, metrics = language_loss(model.decoder, batch, output)
    terms = {"language": Term(loss)}
    if module is not None:
        further, own = second_token_loss(model.decoder, module, batch, output)
        terms[MULTI_TOKEN] = Term(further, module.weight)
        metrics = metrics | own
    return Loss(terms, metrics | thought_metrics(model.decoder, batch, output)), output


def no_parts(options: Any, decoder: DecoderConfig, key: Key[Array, ""]) -> Mapping[str, Any]:
    """What a method adds to the model: nothing."""
    del options, decoder, key
    return {}


def train_everything(name: str) -> bool:
    """Whether a parameter is trained: every one is."""
    del name
    return True


def one_by_one(options: Any) -> Thinker:
    """How thoughts are made: each of the state before it."""
    del options
    return OneByOne()


def never_restarts(placing: Placing, longest: int) -> int:
    """A number that never changes."""
    del placing, longest
    return 0


def opens_no_block(placing: Placing) -> HaltingConfig | None:
    """How a block ends that the model opens itself: it opens none."""
    del placing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What differs between methods. A method is one of these, in a file of its own (`coconut.methods.register_method`).

    Attributes:
      name: as in configs and tables.
      pages: how an example is written down, by name; ``main`` comes first and is what is answered. Others are further
        views of the same example, and become further batches of the same step.
      options: the class of its own options: a frozen dataclass whose fields all have defaults.
      parts: what it adds to the model, from its options, the decoder's config and a key; traceable by JAX. Each part is
        a pytree, whose parameters are named ``PART.PATH``. One that is a decoder itself starts as a copy of the model's
        own where that was trained before.
      train_only: names of parts that checkpoints hold, and that are neither loaded for evaluation nor exported.
      trains: whether a parameter is trained, given its name; the others are frozen, and have no moments.
      think: from its options how thoughts are made, in training and in answering.
      halting: when a block is over that the model opens itself, from what a page is written by; None where the start
        marker is a token like others when the model writes it.
      ends_blocks: whether the model itself ends the last block before the answer, too, by its ``halting``; else that
        block has as many thoughts as its page says.
      restarts: a number; where it is another one than at the step before, the optimizer starts anew, beside what
        `coconut.curriculum.CurriculumConfig.reset_optimizer` says. Its arguments are the placing of the run, without a
        draw, and the tokens of the longest chain of the training data.
      needs_steps: whether there is nothing for it to learn in data without any steps.
      reads_pages: whether its loss runs the model over rows as they are written down, by `imitate`; else rows are made
        of them that nobody else knows, so that further tokens cannot be predicted nor experts be counted on them.
      loss: from the model, the views and the context to terms and metrics. It calls the rollout, once or more often.
    """

    name: str
    pages: Mapping[str, Write]
    options: type = NoOptions
    parts: MakeParts = no_parts
    train_only: frozenset[str] = frozenset()
    trains: Callable[[str], bool] = train_everything
    think: Callable[[Any], Thinker] = one_by_one
    halting: Callable[[Placing], HaltingConfig | None] = opens_no_block
    ends_blocks: bool = False
    restarts: Callable[[Placing, int], int] = never_restarts
    needs_steps: bool = False
    reads_pages: bool = True
    loss: LossFunction = imitation_loss

    def write_to_answer(self, example: TokenizedExample, placing: Placing) -> Page:
        """The page of an example that is to be answered."""
        return self.pages["main"](example, dataclasses.replace(placing, answering=True))

    @property
    def packs(self) -> bool:
        """Whether its rows may hold several examples: one view, whose loss is `imitation_loss`, knows them apart."""
        return self.loss is imitation_loss and len(self.pages) == 1

    def feeds_back(self, options: Any) -> bool:
        """Whether thoughts are hidden states fed back; without sweeps they are pause tokens, known beforehand."""
        return self.think(options) != Sweeps(count=0)
