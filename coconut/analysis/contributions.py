"""What each layer adds to the residual stream at the columns of thoughts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coconut.analysis.traces import Rows, batches, place_thoughts, run_layers
from coconut.errors import CoconutError
from coconut.models.decoder import Decoder
from coconut.models.layers import scale_of
from coconut.tokenizers import validate_ids


class Contributions(NamedTuple):
    """What is added to the residual stream at each thought; zero where a row has no such thought.

    The logit of a token is linear in the residual stream once the final norm's divisor is known. So it is the sum of
    what the stream begins with, what each layer's attention and MLP add, and the bias of that norm (Elhage et al. 2021,
    "A mathematical framework for transformer circuits"; "direct" because effects through later layers are not in it).

    Attributes:
      norms: Euclidean norms of what each layer adds: by its attention, and by its MLP.
      logits: the direct contribution of each to the logit of the token chosen.
      start: that of the stream before the first layer: the thought itself and its position.
      bias: that of the final norm's bias.
      total: the logit itself, which is the sum of the three.
    """

    norms: Float[np.ndarray, "L 2 B K"]
    logits: Float[np.ndarray, "L 2 B K"]
    start: Float[np.ndarray, "B K"]
    bias: Float[np.ndarray, "B K"]
    total: Float[np.ndarray, "B K"]


def contributions(
    decoder: Decoder, rows: Rows, tokens: Int[np.ndarray, "B K"], *, batch_size: int = 32
) -> Contributions:
    """What each layer adds to the residual stream at each thought, as a norm and in the logit of a token.

    Args:
      decoder: the decoder.
      rows: the rows.
      tokens: the token chosen for each thought; what stands where a row has no thought is not looked at.
      batch_size: rows run together.

    Raises:
      CoconutError: the tokens are not one for each thought, or are outside the vocabulary; see also `trace`.
    """
    if tokens.shape != rows.thoughts.shape:
        raise CoconutError(f"tokens of shape {tokens.shape}: the thoughts have the shape {rows.thoughts.shape}")
    present = rows.thoughts >= 0
    tokens = np.where(present, tokens, 0)
    validate_ids(tokens, decoder.config.vocabulary, "tokens")
    found = []
    for batch, number, (own, here) in batches(decoder, rows, batch_size, tokens, present):
        parts = _contributions(decoder, *batch, own, here)
        found.append(jax.tree.map(lambda x, number=number: np.asarray(x)[..., :number, :], parts))
    return Contributions(*(np.concatenate(parts, -2) for parts in zip(*found, strict=True)))


@jax.jit
def _contributions(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    thoughts: Int[Array, "B K"],
    inputs: Float[Array, "B K D"] | None,
    chosen: Int[Array, "B K"],
    present: Bool[Array, "B K"],
) -> tuple[Array, ...]:
    embedded = place_thoughts(decoder.embed(tokens), thoughts, inputs)
    layers = run_layers(decoder, embedded, positions=positions, valid=valid, wanted=jnp.maximum(thoughts, 0))
    wide = decoder.execution.accumulation_dtype
    outputs = decoder.output_matrix().astype(wide)[chosen] * decoder.config.logit_scale
    last = layers.states[-1].astype(wide)
    centred = decoder.config.normalization == "layernorm"
    spread = last - last.mean(-1, keepdims=True) if centred else last
    divisor = jnp.sqrt(jnp.square(spread).mean(-1) + decoder.config.norm_epsilon)
    directions = outputs * scale_of(decoder.norm).astype(wide) / divisor[..., None]
    if centred:
        # The mean is taken off every part alike, which is the same as off the direction.
        directions = directions - directions.mean(-1, keepdims=True)
    bias = jnp.zeros(chosen.shape, wide)
    if centred:
        assert isinstance(decoder.norm, nnx.LayerNorm) and decoder.norm.bias is not None
        bias = outputs @ decoder.norm.bias[...].astype(wide)
    added = jnp.stack([layers.attention, layers.mlp], 1).astype(wide)
    found = (
        jnp.linalg.norm(added, axis=-1),
        jnp.einsum("lpbkd,bkd->lpbk", added, directions),
        jnp.einsum("bkd,bkd->bk", layers.states[0].astype(wide), directions),
        bias,
        jnp.take_along_axis(decoder.unembed(layers.hidden), chosen[..., None], -1)[..., 0],
    )
    return tuple(jnp.where(present, part, 0.0) for part in found)
