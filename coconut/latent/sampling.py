"""Samples of what a model thinks and writes, and the probability of each again under other parameters.

Sampling reads each question once. Its samples share what was read: keys and values of the prompt are not copied. A
policy (`coconut.latent.policies`) draws the thoughts, the softmax of the logits over a temperature the tokens.

A replay is one parallel pass where the policy draws its thoughts: then the inputs of all columns are known. Where the
thoughts are the model's own, under masks perhaps, they are made again one after the other, and the gradient goes
through them. Both round differently from the pass that sampled; how far apart they are is measured.
"""

import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.generate import Continuation, Prefix, SamplingConfig, decode, place_behind, prefill, think_on
from coconut.latent.halting import Halt, token_entropy
from coconut.latent.policies.own_thoughts import Deterministic
from coconut.latent.policies.policy import DrawingPolicy, Policy, Record
from coconut.latent.policies.stopping import bernoulli_entropy, stop_log_probs
from coconut.latent.rollout import rollout_batch, walk
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.latent.thoughts import Place, room_behind, run_one_column
from coconut.models.cache import Segment
from coconut.models.decoder import Decoder
from coconut.models.dropout import RowMasks
from coconut.models.layers import take_columns
from coconut.sharding import constrain
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, Schedule

_TOKENS, _THOUGHTS, _STOPS, _MASKS = range(4)  # Keep the draws of a row apart.


class Draws(NamedTuple):
    """One kind of draws of some samples: of thoughts, of stops, or of tokens.

    Attributes:
      log_probs: log-probability or density of each, in nats; 0 where there was none.
      taken: where there was a draw.
      entropies: entropy of what each was drawn from, in nats; None where it was not asked for.
    """

    log_probs: Float[Array, "B X"]
    taken: Bool[Array, "B X"]
    entropies: Float[Array, "B X"] | None = None


Actions = dict[str, Draws]
"""``thoughts``, ``stops`` and ``tokens``, those that a policy draws. Column ``j`` of ``stops`` stands behind ``j``
thoughts."""


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(Batch):
    """What was thought and written, as rows to replay: the samples of a question follow each other.

    What was written is scored. Its columns stand behind those that were given; latent columns that a row did not use
    are not valid.

    Attributes:
      records: of the thoughts drawn, ``[B, K, ...]`` (`Policy`); None where none were.
      keys: data of each row's key, from which its masks are made again.
      most: thoughts that each row's block may have.
      sampled: log-probabilities of the draws as they were drawn, by kind.
    """

    records: Any
    keys: Any
    most: Int[Any, " B"]
    sampled: dict[str, Float[Any, "B X"]]


