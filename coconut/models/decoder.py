"""One decoder: GPT-2, Llama and Qwen by configuration. It knows nothing of thoughts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coconut.models.cache import KeyValue, Segment
from coconut.models.config import DecoderConfig
from coconut.models.layers import Dropout, Layer, make_linear, make_norm, residual
from coconut.models.lending import lend
from coconut.models.segment_attention import choose_attention, valid_range
from coconut.sharding import constrain


class Decoder(nnx.Module):
    """A decoder-only transformer in three pure pieces: `embed`, `trunk`, `unembed`.

    A decoder is a JAX pytree of its parameters: differentiate, jit and map over it like over any other.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        param_dtype = jnp.dtype(config.param_dtype)
        self.tokens = nnx.Embed(
            config.vocabulary,
            config.embed_dim,
            dtype=config.compute_dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(config.embedding_stddev),
            rngs=rngs,
        )
        if config.position_embedding == "learned":
            self.positions = nnx.Embed(
                config.max_positions,
                config.embed_dim,
                dtype=config.compute_dtype,
                param_dtype=param_dtype,
                embedding_init=nnx.initializers.normal(config.kernel_stddev),
                rngs=rngs,
            )
        # One key a layer in both layouts, so that they start from the same numbers.
        keys = jax.random.split(rngs.params(), config.num_layers)
        if config.scan_layers:
            indices = jnp.arange(config.num_layers)
            self.layers: Any = jax.vmap(lambda key, index: Layer(config, index, rngs=nnx.Rngs(key)))(keys, indices)
        else:
            self.layers = nnx.List([Layer(config, index, rngs=nnx.Rngs(key)) for index, key in enumerate(keys)])
        self.norm = make_norm(config, rngs)
        if not config.tied_head:
            self.head = make_linear(config, config.embed_dim, config.vocabulary, bias=False, rngs=rngs)

    def embed(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Token embeddings, without positions (these are added in `trunk`, to thoughts as to tokens)."""
        # Every device looks up its share of the features, for all rows of its group: the table is not gathered.
        embedded = constrain(self.tokens(tokens), *("moving_rows", "columns")[: tokens.ndim], "split_features")
        return constrain(embedded, *("rows", "columns")[: tokens.ndim], "features")

    def output_matrix(self) -> Float[Array, "V D"]:
        """What makes logits of hidden states, in the compute dtype; they are scaled by ``config.logit_scale``."""
        # A method, not a second attribute: two attributes would become two parameters under jit.
        matrix = self.tokens.embedding[...] if self.config.tied_head else self.head.kernel[...].T
        return matrix.astype(self.config.compute_dtype)

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits, in at least float32."""
        logits = jnp.matmul(
            hidden.astype(self.config.compute_dtype),
            self.output_matrix().T,
            preferred_element_type=self.config.accumulation_dtype,
        )
        logits = constrain(logits, *("rows", "columns")[: logits.ndim - 1], "vocabulary")
        return logits * self.config.logit_scale if self.config.logit_scale != 1.0 else logits

    def lend(self, batch: int, columns: Sequence[int]) -> list["Decoder"]:
        """This decoder, once for each of several passes that share their weight gradients (`coconut.models.lending`).

        Args:
          batch: ``B``.
          columns: ``T`` of each pass; its `trunk` must be called exactly once.
        """
        borrowers = []
        for layers in lend(self.layers, batch, columns, self.config.compute_dtype):
            borrower = jax.tree.map(lambda x: x, self)  # a new module around the same arrays
            borrower.layers = layers
            borrowers.append(borrower)
        return borrowers

    def trunk(
        self,
        inputs: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        past: Sequence[Segment] = (),
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """All layers and the final norm over ``T`` columns.

        Args:
          inputs: token embeddings or thoughts.
          positions: position of each column in its row.
          valid: columns that others may attend to. A column attends to valid columns of ``past``, and causally to
            valid columns of its own pass.
          past: segments earlier passes left; all their columns come before this pass's.
          dropout: masks to draw; None applies no dropout.

        Returns:
          Hidden states after the final norm, and this pass's keys and values in the layout of `Segment.layers`.
        """
        T = inputs.shape[1]
        x = inputs.astype(self.config.compute_dtype)
        if self.config.position_embedding == "learned":
            x = x + self.positions(positions)
        if dropout is not None:
            x = dropout.at(0).units(x)
        x = residual(x)
        causal = jnp.tril(jnp.ones((T, T), bool)) & valid[:, None, :]
        implementation = choose_attention(self.config)
        if implementation == "dense":
            visible: list[Any] = [segment.valid[:, None, :] for segment in past] + [causal]
        else:
            visible = [valid_range(columns) for columns in (*(segment.valid for segment in past), valid)]
        columns = [] if dropout is None else [segment.columns for segment in past] + [dropout.columns]

        def apply(layer: Layer, x: Array, index: int | Array, layer_past: list[KeyValue]) -> tuple[Array, KeyValue]:
            return layer(
                x,
                positions=positions,
                past=layer_past,
                visible=visible,
                implementation=implementation,
                dropout=None if dropout is None else dropout.at(index + 1),
                columns=columns,
            )

        if self.config.remat != "none":
            policy = jax.checkpoint_policies.checkpoint_dots if self.config.remat == "dots" else None
            apply = jax.checkpoint(apply, policy=policy, static_argnums=() if self.config.scan_layers else (2,))

        if self.config.scan_layers:
            x, own = jax.lax.scan(
                lambda x, scanned: apply(scanned[0], x, scanned[1], scanned[2]),
                x,
                (self.layers, jnp.arange(self.config.num_layers), [segment.layers for segment in past]),
            )
        else:
            own = []
            for index, layer in enumerate(self.layers):
                x, layer_own = apply(layer, x, index, [segment.layers[index] for segment in past])
                own.append(layer_own)
            own = tuple(own)
        return self.norm(x), own
