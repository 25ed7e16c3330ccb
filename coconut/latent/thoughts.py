"""A latent span: thoughts made one after the other, with exact gradients at the price of a parallel pass.

Let ``X`` be the thoughts of a span, and ``next(X)`` the map that runs all of its columns in parallel on the inputs
``X`` and feeds their hidden states back. The thoughts solve ``X = next(X)``. A thought depends on earlier ones alone,
so ``J = d next / d X`` is strictly triangular. By the implicit function theorem the cotangent ``G`` that reaches the
thoughts solves ``G = g + J^T G``, with ``g`` what arrives from outside the span, and the gradient of the parameters is
that of the *parallel* map at cotangent ``G``. And ``(I - J)^-1`` is what the sequential scan makes of a disturbance of
its inputs. So the backward pass runs the scan in reverse for activations alone, which gives ``G``, then the parallel
map once, which forms every weight gradient once instead of once a thought.

Memory grows with ``K``: the reverse scan keeps of each column what it needs, or what ``ExecutionConfig.remat`` says,
and reads the keys and values of the span as they are in the end, instead of as each thought found them
(`coconut.models.cache.Filling`).
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback
from coconut.models.cache import LOOKED_BACK, Filling, Segment, empty_segment, of_layers
from coconut.models.decoder import Decoder
from coconut.models.dropout import Dropout, RowMasks
from coconut.models.lending import take_back
from coconut.models.segment_attention import choose_attention

Past = tuple[Segment, ...]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Place:
    """Where the columns of a pass stand.

    Attributes:
      positions: position of each column in its row.
      valid: columns that belong to the row.
      columns: index of each column in the whole sequence.
      dropout: dropout of these columns, or None.
      keys: a key for each row, for feedbacks that draw; or None.
      members: which of its row's examples each column belongs to, where a row holds several (`Batch.members`); or None.
    """

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    columns: Int[Array, " T"]
    dropout: Dropout | RowMasks | None = None
    keys: Key[Array, " B"] | None = None
    members: Int[Array, "B T"] | None = None

    def column(self, index: Int[Array, ""]) -> "Place":
        """One column of this place. Which one is data."""
        return self._taken(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, x.ndim - 1))

    def part(self, start: int, end: int) -> "Place":
        """The columns from ``start`` to before ``end`` of this place."""
        return self._taken(lambda x: x[..., start:end])

    def _taken(self, take: Callable[[Array], Array]) -> "Place":
        columns = take(self.columns)
        dropout = None if self.dropout is None else dataclasses.replace(self.dropout, columns=columns)
        members = None if self.members is None else take(self.members)
        return Place(take(self.positions), take(self.valid), columns, dropout, self.keys, members)


def check_positions(decoder: Decoder, needed: int, what: str) -> None:
    """Looks whether a table of positions has one for every column; a missing one would be NaN, and so all that follows.

    Rotary positions have no table and no end.

    Args:
      decoder: the decoder.
      needed: positions that are needed.
      what: what needs them, for the error message.

    Raises:
      CoconutError: the table is shorter.
    """
    limit = decoder.config.max_positions
    if decoder.config.position_embedding == "learned" and needed > limit:
        raise CoconutError(f"DecoderConfig.max_positions = {limit}: {what} need {needed} positions")


class LatentSpan(NamedTuple):
    """What a latent span leaves.

    Attributes:
      thoughts: the inputs of its columns; zero in columns a row does not use.
      hidden: their hidden states after the final norm.
      key_values: keys and values, in the layout of `Segment.key_values`.
    """

    thoughts: Float[Array, "B K D"]
    hidden: Float[Array, "B K D"]
    key_values: Any


def trunk(
    decoder: Decoder,
    inputs: Float[Array, "B T D"],
    place: Place,
    past: Past,
    wanted: Int[Array, "B W"] | None = None,
) -> tuple[Array, Any]:
    """`Decoder.trunk` at a place."""
    return decoder.trunk(
        inputs,
        positions=place.positions,
        valid=place.valid,
        past=past,
        members=place.members,
        dropout=place.dropout,
        wanted=wanted,
    )


def observe(
    decoder: Decoder,
    inputs: Float[Array, "B T D"],
    place: Place,
    past: Past,
    observed: Int[Array, "B O"],
    wanted: Int[Array, "B W"] | None = None,
) -> tuple[Array, Any, Array]:
    """`Decoder.observe` at a place."""
    return decoder.observe(
        inputs,
        observed,
        positions=place.positions,
        valid=place.valid,
        past=past,
        members=place.members,
        dropout=place.dropout,
        wanted=wanted,
    )


def feed_back(
    feedback: Feedback, decoder: Decoder, before: Float[Array, "B T D"], place: Place
) -> Float[Array, "B T D"]:
    """The thoughts of a place, made of the hidden states before its columns; zero in columns a row does not use.

    A feedback that draws gets the row's key folded by the position of the column in its row: a thought is the same
    alone and beside its neighbours, and the same whatever padding stands before it.
    """
    if place.keys is None:
        made = feedback(decoder, before)
    else:
        fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
        made = feedback(decoder, before, keys=fold_in(place.keys, place.positions))
    return jnp.where(place.valid[..., None], made, 0.0)


def room_behind(decoder: Decoder, place: Place, past: Past) -> Segment:
    """A segment with room for the columns of a place, to be filled by `run_one_column`."""
    batch = place.valid.shape[0]
    inputs = jnp.zeros((batch, 1, decoder.config.embed_dim), decoder.execution.compute_dtype)
    layout = jax.eval_shape(lambda: trunk(decoder, inputs, place.column(jnp.asarray(0)), past)[1])
    return empty_segment(layout, batch, place.columns)


def run_one_column(
    decoder: Decoder, inputs: Float[Array, "B D"], here: Place, past: Past, own: Segment, index: Int[Array, ""]
) -> tuple[Float[Array, "B D"], Segment]:
    """Hidden states of one column of every row, and the segment ``own`` with that column written at ``index``."""
    valid = jax.lax.dynamic_update_slice_in_dim(own.valid, here.valid, index, axis=1)
    own = dataclasses.replace(own, valid=valid)
    hidden, key_values = decoder.trunk(
        inputs[:, None],
        positions=here.positions,
        valid=here.valid,
        past=(*past, own),
        dropout=here.dropout,
        write_at=index,
    )
    return hidden[:, 0], dataclasses.replace(own, key_values=key_values)


def think_sequentially(
    decoder: Decoder, feedback: Feedback, past: Past, last: Float[Array, "B D"], place: Place
) -> LatentSpan:
    """Makes ``K`` thoughts by a scan of one-column passes.

    Args:
      decoder: the decoder.
      feedback: how a hidden state becomes the next thought.
      past: segments before the span.
      last: hidden state of the column before the span.
      place: the span's columns; a row uses them from the left.
    """
    undisturbed = jnp.zeros((*place.valid.shape, last.shape[-1]), last.dtype)
    return _think_into(room_behind(decoder, place, past), decoder, feedback, past, last, place, undisturbed)


def _think_into(
    room: Segment,
    decoder: Decoder,
    feedback: Feedback,
    past: Past,
    last: Float[Array, "B D"],
    place: Place,
    disturbance: Float[Array, "B K D"],
) -> LatentSpan:
    """`think_sequentially` with what is added to the thoughts, so that its cotangent is the thoughts' own."""

    def body(carry: tuple[Array, Segment], scanned: tuple[Array, Array]) -> tuple[tuple[Array, Segment], Any]:
        hidden, own = carry
        index, disturbed = scanned
        here = place.column(index)
        thought = feed_back(feedback, decoder, hidden[:, None], here)[:, 0] + disturbed
        out, own = run_one_column(decoder, thought, here, past, own, index)
        return (jnp.where(here.valid, out, hidden), own), (thought, out)

    if decoder.execution.remat == "none" and choose_attention(decoder.config, decoder.execution) == "dense":
        # The results of products are kept: stacking all the rest takes longer than making it again. Not with kernels:
        # the policy does not see into them, and the prompt would be attended to once more.
        body = jax.checkpoint(body, policy=_PRODUCTS, prevent_cse=False)
    scanned = (jnp.arange(place.valid.shape[1]), disturbance.swapaxes(0, 1))
    (_, own), (thoughts, hidden) = jax.lax.scan(body, (last, room), scanned)
    return LatentSpan(thoughts.swapaxes(0, 1), hidden.swapaxes(0, 1), own.key_values)