class Written(NamedTuple):
    """What the host reads of some samples.

    Attributes:
      tokens: new token ids; EOS behind a row's end.
      lengths: new tokens without EOS.
      ended: whether the row ended by itself.
      finite: whether all states that its tokens were chosen from were finite.
      thoughts: thoughts of each row.
      thought_size: root mean square of each row's thoughts; 0 where it has none.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    thoughts: Int[Array, " B"]
    thought_size: Float[Array, " B"]


class Given(NamedTuple):
    """Thoughts that samples begin with.

    Attributes:
      inputs: what columns are fed.
      count: how many of these are taken, from the left; the others are drawn. Data, not a recompile.
    """

    inputs: Float[Array, "B K D"]
    count: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How samples are drawn.

    Attributes:
      policy: of thoughts.
      halt: a stop head that decides when a block ends; None where its page does.
      least: thoughts before the head is first asked.
      sampling: how tokens are drawn. Log-probabilities, replayed ones too, know their temperature alone: no
        ``top_k``, ``top_p`` or ``min_p``.
      think: how the model makes its own thoughts.
      latent_id: id of the latent marker, which `Sweeps` start from.
      eos_id: id that ends a row.
      vocab_size: ids that may be drawn, from 0; None for every row of the embedding.

    Raises:
      CoconutError: the policy is none; or the model makes its thoughts together, and something is to be drawn between
        them.
    """

    policy: Policy
    sampling: SamplingConfig
    eos_id: int
    latent_id: int
    halt: Halt | None = None
    least: int = 0
    think: Thinker = OneByOne()  # noqa: RUF009 - immutable
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, (Deterministic, DrawingPolicy)):
            raise CoconutError(
                f"{type(self.policy).__name__}: a policy that draws thoughts has sample, inputs, log_prob and entropy "
                "(DrawingPolicy); one that draws none is a Deterministic"
            )
        together = isinstance(self.think, Sweeps) and self.think.count
        if together and (type(self.policy) is not Deterministic or self.halt is not None):
            raise CoconutError(
                f"PolicyConfig: {self.think} makes all thoughts of a block together, so that none can be drawn behind "
                "another: only kind = 'deterministic' goes with it"
            )

    @property
    def _drawing(self) -> DrawingPolicy | None:
        """The policy where it draws thoughts."""
        return self.policy if isinstance(self.policy, DrawingPolicy) else None

    def _masks_of(self, keys: Key[Array, " B"], schedule: Schedule, columns: int) -> RowMasks | None:
        """The dropout of thoughts, for all ``columns`` of a sequence that begins with ``schedule``."""
        if not isinstance(self.policy, Deterministic):
            return None
        latent = np.zeros(columns, bool)
        latent[: sum(span.length for span in schedule)] = latent_columns(schedule)
        return self.policy.masks(_fold(keys, _MASKS), jnp.arange(columns), jnp.asarray(latent))

    # --- Drawing ---

    def sample(
        self,
        decoder: Decoder,
        batch: Batch,
        keys: Key[Array, " B"],
        group: int = 1,
        active: Array | None = None,
        begun: Given | None = None,
    ) -> tuple[Samples, Written]:
        """Draws ``group`` samples of each row. Traceable.

        Args:
          decoder: the decoder.
          batch: what is given of each question (`given_columns`); one block of thoughts at most.
          keys: a key for each of the samples, ``group`` times as many as rows: a sample's draws depend on its own.
          group: samples of a row, which follow each other.
          active: rows that are questions; the others, which only fill the batch, are not waited for.
          begun: thoughts that the samples begin with, of a policy that draws thoughts without a stop head. Then only
            what the host reads means anything: records are of draws, which gave way.

        Returns:
          The samples, to be replayed, and what the host reads of them.

        Raises:
          CoconutError: there are several blocks; or more columns than positions, as in `prefill`.
        """
        active = jnp.ones(len(batch.tokens), bool) if active is None else active
        repeat = lambda x: jnp.repeat(x, group, axis=0)
        # What fills the batch reads one token, so that its softmax has something to see.
        valid = jnp.asarray(batch.valid) | (~active[:, None] & (jnp.arange(batch.valid.shape[1]) == 0))
        prefix, start, drawn, pieces = None, 0, None, []
        for span in batch.schedule:
            here = slice(start, start + span.length)
            start = here.stop
            if isinstance(span, Language):
                tokens, own = batch.tokens[:, here], valid[:, here]
                shared = prefix is not None and len(prefix.last) > len(valid)
                prefix = prefill(decoder, *((repeat(tokens), repeat(own)) if shared else (tokens, own)), prefix)
                pieces.append(repeat(own))
                continue
            if drawn is not None:
                raise CoconutError(
                    "PolicyConfig: the method writes several blocks of thoughts before an answer, not one"
                )
            assert prefix is not None
            masks = self._masks_of(keys, batch.schedule, batch.tokens.shape[1])
            counts = repeat(valid[:, here].sum(1, dtype=jnp.int32))
            drawn = self._draw(decoder, prefix.shared(group), counts, keys, span.length, masks, begun)
            prefix = drawn.prefix
            pieces.append(jnp.arange(span.length) < drawn.thoughts[:, None])
        assert prefix is not None
        prefix = prefix.shared(group) if drawn is None else prefix
        written = decode(
            decoder,
            prefix,
            repeat(active),
            _fold(keys, _TOKENS),
            sampling=self.sampling,
            eos_id=self.eos_id,
            vocab_size=self.vocab_size,
            keep_log_probs=True,
        )
        assert written.log_probs is not None
        new = jnp.arange(written.tokens.shape[1]) < (written.lengths + written.ended)[:, None]
        new &= repeat(active)[:, None]
        rows = len(keys)
        given_valid = jnp.concatenate([*pieces], 1)
        valid = jnp.concatenate([given_valid & repeat(active)[:, None], new], 1)
        tokens = jnp.concatenate([repeat(jnp.asarray(batch.tokens)), written.tokens], 1)
        sampled = {"tokens": jnp.where(new, written.log_probs, 0.0)}
        records, thoughts, most = None, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32)
        size = jnp.zeros(rows, jnp.float32)
        if drawn is not None:
            thoughts, most, size = drawn.thoughts, drawn.most, drawn.size
            records = drawn.records
            sampled |= drawn.sampled
        width = batch.tokens.shape[1]
        fill = lambda value, new_values: jnp.concatenate([jnp.full((rows, width), value), new_values], 1)
        last = jnp.max(jnp.where(given_valid, jnp.arange(width), -1), 1)
        samples = Samples(
            schedule=schedule_with(batch.schedule, written.tokens.shape[1]),
            tokens=tokens,
            positions=jnp.where(valid, jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, 0),
            valid=valid,
            labels=fill(IGNORED_LABEL, jnp.where(new, written.tokens, IGNORED_LABEL)),
            pieces=fill(-1, jnp.where(new, 0, -1)),
            answers=fill(False, new),
            before_answer=jnp.where(repeat(active), last, -1),
            examples=repeat(jnp.asarray(batch.examples)),
            records=records,
            keys=jax.random.key_data(keys),
            most=most,
            sampled=sampled,
        )
        by_host = Written(written.tokens, written.lengths, written.ended, written.finite, thoughts, size)
        return jax.tree.map(lambda x: constrain(x, "rows", *["features"] * (x.ndim - 1)), samples), by_host

    def _draw(
        self,
        decoder: Decoder,
        prefix: Prefix,
        counts: Int[Array, " B"],
        keys: Key[Array, " B"],
        room: int,
        masks: RowMasks | None,
        begun: Given | None,
    ) -> "_Drawn":
        """A block of at most ``counts`` thoughts behind a prefix."""
        if isinstance(self.think, Sweeps) and self.think.count:
            assert isinstance(self.policy, Deterministic)
            following, thoughts = think_on(
                decoder, self.policy.feedback, prefix, counts, room=room, think=self.think, latent_id=self.latent_id
            )
            used = jnp.arange(room) < counts[:, None]
            return _Drawn(following, None, counts, counts, {}, size_of(thoughts, used))
        place = place_behind(decoder, prefix, jnp.ones((len(counts), room), bool))
        place = dataclasses.replace(place, dropout=masks)
        of_stops = _fold(keys, _STOPS)
        drawing = self._drawing

        def body(carry: tuple[Array, Segment, Array], index: Int[Array, ""]) -> tuple[Any, Any]:
            hidden, own, going = carry
            going = going & (index < counts)
            logit = jnp.zeros(len(counts), jnp.float32)
            if self.halt is not None:
                logit = self.halt(decoder, hidden).astype(jnp.float32)
                draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index)))(of_stops)
                going = going & ~((index >= self.least) & (draw < jax.nn.sigmoid(logit)))
            thought, record = self.policy.sample(decoder, hidden, thought_keys(keys, index))
            log_prob = None if drawing is None else drawing.log_prob(decoder, hidden, record)
            if begun is not None:
                thought = jnp.where(index < begun.count, begun.inputs[:, index].astype(thought.dtype), thought)
            thought = jnp.where(going[:, None], thought, 0.0)
            here = dataclasses.replace(place.column(index), valid=going[:, None])
            out, own = run_one_column(decoder, thought, here, prefix.past, own, index)
            return (jnp.where(going[:, None], out, hidden), own, going), (record, log_prob, logit, going, thought)

        start = (prefix.last, room_behind(decoder, place, prefix.past), jnp.ones(len(counts), bool))
        (last, own, _), stacked = jax.lax.scan(body, start, jnp.arange(room))
        records, log_probs, logits, going, thoughts = jax.tree.map(lambda x: x.swapaxes(0, 1), stacked)
        made, sampled = going.sum(1, dtype=jnp.int32), {}
        if drawing is not None:
            sampled["thoughts"] = jnp.where(going, log_probs, 0.0)
        if self.halt is not None:
            sampled["stops"] = stop_log_probs(logits, made, self.least, counts)[0]
        following = Continuation(dataclasses.replace(own, valid=going), last, prefix.length + made)
        return _Drawn(
            following.behind(prefix.past),
            None if drawing is None else records,
            made,
            counts,
            sampled,
            size_of(thoughts, going),
        )

    # --- Again ---

    def replay(
        self,
        decoder: Decoder,
        samples: Samples,
        *,
        entropies: bool = False,
        advantages: Float[Array, " B"] | None = None,
    ) -> Actions:
        """The log-probability of every draw of some samples under a decoder and this policy. Differentiable.

        Args:
          decoder: the decoder.
          samples: what was drawn, with this policy and any parameters.
          entropies: also of what each was drawn from.
          advantages: of the samples; see `Policy.log_prob`.
        """
        latent, drawing = latent_columns(samples.schedule), self._drawing
        every = bool(latent.any()) and (drawing is not None or self.halt is not None)
        if drawing is not None and latent.any():
            inputs = drawing.inputs(decoder, samples.records)
            inputs = jnp.where(samples.valid[:, latent][..., None], inputs, 0.0)
            # Nothing has to be made: columns of given inputs are read as text is.
            embedded = decoder.embed(samples.tokens)
            embedded = embedded.at[:, np.flatnonzero(latent)].set(inputs.astype(embedded.dtype))
            output = walk(
                decoder,
                Identity(),
                tuple(Language(span.length) if isinstance(span, Latent) else span for span in samples.schedule),
                embedded=embedded,
                place=Place(samples.positions, samples.valid, jnp.arange(embedded.shape[1])),
                past=(),
                last=jnp.zeros_like(embedded[:, 0]),
                think=self.think,
                every_hidden=every,
            )
        else:
            keys = jax.random.wrap_key_data(samples.keys)
            output = rollout_batch(
                decoder,
                self.policy.feedback if isinstance(self.policy, Deterministic) else Identity(),
                samples,
                think=self.think,
                masks=self._masks_of(keys, samples.schedule, samples.tokens.shape[1]),
                every_hidden=every,
            )
        actions: Actions = {}
        if every:
            assert output.hidden is not None
            states = _states_before(output.hidden, samples.valid, latent)
            used = jnp.asarray(samples.valid)[:, latent]
            if drawing is not None:
                spread = None if advantages is None else jnp.broadcast_to(advantages[:, None], used.shape)
                log_probs = drawing.log_prob(decoder, states, samples.records, spread)
                entropy = drawing.entropy(decoder, states) if entropies else None
                actions["thoughts"] = _draws(log_probs, used, entropy)
            if self.halt is not None:
                logits = self.halt(decoder, states).astype(jnp.float32)
                log_probs, decided = stop_log_probs(logits, used.sum(1), self.least, samples.most)
                actions["stops"] = _draws(log_probs, decided, bernoulli_entropy(logits) if entropies else None)
        labels = samples.labels[:, -output.predictors.shape[1] :]
        logits = decoder.unembed(output.predictors)[..., : self.vocab_size] / self.sampling.temperature
        taken = labels != IGNORED_LABEL
        likely = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(likely, jnp.where(taken, labels, 0)[..., None], -1)[..., 0]
        actions["tokens"] = _draws(chosen, taken, token_entropy(logits) if entropies else None)
        return actions


