"""A latent scorer: how good a trajectory of thoughts is, thought by thought.

It is the LatentRM of LatentTTS (arXiv 2510.07745): a decoder of its own, which starts as a copy of the one
that thinks, and a linear head, which gives the state of each thought's column a score. The score of a trajectory is the
sum over its thoughts, so that one that is not finished yet has a score, too: the sum so far
(`coconut.latent.beam_search`). Scores compare the trajectories of one question; a bias of the head would cancel, and
there is none.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coconut.errors import CoconutError
from coconut.latent.generate import Prefix, place_behind, prefill
from coconut.latent.policies.config import PolicyConfig
from coconut.latent.thoughts import trunk
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.types import Batch, Language, Latent, Schedule

DECODER_PART, HEAD_PART = "scorer", "scorer_head"
"""Names of a scorer's parts in the model of the run that trains it."""


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class ScoreHead:
    """A vector, which starts at 0.

    Attributes:
      kernel: the vector.
    """

    kernel: Any

    @classmethod
    def fresh(cls, decoder: DecoderConfig) -> "ScoreHead":
        """The head as it starts."""
        return cls(nnx.Param(jnp.zeros(decoder.embed_dim, jnp.dtype(decoder.param_dtype)), axes=("embed",)))

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """The score of each state, in at least float32."""
        wide = decoder.execution.accumulation_dtype
        return hidden.astype(wide) @ self.kernel[...].astype(wide)


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True)
class LatentScorer:
    """Scores thoughts. A JAX pytree: its leaves are parameters.

    Attributes:
      decoder: reads the question and the thoughts.
      head: scores the states of the thoughts' columns.
    """

    decoder: Decoder
    head: ScoreHead

    def read(self, batch: Batch, active: Bool[Array, " Q"] | None = None) -> Prefix:
        """Reads what stands before the thoughts of each question.

        Args:
          batch: what is given of each question, with one block of thoughts.
          active: rows that are questions; the others only fill the batch.
        """
        return read_question(self.decoder, batch, active)

    def scores(self, prefix: Prefix, thoughts: Float[Array, "B K D"], used: Bool[Array, "B K"]) -> Float[Array, "B K"]:
        """The score of each thought of some trajectories, in one parallel pass; 0 of those not used. Differentiable.

        Args:
          prefix: the questions (`read`), each of which has equally many trajectories, which follow each other.
          thoughts: what the columns of the thoughts were fed.
          used: which of them there are, from the left.
        """
        asked = prefix.shared(len(thoughts) // len(prefix.last))
        place = place_behind(self.decoder, asked, used)
        inputs = jnp.where(used[..., None], thoughts, 0.0).astype(self.decoder.execution.compute_dtype)
        hidden, _ = trunk(self.decoder, inputs, place, asked.past)
        return jnp.where(used, self.head(self.decoder, hidden), 0.0)


def block_columns(schedule: Schedule) -> slice:
    """The columns of the only block of thoughts.

    Raises:
      CoconutError: there is none, or several.
    """
    start, found = 0, []
    for span in schedule:
        if isinstance(span, Latent):
            found.append(slice(start, start + span.length))
        start += span.length
    if len(found) != 1 or not isinstance(schedule[0], Language):
        raise CoconutError(f"a scorer reads one block of thoughts behind a question, and here are {len(found)}")
    return found[0]


def thoughts_of(batch: Batch) -> Int[Array, " Q"]:
    """How many thoughts the only block of each row has."""
    return jnp.asarray(batch.valid)[:, block_columns(batch.schedule)].sum(1, dtype=jnp.int32)


def read_question(decoder: Decoder, batch: Batch, active: Bool[Array, " Q"] | None = None) -> Prefix:
    """What stands before the only block of thoughts of each row, read in one pass; see `LatentScorer.read`."""
    before = slice(0, block_columns(batch.schedule).start)
    valid = jnp.asarray(batch.valid)[:, before]
    if active is not None:
        # What fills the batch reads one token, so that its softmax has something to see.
        valid |= ~active[:, None] & (jnp.arange(before.stop) == 0)
    return prefill(decoder, jnp.asarray(batch.tokens)[:, before], valid)


def check_scored(policy: PolicyConfig, field: str) -> None:
    """Looks whether a policy makes trajectories that a scorer tells apart.

    Args:
      policy: how thoughts are drawn.
      field: what asks for it, for the error message.

    Raises:
      CoconutError: it draws no thoughts, so that all trajectories of a question are the same or are not kept as what
        columns were fed; or it ends them behind a number of thoughts of their own.
    """
    if policy.kind in ("deterministic", "dropout"):
        raise CoconutError(
            f"{field}: PolicyConfig.kind = {policy.kind!r} draws no thoughts that a scorer could compare; take one "
            "that does, such as 'gaussian'"
        )
    if policy.learnt_stop:
        raise CoconutError(
            f"{field}: PolicyConfig.learnt_stop = True: sums of scores compare trajectories of equally many thoughts"
        )
