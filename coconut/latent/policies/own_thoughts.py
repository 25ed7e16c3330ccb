"""Policies that draw no thought of their own: the model's thoughts as they are, or under dropout masks."""

import dataclasses
from typing import no_type_check

import jax
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import Feedback
from coconut.latent.policies.policy import Record
from coconut.models.decoder import Decoder
from coconut.models.dropout import RowMasks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Deterministic:
    """The model's own thoughts: only what is written behind them is drawn.

    A group's samples all think the same, so that a reward says nothing of thoughts but through the gradient of what was
    written behind them. It is the baseline of every other policy: reinforcement learning on answers alone.

    Attributes:
      feedback: how a hidden state becomes the next thought.
    """

    feedback: Feedback

    def masks(self, keys: Key[Array, " B"], columns: Int[Array, " T"], latent: Bool[Array, " _"]) -> RowMasks | None:
        """The dropout of thoughts: none."""
        del keys, columns, latent

    def sample(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], keys: Key[Array, "*B"]
    ) -> tuple[Float[Array, "*B D"], Record]:
        """The thought itself; nothing has to be kept of it."""
        del keys
        return self.feedback(decoder, hidden), ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutMasks(Deterministic):
    """Thoughts under dropout masks that a row's key decides (Dropout-GRPO, arXiv 2606.10184, of which no code exists).

    One mask for each site of the network is drawn for a row and kept for all of its thoughts; what is read before and
    written behind them drops nothing. At replay the same masks make the same thoughts again, so the gradient reaches
    the parameters through the thoughts. Masks drawn ``afresh`` for each thought are LatentTTS's (arXiv 2510.07745),
    which also drops in the question.

    Attributes:
      rate: share of units dropped of what each layer adds to the residual stream. Static.
      afresh: draw other masks for each thought. Static.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    afresh: bool = dataclasses.field(metadata={"static": True})

    def masks(self, keys: Key[Array, " B"], columns: Int[Array, " T"], latent: Bool[Array, " _"]) -> RowMasks | None:
        """The masks of some columns.

        Args:
          keys: of each row.
          columns: index of each column in the whole sequence.
          latent: which columns of the whole sequence hold thoughts.
        """
        return RowMasks(keys, columns, latent, self.rate, self.afresh)


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutMasksOptions:
    """Options of ``kind = "dropout"``: the fields of `DropoutMasks`.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    rate: float = 0.1
    afresh: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.rate < 1:
            raise CoconutError(f"DropoutMasksOptions.rate = {self.rate!r}: must be between 0 and 1")
