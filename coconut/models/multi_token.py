"""A module that predicts the token after the next (multi-token prediction, DeepSeek-V3, DeepSeek-AI 2024, section 2.2).

It reads of each column the decoder's hidden state and the input of the column behind it, and writes the state of which
the decoder's head makes logits of the token behind that: one layer more, of depth one. It is trained beside a decoder,
whose states it makes look further ahead, and answers nothing.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder_layer import Layer
from coconut.models.layers import make_linear, make_norm, residual
from coconut.models.segment_attention import choose_attention
from coconut.models.visibility import Visibility

MULTI_TOKEN = "multi_token"
"""Name of the part of a model that it is (`coconut.model.Model.parts`)."""

AtThoughts = Literal["masked", "thought"]


class MultiToken(nnx.Module):
    """Two norms, a matrix, one layer of the decoder's kind and a norm. Embedding and head are the decoder's.

    Attributes:
      weight: factor of its cross-entropy in the objective. Static.
      at_thoughts: what is read in the place of the next input where that is a thought; see
        `coconut.methods.multi_token.MultiTokenConfig`. Static.
    """

    def __init__(
        self,
        config: DecoderConfig,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - immutable
        *,
        weight: float = 0.3,
        at_thoughts: AtThoughts = "masked",
        rngs: nnx.Rngs,
    ):
        self.weight, self.at_thoughts = weight, at_thoughts
        self.config, self.execution = config, execution
        D = config.embed_dim
        self.token_norm = make_norm(config, execution, rngs)
        self.hidden_norm = make_norm(config, execution, rngs)
        self.joined = make_linear(config, execution, 2 * D, D, ("mlp", "embed"), bias=False, rngs=rngs)
        self.layer: Any = Layer(config, execution, config.num_layers, rngs=rngs)
        self.norm = make_norm(config, execution, rngs)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        following: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """States of which the decoder's head makes logits. There is no dropout.

        Args:
          hidden: the decoder's states after its final norm.
          following: the input of the column behind each: the embedding of its token, or a thought.
          positions: position of each column in its row.
          valid: columns that others may attend to. For kernels the valid ones of a row must follow each other.
        """
        both = jnp.concatenate([self.token_norm(following), self.hidden_norm(hidden)], -1)
        implementation = choose_attention(self.config, self.execution)
        index = self.config.num_layers
        visible = Visibility(self.config, [], valid, dense=implementation == "dense").of_layer(index)
        out, _ = self.layer(
            residual(self.joined(both)),
            index=index,
            positions=positions,
            past=[],
            visible=visible,
            implementation=implementation,
            dropout=None,
            columns=[],
        )
        return self.norm(out)