class _Drawn(NamedTuple):
    """A block of thoughts: what follows, records, thoughts made and allowed, log-probabilities, and their size."""

    prefix: Prefix
    records: Record
    thoughts: Int[Array, " B"]
    most: Int[Array, " B"]
    sampled: dict[str, Array]
    size: Float[Array, " B"]


def thought_keys(keys: Key[Array, " B"], index: Int[Array, ""]) -> Key[Array, " B"]:
    """The keys that samples draw the thought of column ``index`` of their block with."""
    return _fold(_fold(keys, _THOUGHTS), index)


def latent_columns(schedule: Schedule) -> Bool[np.ndarray, " T"]:
    """Which columns of a schedule hold thoughts."""
    return np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in schedule])


def given_columns(batch: Batch) -> Batch:
    """The columns of a batch before the first one that may be scored: what is given of each question.

    Raises:
      CoconutError: something is scored before thoughts.
    """
    *front, last = batch.schedule
    if not isinstance(last, Language) or any(isinstance(span, Language) and span.scored for span in front):
        raise CoconutError("PolicyConfig: the method has thoughts behind what the model writes")
    width = last.length - last.scored
    schedule = (*front, *([Language(width)] if width else []))
    columns = sum(span.length for span in schedule)
    cut = lambda x: x[:, :columns]
    return dataclasses.replace(
        batch,
        schedule=schedule,
        **{
            field: cut(getattr(batch, field))
            for field in ("tokens", "positions", "valid", "labels", "pieces", "answers")
        },
    )


