"""KaVa (arXiv 2510.02312): PCCoT whose thoughts also learn the teacher's keys and values, compressed to as many slots.

There is no official code. This is a reading of the paper's sections 3.2 and 3.3, and where they leave a choice it is
named: keys are those of the cache, rotated by their positions; scores are those of a head of keys, averaged over the
queries that share it; a norm is a mean over layers, heads and components; and where a chain has fewer tokens than there
are slots, the last slots learn nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from coconut.errors import CoconutError
from coconut.losses import Loss, Term
from coconut.methods.coconut import write_final_stage
from coconut.methods.codi import distilled, write_for_teacher
from coconut.methods.distillation import distance
from coconut.methods.method import LossContext, Method, Views
from coconut.methods.pccot import PccotOptions, sweep
from coconut.model import Model
from coconut.models.cache import KeyValue
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.models.decoder_layer import Layer
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, ModelOutput


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class KavaOptions(PccotOptions):
    """Options of `KAVA`. The defaults are the paper's for Llama 3.2-1B on GSM8K-Aug.

    Attributes:
      cache: factor of the distance between keys and values.
      importance: share of a token's importance in its score, the rest is how little it repeats of others.
      cache_squared: compare keys and values by squares in place of smooth L1.
      cache_divide_by: as ``divide_by``, of keys and values.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    distill: float = 10.0
    cache: float = 1.0
    importance: float = 0.1
    cache_squared: bool = False
    cache_divide_by: Literal["layer", "all", "none"] = "layer"

    def __post_init__(self) -> None:
        PccotOptions.__post_init__(self)
        if not 0 <= self.cache < np.inf:
            raise CoconutError(f"KavaOptions.cache = {self.cache!r}: must be at least 0")
        if not 0 <= self.importance <= 1:
            raise CoconutError(f"KavaOptions.importance = {self.importance!r}: must be between 0 and 1")


