"""Which experts each column chooses, layer by layer, in one pass over whole rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coconut.models.decoder import Decoder
from coconut.models.decoder_layer import Layer


def routes(
    decoder: Decoder, inputs: Float[Array, "B T D"], *, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> Int[Array, "X B T J"]:
    """The experts that columns choose, in each of the ``X`` layers that have experts. Traceable.

    Once thoughts are known, a whole row is one pass of causal attention: each column then chooses what it chose when
    thoughts were made one by one. Attention is dense, without dropout.

    Args:
      decoder: the decoder, with its layers stacked or one by one. It must have experts.
      inputs: token embeddings and thoughts, without positions.
      positions: position of each column in its row.
      valid: columns that others may attend to. Those that are not valid choose something all the same.
    """
    assert decoder.config.experts is not None
    T = inputs.shape[1]
    x = inputs.astype(decoder.execution.compute_dtype)
    if decoder.config.position_embedding == "learned":
        x = x + decoder.positions(positions)
    everywhere = (jnp.arange(T) <= jnp.arange(T)[:, None]) & valid[:, None, :]

    def step(x: Array, layer: Layer) -> tuple[Array, Any]:
        attended, _ = layer.attention(
            layer.attention_reads(x),
            positions=positions,
            past=[],
            visible=[everywhere],
            implementation="dense",
            dropout=None,
            columns=[],
        )
        between = x + layer.attention_adds(attended)
        router = getattr(layer.mlp, "router", None)
        chosen = None if router is None else router(layer.mlp_reads(between))[0]
        return between + layer.mlp_adds(between), chosen

    if decoder.execution.scan_layers:
        return jax.lax.scan(step, x, decoder.layers)[1]
    found = []
    for layer in decoder.layers:
        x, chosen = step(x, layer)
        found += [] if chosen is None else [chosen]
    return jnp.stack(found)