def schedule_with(given: Schedule, written: int) -> Schedule:
    """The schedule of what is given with so many written columns behind it, which are scored."""
    *front, last = given
    if isinstance(last, Language):
        return (*front, Language(last.length + written, written))
    return (*given, Language(written, written))


def _states_before(
    hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"], latent: Bool[np.ndarray, " T"]
) -> Float[Array, "B _ D"]:
    """The states that the latent columns follow: those of the last valid column before each."""
    first, number = int(np.argmax(latent)), int(latent.sum())
    found = jax.lax.cummax(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)
    return take_columns(hidden, jnp.maximum(found[:, first - 1 : first + number - 1], 0))


def _draws(log_probs: Float[Array, "B X"], taken: Bool[Array, "B X"], entropies: Float[Array, "B X"] | None) -> Draws:
    none = lambda x: jnp.where(taken, x, 0.0)
    return Draws(none(log_probs), taken, None if entropies is None else none(entropies))


def size_of(thoughts: Float[Array, "B K D"], used: Bool[Array, "B K"]) -> Float[Array, " B"]:
    """The root mean square of the thoughts that rows use."""
    squares = jnp.square(thoughts.astype(jnp.float32)).mean(-1)
    return jnp.sqrt(jnp.where(used, squares, 0.0).sum(1) / jnp.maximum(used.sum(1), 1))


def _fold(keys: Key[Array, " B"], data: int | Int[Array, ""]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)