def token_scores(
    queries: Float[Array, "B N O H"],
    asking: Bool[Array, "B O"],
    keys: Float[Array, "B M C H"],
    chain: Bool[Array, "B C"],
    importance: float,
    scale: float | None = None,
) -> Float[Array, "B M C"]:
    """How much each token of the chain is worth keeping, for each head of keys (section 3.2).

    Importance is the attention that the answer's tokens pay to a token, among those of the chain. A token repeats the
    others by the mean cosine of its key with theirs; the softmax of its negative over the chain is the other part.
    Tokens outside of the chain score 0.

    Args:
      queries: of the answer's columns, rotated.
      asking: which of them belong to the row's answer.
      keys: of all columns.
      chain: the columns of the chain.
      importance: share of the first part.
      scale: of the scores; None for the root of ``1 / H``.
    """
    B, N, _, H = queries.shape
    M, C = keys.shape[1:3]
    seen, wide = chain[:, None, None, None], jnp.promote_types(keys.dtype, jnp.float32)
    lowest = jnp.finfo(wide).min
    grouped = queries.astype(wide).reshape(B, M, N // M, -1, H)
    scores = jnp.einsum("bmgoh,bmch->bmgoc", grouped, keys.astype(wide)) * (H**-0.5 if scale is None else scale)
    attention = jax.nn.softmax(jnp.where(seen, scores, lowest), -1)
    counted = asking[:, None, None, :, None]
    important = jnp.sum(jnp.where(counted, attention, 0.0), (2, 3)) / jnp.maximum(counted.sum((2, 3)) * (N // M), 1)
    unit = keys / (jnp.linalg.norm(keys, axis=-1, keepdims=True) + 1e-8)
    other = (chain[:, None, :, None] & chain[:, None, None, :]) & ~jnp.eye(C, dtype=bool)
    alike = jnp.sum(jnp.where(other, jnp.einsum("bmch,bmdh->bmcd", unit, unit), 0.0), -1)
    alike = alike / jnp.maximum(chain.sum(1), 1)[:, None, None]
    fresh = jax.nn.softmax(jnp.where(chain[:, None], -alike, lowest), -1)
    return jnp.where(chain[:, None], importance * important + (1 - importance) * fresh, 0.0)


def compress(
    cache: KeyValue, scores: Float[Array, "B M C"], chain: Bool[Array, "B C"], slots: int
) -> tuple[KeyValue, Bool[Array, "B S"]]:
    """The keys and values of the ``slots`` best tokens of the chain, of each head by itself, in their own order.

    Returns:
      Keys and values of shape ``[B, M, S, H]``, and which slots hold a token.
    """
    # Columns outside of the chain come last, whatever the others score.
    ranked = jnp.where(chain[:, None], scores, -1.0)
    _, best = jax.lax.top_k(ranked, min(slots, ranked.shape[-1]))
    count, columns = chain.sum(1)[:, None], jnp.arange(best.shape[-1])
    # Those that hold nothing stay behind when the others go back to their order.
    best = jnp.sort(jnp.where(columns < count[:, None], best, ranked.shape[-1]), -1)
    best = jnp.pad(best, ((0, 0), (0, 0), (0, slots - best.shape[-1])), constant_values=ranked.shape[-1])
    taken = jnp.minimum(best, ranked.shape[-1] - 1)[..., None]
    take = lambda x: jnp.take_along_axis(x, taken, 2)
    return KeyValue(take(cache.keys), take(cache.values)), jnp.arange(slots) < count


def kava_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """PCCoT's terms and ``cache``, the distance between the thoughts' keys and values and the teacher's."""
    options, batch = context.options, views["main"]
    loss, output, teacher = distilled(model, views, context, teacher_states=bool(options.cache))
    columns = _latent_columns(batch)
    if not (options.cache and len(columns)):
        return loss
    assert teacher is not None
    target, filled = _compressed(model.decoder, views["teacher"], teacher, len(columns), options.importance)
    own = [_joined(output, layer) for layer in range(model.decoder.config.num_layers)]
    counted = filled & batch.valid[:, columns]
    of_slots = lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
    terms = {}
    for part in ("keys", "values"):
        student = jnp.stack([of_slots(getattr(layer, part)[:, :, columns]) for layer in own])
        taught = jnp.stack([of_slots(getattr(layer, part)) for layer in target])
        far = distance(student, taught, counted, squared=options.cache_squared, divide_by=options.cache_divide_by)
        terms[f"cache_{part}"] = Term(far, options.cache / 2)
    return loss._replace(terms={**loss.terms, **terms})


def _compressed(
    decoder: Decoder, batch: Batch, teacher: ModelOutput, slots: int, importance: float
) -> tuple[list[KeyValue], Bool[Array, "B S"]]:
    """Of each layer, what of the teacher's chain is to be learnt."""
    labelled = batch.labels != IGNORED_LABEL
    chain, asking = labelled & ~batch.answers, scored_tail(batch, labelled & batch.answers)
    positions = scored_tail(batch, batch.positions)
    assert teacher.states is not None
    found, filled = [], jnp.zeros((len(chain), slots), bool)
    for index in range(decoder.config.num_layers):
        cache = jax.lax.stop_gradient(_joined(teacher, index))
        states = jax.lax.stop_gradient(teacher.states[index, :, 1:])
        queries = _queries(_layer(decoder, index), index, states, positions)
        scores = token_scores(queries, asking, cache.keys, chain, importance, decoder.config.score_scale)
        kept, filled = compress(cache, scores, chain, slots)
        found.append(kept)
    return found, filled


def scored_tail(batch: Batch, x: Array) -> Array:
    """The columns of the last span that may carry a label: the teacher's chain and answer."""
    last = batch.schedule[-1]
    assert isinstance(last, Language)
    return x[:, x.shape[1] - last.scored :]


def _queries(layer: Layer, index: int, states: Float[Array, "B O D"], positions: Array) -> Float[Array, "B N O H"]:
    """What the layer asks at some columns, from what it reads there."""
    return layer.attention.queries(layer.attention_reads(states), index, positions).swapaxes(1, 2)


def _layer(decoder: Decoder, index: int) -> Layer:
    if decoder.execution.scan_layers:
        return jax.tree.map(lambda x: x[index], decoder.layers)
    return decoder.layers[index]


def _joined(output: ModelOutput, index: int) -> KeyValue:
    """Keys and values of a layer, of all columns in order."""
    layers: list[Any] = []
    for segment in output.past:
        stacked = isinstance(segment.key_values, KeyValue)
        layers.append(jax.tree.map(lambda x: x[index], segment.key_values) if stacked else segment.key_values[index])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, 2), *layers)


def _no_parts(options: KavaOptions, decoder: DecoderConfig, key: Key[Array, ""]) -> Mapping[str, Any]:
    """Adds nothing to the model, whose decoder must keep keys and values.

    Raises:
      CoconutError: it keeps something else.
    """
    del key
    if options.cache and decoder.mixer != "attention":
        raise CoconutError(
            f"method kava learns the keys and values of each head (KavaOptions.cache = {options.cache!r}), which a "
            "decoder with DecoderConfig.latent_attention does not keep"
        )
    if options.cache and decoder.local_attention is not None:
        raise CoconutError(
            f"method kava ranks the columns of a chain (KavaOptions.cache = {options.cache!r}) by how much the answer "
            "attends to them, and knows no windows of DecoderConfig.local_attention"
        )
    return {}


def _latent_columns(batch: Batch) -> np.ndarray:
    starts = np.cumsum([0, *(span.length for span in batch.schedule)])
    spans = [np.arange(start, start + span.length)
             for start, span in zip(starts, batch.schedule, strict=False) if isinstance(span, Latent)]  # fmt: skip
    return np.concatenate(spans) if spans else np.zeros(0, int)


KAVA = Method(
    name="kava",
    pages={"main": write_final_stage, "teacher": write_for_teacher},
    options=KavaOptions,
    parts=_no_parts,
    think=sweep,
    needs_steps=True,
    loss=kava_loss,
)
