"""SwiReasoning (Shi et al. 2025, arXiv 2510.05069): soft thoughts and written tokens by turns. Nothing is trained.

A row begins to think softly: it is fed the mean embedding of its next token. Once it is surer of that token than it was
when it began to, it writes instead; and where it becomes less sure again, it thinks softly once more, if it has written
for long enough. How sure it is, the entropy of the next token says, without any temperature. A budget of switches ends
rows that go on for ever: past it each switch to writing first urges the row to end its thinking, later to answer.

A turn is a thought or a token here, and both count as tokens against a limit.
"""

import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coconut.errors import CoconutError, check_fields
from coconut.latent.halting import Blocks, Mode, no_turns, token_entropy
from coconut.latent.mixture import blend
from coconut.models.decoder import Decoder


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiReasoningConfig:
    """How a model switches between soft thoughts and written tokens. The defaults are those published with the method.

    Attributes:
      alpha: share of the soft thought in the first one after a switch from writing; the rest is the embedding of
        ``start``. It grows to 1 as the row comes to its limit.
      beta: likewise, of the first input after a switch to writing, whose rest is the embedding of ``end``.
      window: turns that a row writes at least before it may think softly again.
      switches: switches to writing from which on each one has the row read ``end``; past twice as many it has it read
        ``lead``, too, and answer. What it is made to read ends nothing by itself. None for no such budget.
      answer_tokens: tokens of a row from that last switch on, the lead included.
      first: text of one token whose embedding has a share of ``first_share`` in the first thought of all.
      first_share: see ``first``.
      start: text of one token that begins to think, and is read behind the question. Empty for a model that has none:
        then nothing is mixed in for it.
      end: text of one token that ends the thinking: a row that writes it itself switches no more. Empty for none.
      lead: see ``switches``.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    alpha: float = 1.0
    beta: float = 0.7
    window: int = 512
    switches: int | None = None
    answer_tokens: int = 32
    first: str = "\n"
    first_share: float = 0.1
    start: str = "<think>"
    end: str = "</think>"
    lead: str = "\n\nThe final answer is"

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("alpha", "beta", "first_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise CoconutError(
                    f"SwiReasoningConfig.{field} = {getattr(self, field)!r}: must be a share, from 0 to 1"
                )
        for field in ("window", "switches", "answer_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise CoconutError(f"SwiReasoningConfig.{field} = {value!r}: must be at least 1")


class Turns(NamedTuple):
    """What the rows have done so far, and what they decide by.

    Attributes:
      blocks: what they thought and wrote.
      explicit: rows that write.
      stayed: turns since each row's last switch.
      reference: entropy at its last switch, in nats.
      closed: rows that ended their thinking.
      switches: how often it switched to writing.
      left: tokens that it has still to read.
      budget: tokens that it may still make.
    """

    blocks: Blocks
    explicit: Bool[Array, " B"]
    stayed: Int[Array, " B"]
    reference: Float[Array, " B"]
    closed: Bool[Array, " B"]
    switches: Int[Array, " B"]
    left: Int[Array, " B"]
    budget: Int[Array, " B"]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiReasoning:
    """What `coconut.latent.generate.decode` needs for rows that switch. Each begins to think where its prefix ends.

    Attributes:
      config: when and how. Static.
      first_id: id of ``SwiReasoningConfig.first``. Static.
      start_id: id of its ``start``, or None. Static.
      end_id: id of its ``end``, or None. Static.
      lead_ids: ids of its ``lead``. Static.
      keep_inputs: return the thoughts. Static.
    """

    config: SwiReasoningConfig = dataclasses.field(metadata={"static": True})
    first_id: int = dataclasses.field(metadata={"static": True})
    start_id: int | None = dataclasses.field(metadata={"static": True})
    end_id: int | None = dataclasses.field(metadata={"static": True})
    lead_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    keep_inputs: bool = dataclasses.field(default=False, metadata={"static": True})

    latent_id = None
    keys = None
    room = 0

    def ready(self, decoder: Decoder) -> "SwiReasoning":
        """Itself: there is nothing to prepare."""
        del decoder
        return self

    def begin(self, done: Bool[Array, " B"], turns: int, width: int, dtype: jnp.dtype) -> Turns:
        """The state before the first of so many turns."""
        none, never = jnp.zeros(done.shape, jnp.int32), jnp.zeros(done.shape, bool)
        blocks = no_turns(done, turns, width, dtype, opened=None, keep_inputs=self.keep_inputs)
        return Turns(
            blocks=blocks._replace(number=(~done).astype(jnp.int32)),
            explicit=never,
            stayed=none,
            reference=jnp.zeros(done.shape, jnp.float32),
            closed=never,
            switches=none,
            left=none,
            budget=jnp.full(done.shape, jnp.iinfo(jnp.int32).max),
        )

    def turn(
        self,
        state: Turns,
        done: Bool[Array, " B"],
        decoder: Decoder,
        *,
        hidden: Float[Array, "B D"],
        logits: Float[Array, "B V"],
        chosen: Int[Array, " B"],
        here: Any,
        index: Int[Array, ""],
        eos_id: int,
        limit: int,
    ) -> tuple[Turns, Bool[Array, " B"], Int[Array, " B"], Float[Array, "B D"]]:
        """One turn of every row; see `coconut.latent.halting.Thinking.turn`."""
        del hidden, here
        config, embed = self.config, decoder.embed
        entropy = token_entropy(logits).astype(jnp.float32)
        reads = state.left > 0
        token = jnp.where(reads, self._to_read(state), chosen)
        closed = state.closed if self.end_id is None else state.closed | (~reads & (chosen == self.end_id))

        # Who switches. In the first turn there is nothing to compare with.
        later = index > 0
        reference, stayed = jnp.where(later, state.reference, entropy), state.stayed + later
        to_explicit = later & ~state.explicit & ~closed & (entropy < reference)
        to_soft = state.explicit & ~closed & ~reads & (entropy > reference) & (stayed >= config.window)
        switched = to_explicit | to_soft
        explicit = (state.explicit | to_explicit | closed) & ~to_soft
        switches = state.switches + to_explicit

        # What each row is fed.
        share = index / limit
        soft = blend(decoder, jax.nn.softmax(logits))
        mixed = lambda kept, id: (kept * soft + (1 - kept) * embed(jnp.asarray(id))).astype(soft.dtype)
        first = mixed(1 - config.first_share, self.first_id)
        thought = (
            soft
            if self.start_id is None
            else self._where(to_soft, mixed(_ramp(config.alpha, share), self.start_id), soft)
        )
        thought = jnp.where(later, thought, first)
        written = embed(token)
        if self.end_id is not None:
            written = self._where(to_explicit, mixed(_ramp(config.beta, share), self.end_id), written)
        thinks = ~explicit & ~reads & ~done & (token != eos_id)
        inputs = self._where(thinks, thought, written)

        # Where the budget of switches is used up, what comes next is said for the row.
        left, budget = state.left - reads, state.budget
        if config.switches is not None:
            end = 0 if self.end_id is None else 1
            last = to_explicit & (switches > 2 * config.switches)
            urged = to_explicit & (switches >= config.switches)
            left = jnp.where(last, end + len(self.lead_ids), jnp.where(urged, end, left))
            budget = jnp.where(last, config.answer_tokens, budget) - 1

        token = jnp.where(done, eos_id, token)
        ended = ~done & ~reads & (token == eos_id)
        mode = jnp.where(reads, Mode.READING, jnp.where(thinks, Mode.THINKING, Mode.WRITING))
        mode = jnp.where(done, Mode.DONE, mode).astype(jnp.int8)
        blocks = state.blocks
        blocks = blocks._replace(
            modes=jax.lax.dynamic_update_slice_in_dim(blocks.modes, mode[:, None], index, axis=1),
            thoughts=blocks.thoughts + thinks,
            written=blocks.written + (~thinks & ~done),
            number=blocks.number + (to_soft & ~done),
            ended=blocks.ended | ended,
        ).keep(thought, thinks, index)
        following = Turns(
            blocks=blocks,
            explicit=explicit,
            stayed=jnp.where(switched, 0, stayed),
            reference=jnp.where(switched, entropy, reference),
            closed=closed,
            switches=switches,
            left=left,
            budget=budget,
        )
        return following, done | ended | (budget <= 0), token, inputs

    def blocks(self, state: Turns) -> Blocks:
        """What the rows thought and wrote."""
        return state.blocks

    def _to_read(self, state: Turns) -> Int[Array, " B"]:
        """The next of the tokens that each row has to read: the end marker, and the lead where it has to answer."""
        end = () if self.end_id is None else (self.end_id,)
        said = jnp.asarray([*end, *self.lead_ids, 0], jnp.int32)
        last = state.switches > 2 * (self.config.switches or 0)
        count = jnp.where(last, len(end) + len(self.lead_ids), len(end))
        return said[jnp.clip(count - state.left, 0, said.size - 1)]

    @staticmethod
    def _where(rows: Bool[Array, " B"], yes: Float[Array, "B D"], no: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return jnp.where(rows[:, None], yes, no)


def _ramp(start: float, share: Float[Array, ""]) -> Float[Array, ""]:
    """From ``start`` at the first turn to 1 at the last."""
    return start + (1 - start) * share
