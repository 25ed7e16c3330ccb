"""When a row of a generation thinks, and when it stops: settings, stop heads, and what each row has done so far.

A row that writes the start marker thinks. Before each further thought its block may be over: by count, or by what the
state of the block's last column says. Then the row reads the end marker, and writes on. So a model decides itself how
often it thinks, and how long.
"""

import dataclasses
import enum
from typing import Literal, NamedTuple, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import Feedback
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.models.decoder import Decoder


@runtime_checkable
class Halt(Protocol):
    """A stop head: from a hidden state to the logit of the probability that its block is over.

    It is a JAX pytree; its leaves are parameters.
    """

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Makes the logit from the hidden state (after the final norm) of a block's last column."""
        ...


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class HaltingConfig:
    """When a block is over that a model thinks on its own.

    What stops a block looks at its last column so far: its last thought, or the start marker where ``least`` is 0.

    Attributes:
      stop: ``count``, behind ``most`` thoughts, or a number of each row's own between ``least`` and ``most``
        (`Thinking.counts`); ``head``, where a stop head's probability reaches ``threshold`` (`Halt`); ``token``, where
        the most likely token is one of ``tokens``; ``entropy``, where the entropy of the distribution of tokens falls
        below ``threshold``, in nats.
      least: thoughts a block has at least.
      most: thoughts a block has at most.
      room: thoughts a row has at most, in all of its blocks. A row that opens a block with less room left than the
        block needs is cut there (`Blocks.cut`).
      threshold: see ``stop``; None for those that need none.
      tokens: see ``stop``; empty for the others.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    stop: Literal["count", "head", "token", "entropy"] = "count"
    least: int = 1
    most: int = 6
    room: int = 24
    threshold: float | None = None
    tokens: tuple[Literal["end", "eos"], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.least < 0:
            raise CoconutError(f"HaltingConfig.least = {self.least!r}: must be at least 0")
        if self.most < max(self.least, 1):
            raise CoconutError(f"HaltingConfig.most = {self.most!r}: must be at least 1, and least = {self.least}")
        if self.room < self.most:
            raise CoconutError(f"HaltingConfig.room = {self.room!r}: must be at least most = {self.most}")
        if (self.threshold is not None) != (self.stop in ("head", "entropy")):
            needs = "takes none" if self.threshold is not None else "needs one"
            raise CoconutError(f"HaltingConfig.threshold = {self.threshold!r}: stop = {self.stop!r} {needs}")
        if self.threshold is not None and not (self.threshold > 0 and (self.stop == "entropy" or self.threshold < 1)):
            allowed = "above 0" if self.stop == "entropy" else "between 0 and 1"
            raise CoconutError(f"HaltingConfig.threshold = {self.threshold!r}: must be {allowed}")
        if bool(self.tokens) != (self.stop == "token"):
            needs = "takes none" if self.tokens else "needs at least one"
            raise CoconutError(f"HaltingConfig.tokens = {self.tokens!r}: stop = {self.stop!r} {needs}")


class Mode(enum.IntEnum):
    """What a row does in a turn."""

    READING = 0  # the end marker, because its block is over
    THINKING = 1
    WRITING = 2
    DONE = 3


class Blocks(NamedTuple):
    """What the rows of a generation have thought and written so far.

    Attributes:
      modes: what each row did in each turn (`Mode`).
      inputs: the thoughts, zero in other columns; None where they were not asked for.
      open: rows in the middle of a block.
      made: thoughts of each row's last block.
      thoughts: thoughts of each row, in all blocks.
      written: tokens of each row, the start and end markers and its EOS included.
      number: blocks of each row, with the one that its prefix opened.
      ended: rows that wrote EOS.
      cut: rows that ended because they wrote the start marker with too little room left, of thoughts or of tokens.
    """

    modes: Int8[Array, "B S"]
    inputs: Float[Array, "B S D"] | None
    open: Bool[Array, " B"]
    made: Int[Array, " B"]
    thoughts: Int[Array, " B"]
    written: Int[Array, " B"]
    number: Int[Array, " B"]
    ended: Bool[Array, " B"]
    cut: Bool[Array, " B"]

    def keep(self, thoughts: Float[Array, "B D"], thinks: Bool[Array, " B"], index: Int[Array, ""]) -> "Blocks":
        """The same with the thoughts of a turn, of the rows that think, where they were asked for."""
        if self.inputs is None:
            return self
        made = jnp.where(thinks[:, None], thoughts, 0.0)[:, None]
        return self._replace(inputs=jax.lax.dynamic_update_slice_in_dim(self.inputs, made, index, axis=1))


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinking:
    """What `coconut.latent.generate.decode` needs for rows that think on their own.

    Attributes:
      feedback: how a hidden state becomes the next thought.
      config: when a block is over. Static.
      start_id: id of the marker that opens a block. Static.
      latent_id: id that stands for a thought in what is returned. Static.
      end_id: id of the marker that is read behind a block. Static.
      think: how the model was trained to think. Static. A block whose end is not known is made one by one, which is
        the same for `OneByOne` and for enough sweeps.
      halt: the stop head, for ``stop = "head"``.
      counts: thoughts of each row's blocks, for ``stop = "count"``; None for ``most``.
      opened: rows whose prefix ends with the start marker; None for none.
      keys: a key for each row, for feedbacks that draw.
      keep_inputs: return the thoughts. Static.
    """

    feedback: Feedback
    config: HaltingConfig = dataclasses.field(metadata={"static": True})
    start_id: int = dataclasses.field(metadata={"static": True})
    latent_id: int = dataclasses.field(metadata={"static": True})
    end_id: int = dataclasses.field(metadata={"static": True})
    think: Thinker = dataclasses.field(default=OneByOne(), metadata={"static": True})
    halt: Halt | None = None
    counts: Int[Array, " B"] | None = None
    opened: Bool[Array, " B"] | None = None
    keys: Key[Array, " B"] | None = None
    keep_inputs: bool = dataclasses.field(default=False, metadata={"static": True})

    def check(self) -> None:
        """Compares the parts with each other.

        Raises:
          CoconutError: a stop head or counts that the config does not use, or lacks; or sweeps that thoughts made one
            by one do not equal.
        """
        stop, most = self.config.stop, self.config.most
        if (self.halt is not None) != (stop == "head"):
            raise CoconutError(
                f"HaltingConfig.stop = {stop!r}: {'needs a' if self.halt is None else 'takes no'} stop head"
            )
        if self.counts is not None and stop != "count":
            raise CoconutError(f"HaltingConfig.stop = {stop!r}: takes no number of thoughts for each row")
        if isinstance(self.think, Sweeps) and self.think.count < most:
            raise CoconutError(
                f"Sweeps.count = {self.think.count}: a block that the model opens itself is made one by one, which "
                f"equals sweeps only where there are as many as thoughts; set HaltingConfig.most = {most} no higher, "
                "or let the number of thoughts be known before"
            )

    def begin(self, done: Bool[Array, " B"], turns: int, width: int, dtype: jnp.dtype) -> Blocks:
        """The state before the first of so many turns."""
        rows = done.shape[0]
        none = jnp.zeros(rows, jnp.int32)
        opened = jnp.zeros(rows, bool) if self.opened is None else self.opened & ~done
        return Blocks(
            modes=jnp.full((rows, turns), Mode.DONE, jnp.int8),
            inputs=jnp.zeros((rows, turns, width), dtype) if self.keep_inputs else None,
            open=opened,
            made=none,
            thoughts=none,
            written=none,
            number=opened.astype(jnp.int32),
            ended=jnp.zeros(rows, bool),
            cut=jnp.zeros(rows, bool),
        )

    def take_turn(
        self,
        blocks: Blocks,
        done: Bool[Array, " B"],
        *,
        chosen: Int[Array, " B"],
        over: Bool[Array, " B"],
        index: Int[Array, ""],
        eos_id: int,
        limit: int,
    ) -> tuple[Blocks, Bool[Array, " B"], Int[Array, " B"], Bool[Array, " B"]]:
        """One turn of every row.

        Args:
          blocks: the state before.
          done: rows that are done.
          chosen: the token that each row would write.
          over: rows whose block stops here if it may (`stops`).
          index: number of the turn.
          eos_id: id that ends a row.
          limit: tokens of a row.

        Returns:
          The state behind it, the rows that are done then, each row's token, and the rows that think one thought more.
        """
        config = self.config
        least, most = config.least, config.most
        if config.stop == "count":
            least = most = most if self.counts is None else jnp.clip(self.counts, least, most)
        full = (blocks.made >= most) | (blocks.thoughts >= config.room)
        over = (blocks.made >= least) & (over | full)
        thinks, reads, writes = blocks.open & ~done & ~over, blocks.open & ~done & over, ~blocks.open & ~done
        token = jnp.where(thinks, self.latent_id, jnp.where(reads, self.end_id, jnp.where(done, eos_id, chosen)))
        mode = jnp.where(
            thinks, Mode.THINKING, jnp.where(reads, Mode.READING, jnp.where(done, Mode.DONE, Mode.WRITING))
        )
        thoughts, written = blocks.thoughts + thinks, blocks.written + (reads | writes)
        ended, starts = writes & (token == eos_id), writes & (token == self.start_id)
        # The block's thoughts have to fit, and the end marker behind them.
        opens = starts & (config.room - thoughts >= least) & (written < limit)
        following = blocks._replace(
            modes=jax.lax.dynamic_update_slice_in_dim(blocks.modes, mode[:, None].astype(jnp.int8), index, axis=1),
            open=thinks | opens,
            made=jnp.where(opens, 0, blocks.made + thinks),
            thoughts=thoughts,
            written=written,
            number=blocks.number + opens,
            ended=blocks.ended | ended,
            cut=blocks.cut | (starts & ~opens),
        )
        done = done | following.ended | following.cut | (~following.open & (written >= limit))
        return following, done, token, thinks

    def stops(
        self, decoder: Decoder, hidden: Float[Array, "B D"], logits: Float[Array, "B V"], eos_id: int
    ) -> Bool[Array, " B"]:
        """Where a block's last column says that it is over."""
        config = self.config
        if config.stop == "head":
            assert self.halt is not None and config.threshold is not None
            return jax.nn.sigmoid(self.halt(decoder, hidden)) >= config.threshold
        if config.stop == "token":
            ids = {"end": self.end_id, "eos": eos_id}
            return jnp.isin(jnp.argmax(logits, -1), jnp.asarray([ids[name] for name in config.tokens]))
        if config.stop == "entropy":
            assert config.threshold is not None
            likely = jax.nn.log_softmax(logits)
            return -jnp.sum(jnp.exp(likely) * likely, -1) < config.threshold
        return jnp.zeros(hidden.shape[0], bool)
