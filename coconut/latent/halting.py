"""When a row of a generation thinks, and when it stops: settings, stop heads, and what each row has done so far.

A row that writes the start marker thinks. Before each further thought its block may be over: by count, or by what the
states of the block's columns say. Then the row reads the end marker, and writes on. So a model decides itself how often
it thinks, and how long. The block may also be one that the prefix opened; then there need be no marker at all.
"""

import dataclasses
import enum
import math
from typing import Any, Literal, NamedTuple, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int8, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import Feedback, with_constants
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.latent.thoughts import Place, feed_back
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder


@runtime_checkable
class Halt(Protocol):
    """A stop head: from a hidden state to the logit of the probability that its block is over.

    It is a JAX pytree; its leaves are parameters.
    """

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Makes the logit from the hidden state (after the final norm) of a block's last column."""
        ...


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHalt:
    """A stop head of one vector and a bias.

    It starts at 0 and at -2: each thought ends its block with probability 0.12.
    """

    kernel: Any
    bias: Any

    @classmethod
    def fresh(cls, decoder: DecoderConfig) -> "LinearHalt":
        """The head as it starts."""
        dtype = jnp.dtype(decoder.param_dtype)
        kernel = nnx.Param(jnp.zeros(decoder.embed_dim, dtype), axes=("embed",))
        return cls(kernel=kernel, bias=nnx.Param(jnp.full((), -2.0, dtype), axes=()))

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Returns the logit, in at least float32."""
        wide = decoder.execution.accumulation_dtype
        return hidden.astype(wide) @ self.kernel[...].astype(wide) + self.bias[...].astype(wide)


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class HaltingConfig:
    """When a block is over that a model thinks on its own.

    What stops a block looks at its last column so far: its last thought, or what stands before the first one where
    ``least`` is 0. What it gathers over columns it gathers over those of the block that it may look at so.

    Attributes:
      stop: ``count``, behind ``most`` thoughts, or a number of each row's own between ``least`` and ``most``
        (`Thinking.counts`); ``head``, where a stop head's probability reaches ``threshold`` (`Halt`); ``cumulative``,
        where the probability of having stopped by now, ``1 - prod(1 - p)`` over the head's probabilities ``p`` in this
        block, exceeds ``threshold`` (the distribution of PonderNet, Banino et al. 2021, cut where it would be drawn
        from); ``token``, where the most likely token is one of ``tokens`` or ``texts``; ``entropy``, where the entropy
        of the distribution of tokens falls below ``threshold``, in nats.
      least: thoughts a block has at least.
      most: thoughts a block has at most.
      room: thoughts a row has at most, in all of its blocks. A row that opens a block with less room left than the
        block needs is cut there (`Blocks.cut`).
      threshold: see ``stop``; None for those that need none.
      patience: for ``entropy``, columns in a row whose entropy has to be below.
      temperature: for ``entropy``, what logits are divided by first.
      tokens: the end marker or EOS, see ``stop``. Other stops but ``count`` may have some, too: then a block is over
        by whichever comes first.
      texts: texts of one token each, which are used as ``tokens`` are.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    stop: Literal["count", "head", "cumulative", "token", "entropy"] = "count"
    least: int = 1
    most: int = 6
    room: int = 24
    threshold: float | None = None
    patience: int = 1
    temperature: float = 1.0
    tokens: tuple[Literal["end", "eos"], ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.least < 0:
            raise CoconutError(f"HaltingConfig.least = {self.least!r}: must be at least 0")
        if self.most < max(self.least, 1):
            raise CoconutError(f"HaltingConfig.most = {self.most!r}: must be at least 1, and least = {self.least}")
        if self.room < self.most:
            raise CoconutError(f"HaltingConfig.room = {self.room!r}: must be at least most = {self.most}")
        if (self.threshold is not None) != (self.stop in ("head", "cumulative", "entropy")):
            needs = "takes none" if self.threshold is not None else "needs one"
            raise CoconutError(f"HaltingConfig.threshold = {self.threshold!r}: stop = {self.stop!r} {needs}")
        if self.threshold is not None and not (self.threshold > 0 and (self.stop == "entropy" or self.threshold < 1)):
            allowed = "above 0" if self.stop == "entropy" else "between 0 and 1"
            raise CoconutError(f"HaltingConfig.threshold = {self.threshold!r}: must be {allowed}")
        for field in ("patience", "temperature"):
            value = getattr(self, field)
            if value != 1 and self.stop != "entropy":
                raise CoconutError(f"HaltingConfig.{field} = {value!r}: stop = {self.stop!r} takes none")
            if not 0 < value < math.inf:
                raise CoconutError(f"HaltingConfig.{field} = {value!r}: must be positive")
        if self.stop == "token" and not (self.tokens or self.texts):
            raise CoconutError(f"HaltingConfig.tokens = {self.tokens!r}: stop = {self.stop!r} needs at least one")
        for field in ("tokens", "texts"):
            if getattr(self, field) and self.stop == "count":
                raise CoconutError(f"HaltingConfig.{field} = {getattr(self, field)!r}: stop = 'count' takes none")

    @property
    def has_head(self) -> bool:
        """Whether a stop head is needed."""
        return self.stop in ("head", "cumulative")


class Mode(enum.IntEnum):
    """What a row does in a turn."""

    READING = 0  # the end marker, and what else stands behind a block that is over
    THINKING = 1
    WRITING = 2
    DONE = 3


class Blocks(NamedTuple):
    """What the rows of a generation have thought and written so far.

    Attributes:
      modes: what each row did in each turn (`Mode`).
      inputs: the thoughts, zero in other columns; None where they were not asked for.
      open: rows in the middle of a block.
      left: tokens that each row has still to read behind its last block.
      made: thoughts of each row's last block.
      gathered: what the columns of an open block have gathered towards its end: for ``stop = "cumulative"`` the
        logarithm of the probability that it goes on, for ``"entropy"`` how many in a row were below the threshold.
      thoughts: thoughts of each row, in all blocks.
      written: tokens of each row, the start and end markers and its EOS included.
      number: blocks of each row, with the one that its prefix opened.
      ended: rows that wrote EOS.
      cut: rows that ended because they wrote the start marker with too little room left, of thoughts or of tokens.
    """

    modes: Int8[Array, "B S"]
    inputs: Float[Array, "B S D"] | None
    open: Bool[Array, " B"]
    left: Int[Array, " B"]
    made: Int[Array, " B"]
    gathered: Float[Array, " B"]
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


def no_turns(
    done: Bool[Array, " B"],
    turns: int,
    width: int,
    dtype: jnp.dtype,
    *,
    opened: Bool[Array, " B"] | None,
    keep_inputs: bool,
) -> Blocks:
    """Rows of which nothing is known yet but who is done, and whose prefix opened a block."""
    rows = done.shape[0]
    none = jnp.zeros(rows, jnp.int32)
    opened = jnp.zeros(rows, bool) if opened is None else opened & ~done
    return Blocks(
        modes=jnp.full((rows, turns), Mode.DONE, jnp.int8),
        inputs=jnp.zeros((rows, turns, width), dtype) if keep_inputs else None,
        open=opened,
        left=none,
        made=none,
        gathered=jnp.zeros(rows, jnp.float32),
        thoughts=none,
        written=none,
        number=opened.astype(jnp.int32),
        ended=jnp.zeros(rows, bool),
        cut=jnp.zeros(rows, bool),
    )


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinking:
    """What `coconut.latent.generate.decode` needs for rows that think on their own.

    Attributes:
      feedback: how a hidden state becomes the next thought.
      config: when a block is over. Static.
      start_id: id of the marker that opens a block; None where the model can open none. Static.
      latent_id: id that stands for a thought in what is returned; None for the token that is most likely there. Static.
      end_id: id of the marker that is read behind a block; None for none: the row writes on. Static.
      think: how the model was trained to think. Static. A block whose end is not known is made one by one, which is
        the same for `OneByOne` and for enough sweeps.
      halt: the stop head, for ``stop = "head"`` and ``"cumulative"``.
      counts: thoughts of each row's blocks, for ``stop = "count"``; None for ``most``.
      opened: rows whose prefix opened a block (it ends with the start marker, where there is one); None for none.
      behind: tokens read behind the block that the prefix opened; None for the end marker alone. Static.
      text_ids: ids of ``HaltingConfig.texts``. Static.
      keys: a key for each row, for feedbacks that draw.
      keep_inputs: return the thoughts. Static.
    """

    feedback: Feedback
    config: HaltingConfig = dataclasses.field(metadata={"static": True})
    start_id: int | None = dataclasses.field(metadata={"static": True})
    latent_id: int | None = dataclasses.field(metadata={"static": True})
    end_id: int | None = dataclasses.field(metadata={"static": True})
    think: Thinker = dataclasses.field(default=OneByOne(), metadata={"static": True})
    halt: Halt | None = None
    counts: Int[Array, " B"] | None = None
    opened: Bool[Array, " B"] | None = None
    behind: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    text_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    keys: Key[Array, " B"] | None = None
    keep_inputs: bool = dataclasses.field(default=False, metadata={"static": True})

    def check(self) -> None:
        """Compares the parts with each other.

        Raises:
          CoconutError: a stop head, counts or ids that the config does not use, or lacks; or sweeps that thoughts made
            one by one do not equal.
        """
        stop, most = self.config.stop, self.config.most
        if (self.halt is not None) != self.config.has_head:
            raise CoconutError(
                f"HaltingConfig.stop = {stop!r}: {'needs a' if self.halt is None else 'takes no'} stop head"
            )
        if self.counts is not None and stop != "count":
            raise CoconutError(f"HaltingConfig.stop = {stop!r}: takes no number of thoughts for each row")
        if "end" in self.config.tokens and self.end_id is None:
            raise CoconutError("HaltingConfig.tokens: 'end' is none of this generation's tokens: it has no end marker")
        if len(self.text_ids) != len(self.config.texts):
            raise CoconutError(f"HaltingConfig.texts = {self.config.texts!r}: their ids are missing")
        if isinstance(self.think, Sweeps) and self.think.count < most:
            raise CoconutError(
                f"Sweeps.count = {self.think.count}: a block that the model opens itself is made one by one, which "
                f"equals sweeps only where there are as many as thoughts; set HaltingConfig.most = {most} no higher, "
                "or let the number of thoughts be known before"
            )

    @property
    def room(self) -> int:
        """Turns that are no tokens, at most."""
        return self.config.room

    def ready(self, decoder: Decoder) -> "Thinking":
        """The same with whatever depends on the decoder alone computed; its parts were compared with each other.

        Raises:
          CoconutError: see `check`.
        """
        self.check()
        return dataclasses.replace(self, feedback=with_constants(self.feedback, decoder))

    def begin(self, done: Bool[Array, " B"], turns: int, width: int, dtype: jnp.dtype) -> Blocks:
        """The state before the first of so many turns."""
        return no_turns(done, turns, width, dtype, opened=self.opened, keep_inputs=self.keep_inputs)

    def turn(
        self,
        state: Blocks,
        done: Bool[Array, " B"],
        decoder: Decoder,
        *,
        hidden: Float[Array, "B D"],
        logits: Float[Array, "B V"],
        chosen: Int[Array, " B"],
        here: Place,
        index: Int[Array, ""],
        eos_id: int,
        limit: int,
    ) -> tuple[Blocks, Bool[Array, " B"], Int[Array, " B"], Float[Array, "B D"]]:
        """One turn of every row.

        Args:
          state: the state before.
          done: rows that are done.
          decoder: the decoder.
          hidden: state of each row's last column.
          logits: what it says of the next token.
          chosen: the token that each row would write.
          here: the column of this turn.
          index: number of the turn.
          eos_id: id that ends a row.
          limit: tokens of a row.

        Returns:
          The state behind it, the rows that are done then, each row's token, and what its column is fed.
        """
        state, over = self.look(state, decoder, hidden, logits, eos_id)
        likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
        state, done, token, thinks = self.take_turn(
            state, done, chosen=chosen, likeliest=likeliest, over=over, index=index, eos_id=eos_id, limit=limit
        )
        thought = feed_back(self.feedback, decoder, hidden[:, None], here)[:, 0]
        inputs = jnp.where(thinks[:, None], thought, decoder.embed(token))
        return state.keep(thought, thinks, index), done, token, inputs

    def blocks(self, state: Blocks) -> Blocks:
        """What the rows thought and wrote: the state itself."""
        return state

    def take_turn(
        self,
        blocks: Blocks,
        done: Bool[Array, " B"],
        *,
        chosen: Int[Array, " B"],
        likeliest: Int[Array, " B"],
        over: Bool[Array, " B"],
        index: Int[Array, ""],
        eos_id: int,
        limit: int,
    ) -> tuple[Blocks, Bool[Array, " B"], Int[Array, " B"], Bool[Array, " B"]]:
        """What every row does in a turn.

        Args:
          blocks: the state before, with what was gathered from each row's last column (`look`).
          done: rows that are done.
          chosen: the token that each row would write.
          likeliest: its most likely token.
          over: rows whose block stops here if it may (`look`).
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
        thinks, free = blocks.open & ~done & ~over, ~(blocks.open & ~over) & ~done
        to_read, left = self._to_read(blocks, over)
        reads, writes = free & (left > 0), free & (left == 0)
        thought = likeliest if self.latent_id is None else self.latent_id
        token = jnp.where(thinks, thought, jnp.where(reads, to_read, jnp.where(done, eos_id, chosen)))
        mode = jnp.where(
            thinks, Mode.THINKING, jnp.where(reads, Mode.READING, jnp.where(done, Mode.DONE, Mode.WRITING))
        )
        thoughts, written = blocks.thoughts + thinks, blocks.written + (reads | writes)
        ended = writes & (token == eos_id)
        starts = jnp.zeros_like(writes) if self.start_id is None else writes & (token == self.start_id)
        # The block's thoughts have to fit, and the end marker behind them.
        opens = starts & (config.room - thoughts >= least) & (written < limit)
        following = blocks._replace(
            modes=jax.lax.dynamic_update_slice_in_dim(blocks.modes, mode[:, None].astype(jnp.int8), index, axis=1),
            open=thinks | opens,
            left=left - reads,
            made=jnp.where(opens, 0, blocks.made + thinks),
            gathered=jnp.where(opens, 0.0, blocks.gathered),
            thoughts=thoughts,
            written=written,
            number=blocks.number + opens,
            ended=blocks.ended | ended,
            cut=blocks.cut | (starts & ~opens),
        )
        done = done | following.ended | following.cut | (~following.open & (written >= limit))
        return following, done, token, thinks

    def _to_read(self, blocks: Blocks, over: Bool[Array, " B"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """The token that each row has to read next, and how many it has to read, where its block is over."""
        end = () if self.end_id is None else (self.end_id,)
        behind = end if self.behind is None else self.behind
        own = jnp.zeros(over.shape, bool) if self.opened is None else self.opened & (blocks.number == 1)
        count = jnp.where(own, len(behind), len(end))
        left = jnp.where(blocks.open & over, count, blocks.left)
        width = max(len(end), len(behind), 1)
        padded = jnp.asarray([[*ids, *[0] * (width - len(ids))] for ids in (end, behind)], jnp.int32)
        return padded[own.astype(jnp.int32), jnp.clip(count - left, 0, width - 1)], left

    def look(
        self,
        blocks: Blocks,
        decoder: Decoder,
        hidden: Float[Array, "B D"],
        logits: Float[Array, "B V"],
        eos_id: int,
    ) -> tuple[Blocks, Bool[Array, " B"]]:
        """Where a block's columns say that it is over, and the state with what they have gathered.

        Args:
          blocks: the state before each row's last column was looked at.
          decoder: the decoder.
          hidden: state of the last columns.
          logits: what they say of the next token.
          eos_id: id that ends a row.
        """
        config, gathered = self.config, blocks.gathered
        over = jnp.zeros(hidden.shape[0], bool)
        # The first of the block's columns that may end it; what stands before the thoughts is often none of them.
        counts = blocks.made >= min(config.least, 1)
        if config.has_head:
            assert self.halt is not None and config.threshold is not None
            logit = self.halt(decoder, hidden).astype(jnp.float32)
            if config.stop == "head":
                over = jax.nn.sigmoid(logit) >= config.threshold
            else:
                gathered = jnp.where(counts, gathered + jax.nn.log_sigmoid(-logit), gathered)
                over = -jnp.expm1(gathered) > config.threshold
        elif config.stop == "entropy":
            assert config.threshold is not None
            below = counts & (token_entropy(logits, config.temperature) < config.threshold)
            gathered = jnp.where(below, gathered + 1.0, 0.0)
            over = gathered >= config.patience
        if config.tokens or config.texts:
            ids = {"end": self.end_id, "eos": eos_id}
            stopping = [*(ids[name] for name in config.tokens), *self.text_ids]
            over |= jnp.isin(jnp.argmax(logits, -1), jnp.asarray(stopping))
        return blocks._replace(gathered=gathered), over


def token_entropy(logits: Float[Array, "*B V"], temperature: float = 1.0) -> Float[Array, "*B"]:
    """Entropy of the distribution of tokens, in nats: of the whole vocabulary, after the temperature."""
    likely = jax.nn.log_softmax(logits / temperature)
    return -jnp.sum(jnp.exp(likely) * likely, -1)