def run_one_by_one(decoder: Decoder, inputs: Float[Array, "B K D"], place: Place, past: Past) -> tuple[Array, Any]:
    """Runs columns one after the other on inputs that are given, as `think_sequentially` runs them on its own.

    Args:
      decoder: the decoder.
      inputs: of the columns; those that a row does not use are not looked at.
      place: the columns; a row uses them from the left.
      past: segments before them.

    Returns:
      The hidden states ``[B, K, D]``, and keys and values, as `trunk` does.
    """

    def body(own: Segment, scanned: tuple[Array, Array]) -> tuple[Segment, Array]:
        index, column = scanned
        hidden, own = run_one_column(decoder, column, place.column(index), past, own, index)
        return own, hidden

    scanned = (jnp.arange(place.valid.shape[1]), inputs.swapaxes(0, 1))
    own, hidden = jax.lax.scan(body, room_behind(decoder, place, past), scanned)
    return hidden.swapaxes(0, 1), own.key_values


def think_in_parallel(
    decoder: Decoder,
    feedback: Feedback,
    past: Past,
    last: Float[Array, "B D"],
    place: Place,
    thoughts: Float[Array, "B K D"],
) -> LatentSpan:
    """Runs all columns at once on the given thoughts, and returns the thoughts that would follow.

    At the span's own thoughts this is a fixed point: it returns what `think_sequentially` returns. The arguments are
    those of `think_sequentially`.
    """
    hidden, key_values = trunk(decoder, thoughts, place, past)
    before = jnp.concatenate([last[:, None], hidden[:, :-1]], 1)
    return LatentSpan(feed_back(feedback, decoder, before, place), hidden, key_values)


