"""Which experts each column chooses, layer by layer, in one pass over whole rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coconut.models.decoder import Decoder
from coconut.models.decoder_layer import Layer
from coconut.models.visibility import Visibility


def routes(
    decoder: Decoder,
    inputs: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    members: Int[Array, "B T"] | None = None,
) -> Int[Array, "X B T J"]:
    """The experts that columns choose, in each of the ``X`` layers that have experts. Traceable.

    Once thoughts are known, a whole row is one pass of causal attention: each column then chooses what it chose when
    thoughts were made one by one. Attention is dense, without dropout.

    Args:
      decoder: the decoder, with its layers stacked or one by one. It must have experts.
      inputs: token embeddings and thoughts, without positions.
      positions: position of each column in its row.
      valid: columns that others may attend to. Those that are not valid choose something all the same.
      members: which of its row's examples each column belongs to, where rows hold several.
    """
    assert decoder.config.experts is not None
    x = inputs.astype(decoder.execution.compute_dtype)
    if decoder.config.position_embedding == "learned":
        x = x + decoder.positions(positions)
    visible = Visibility(decoder.config, [], valid, dense=True, members=None if members is None else [members])

    def step(x: Array, scanned: tuple[Layer, Any]) -> tuple[Array, Any]:
        layer, index = scanned
        attended, _ = layer.attention(
            layer.attention_reads(x),
            index=index,
            positions=positions,
            past=[],
            visible=visible.of_layer(index),
            implementation="dense",
            dropout=None,
            columns=[],
        )
        between = x + layer.attention_adds(attended)
        router = getattr(layer.mlp, "router", None)
        chosen = None if router is None else router(layer.mlp_reads(between))[0]
        return between + layer.mlp_adds(between), chosen

    if decoder.execution.scan_layers:
        return jax.lax.scan(step, x, (decoder.layers, jnp.arange(decoder.config.num_layers)))[1]
    found = []
    for index, layer in enumerate(decoder.layers):
        x, chosen = step(x, (layer, index))
        found += [] if chosen is None else [chosen]
    return jnp.stack(found)