@jax.custom_vjp
def think_implicitly(
    decoder: Decoder, feedback: Feedback, past: Past, last: Float[Array, "B D"], place: Place
) -> LatentSpan:
    """`think_sequentially`, with the implicit gradient of the module's text. Equal to autodiff up to rounding.

    The decoder may be on loan to this span (`Decoder.lend`): what applies its matrices to all columns at once, where
    their gradients arise, is the parallel pass.
    """
    return think_sequentially(take_back(decoder), feedback, past, last, place)


def _think_forward(decoder: Decoder, feedback: Feedback, past: Past, last: Array, place: Place) -> tuple[Any, Any]:
    # The parameters and the past are constants here: the reverse scan computes cotangents of activations alone.
    own = take_back(decoder)
    room = room_behind(own, place, past)

    def disturbed(disturbance: Array, completed: Any) -> tuple[LatentSpan, Any]:
        filling = dataclasses.replace(room, key_values=of_layers(Filling, room.key_values, completed))
        span = _think_into(filling, own, feedback, past, last, place, disturbance)
        written, completed = (
            of_layers(operator.attrgetter(part), span.key_values) for part in ("written", "completed")
        )
        return span._replace(key_values=written), completed

    undisturbed = jnp.zeros((*place.valid.shape, last.shape[-1]), last.dtype)
    (span, _), pull_back = jax.vjp(disturbed, undisturbed, room.key_values)
    return span, (decoder, feedback, past, last, place, span, pull_back)


def _think_backward(residuals: Any, cotangent: LatentSpan) -> tuple[Any, ...]:
    decoder, feedback, past, last, place, span, pull_back = residuals
    # The second is what `Filling` asks for; what it has as a cotangent of its own is nobody's.
    reaching, _ = pull_back((cotangent, span.key_values))
    _, pull_back_parallel = jax.vjp(
        lambda decoder, feedback, past_key_values, last: think_in_parallel(
            decoder, feedback, _with_key_values(past, past_key_values), last, place, span.thoughts
        ),
        decoder,
        feedback,
        [segment.key_values for segment in past],
        last,
    )
    to_decoder, to_feedback, to_key_values, to_last = pull_back_parallel(cotangent._replace(thoughts=reaching))
    to_past = tuple(
        Segment(own, *_no_cotangent((segment.valid, segment.columns)))
        for segment, own in zip(past, to_key_values, strict=True)
    )
    return to_decoder, to_feedback, to_past, to_last, _no_cotangent(place)


think_implicitly.defvjp(_think_forward, _think_backward)


def _with_key_values(past: Past, key_values: list[Any]) -> Past:
    return tuple(dataclasses.replace(segment, key_values=new) for segment, new in zip(past, key_values, strict=True))


_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.checkpoint_dots, jax.checkpoint_policies.save_only_these_names(LOOKED_BACK)
)


def _no_cotangent(tree: Any) -> Any:
    """The cotangent of integers, booleans and keys: JAX's float0."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), tree)
