"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1).

Of a column a layer keeps one vector ``c`` of ``R`` features, of which all heads' keys and values are made, and one
rotated key for all heads: 576 numbers in DeepSeek V3, where keys and values by heads would be 40,960.

The scores of a head are ``q (K c) + q_turned k_turned``, and what it gives is ``V sum(a c)``, so the matrices ``K`` and
``V`` may be applied to what is kept, or to what asks of it and what is found:

- *expanded*: keys and values are made of what is kept, and attended to as ever;
- *absorbed*: the query takes in ``K``, ``(K^T q) c``, and all heads attend to ``c`` itself, as one head of keys.

A pass with nothing before it is expanded. Every other, which looks back on what earlier passes kept, is absorbed: what
is kept is never expanded again. Both are equal up to rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from coconut.models.attention import attend, attend_by_groups, attention_weights, rotate
from coconut.models.cache import Filling, KeyValue, LayerCache, write
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.dropout import Dropout, RowMasks
from coconut.models.latent_config import YarnRotaryScaling
from coconut.models.layers import Linear, make_linear, make_norm, rows_of, sites_of, take_columns
from coconut.sharding import constrain

INNER_EPSILON = 1e-6
"""What the norms of the two latent vectors add to the variance, whatever ``DecoderConfig.norm_epsilon`` is."""


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class LatentCache(LayerCache):
    """What latent attention keeps of the columns of a layer.

    Attributes:
      latent: the normalised vectors that keys and values are made of.
      turned: the rotated keys, which all heads share.
    """

    AXES = ("rows", "past", "latent")

    latent: Float[Array, "*L B C R"]
    turned: Float[Array, "*L B C P"]


class Expansion(Linear):
    """The matrix that makes every head's plain keys and values of a latent vector: ``[R, N * (plain + value)]``.

    It is applied to latent vectors, or taken in by queries and given out by what they find; so it may have an adapter,
    but one that drops nothing.
    """

    of_rows = False

    def by_heads(self, heads: int, dtype: jnp.dtype) -> Float[Array, "R N _"]:
        """The matrix itself with its adapter, by heads."""
        matrix = self.kernel[...].astype(dtype)
        if self.lora_a is not None:
            matrix = matrix + self.lora_scaling * self.lora_a[...].astype(dtype) @ self.lora_b[...].astype(dtype)
        if self.singular_z is not None:
            turned = self.singular_u[...].astype(dtype) * self.singular_change().astype(dtype)
            matrix = matrix + turned @ self.singular_v[...].astype(dtype)
        return constrain(matrix.reshape(len(matrix), heads, -1), "latent", "heads", "head")


class LatentAttention(nnx.Module):
    """Multi-head latent self-attention."""

    def __init__(
        self, config: DecoderConfig, execution: ExecutionConfig, index: Int[Array, ""] | int, *, rngs: nnx.Rngs
    ):
        del index
        assert config.latent_attention is not None
        self.config, self.sizes = config, config.latent_attention
        D, N, sizes, bias = config.embed_dim, config.num_heads, self.sizes, config.qkv_bias

        def linear(inputs: int, outputs: int, axes: tuple[str, str], *, bias: bool = False, scale: float = 1.0) -> Any:
            return make_linear(config, execution, inputs, outputs, axes, bias=bias, rngs=rngs, scale=scale)

        def norm(width: int) -> Any:
            return make_norm(config, execution, rngs, width=width, axis="latent", epsilon=INNER_EPSILON)

        if sizes.query_latent_dim is None:
            self.query = linear(D, N * sizes.query_dim, ("embed", "heads"))
        else:
            self.query_latent = linear(D, sizes.query_latent_dim, ("embed", "latent"), bias=bias)
            self.query_norm = norm(sizes.query_latent_dim)
            self.query = linear(sizes.query_latent_dim, N * sizes.query_dim, ("latent", "heads"))
        self.latent = linear(D, sizes.latent_dim + sizes.rotary_dim, ("embed", "latent"), bias=bias)
        self.latent_norm = norm(sizes.latent_dim)
        self.expansion = Expansion(
            sizes.latent_dim,
            N * (sizes.plain_dim + sizes.value_dim),
            use_bias=False,
            dtype=execution.compute_dtype,
            param_dtype=jnp.dtype(config.param_dtype),
            kernel_init=nnx.initializers.normal(config.kernel_stddev),
            kernel_metadata={"axes": ("latent", "heads")},
            rngs=rngs,
        )
        self.output = linear(
            N * sizes.value_dim, D, ("heads", "embed"), bias=config.output_bias, scale=(2 * config.num_layers) ** -0.5
        )

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        scaling = self.config.rotary_scaling
        factor = scaling.score_factor if isinstance(scaling, YarnRotaryScaling) else 1.0
        return factor * self.sizes.query_dim**-0.5

    def on_wanted_columns(self) -> list[nnx.Module]:
        """What a pass applies to the wanted columns alone; what is kept is made of all of them."""
        return [self.query, self.output, *([] if self.sizes.query_latent_dim is None else [self.query_latent])]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        past: list[LayerCache | Filling],
        visible: list[Any],
        implementation: str,
        dropout: Dropout | RowMasks | None,
        columns: list[Int[Array, " _"]],
        wanted: Int[Array, "B W"] | None = None,
        write_at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], LayerCache | Filling]:
        """Attends to ``past`` and to the columns of ``x``; the arguments are those of `Attention`.

        Raises:
          ValueError: ``implementation`` is not ``dense``.
        """
        del index
        if implementation != "dense":
            raise ValueError(f"implementation={implementation!r} does not apply to latent attention")
        # The attention weights have the keys that are folded by a column: the adapters' stand behind them.
        site = sites_of(None if dropout is None else dropout.at(dropout.total))
        query = self._queries(x, positions, wanted, site)
        own: Any = self._kept(x, positions, site)
        B, T, N = query.shape[:3]
        kept = None if dropout is None else dropout.weights(B, N, columns)
        if not past:
            keys, values = self._expanded(own)
            expanded = KeyValue(keys.swapaxes(1, 2), values.swapaxes(1, 2))
            out, _ = attend(
                query.swapaxes(1, 2), [expanded], visible, kept=kept, dropout=self.config.dropout, scale=self.scale
            )
            out = out.swapaxes(1, 2)
        else:
            if write_at is not None:
                *past, room = past
                own = write(room, own, write_at)
            out, own = self._absorbed(query, [*past, own], visible, kept)
        out = out.reshape(B, T, -1)
        return self.output(constrain(out, rows_of(out), "columns", "heads"), site(3)), own

    def weights(
        self,
        x: Float[Array, "B T D"],
        *,
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B W T"],
        wanted: Int[Array, "B W"],
    ) -> Float[Array, "B N W T"]:
        """The weights with which some columns of a pass attend to all of them; see `Attention.weights`."""
        del index
        query = self._queries(x, positions, wanted, sites_of(None))
        keys, _ = self._expanded(self._kept(x, positions, sites_of(None)))
        return attention_weights(query.swapaxes(1, 2), keys.swapaxes(1, 2), visible, self.scale)

    def _queries(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        wanted: Int[Array, "B W"] | None,
        site: Callable[[int], Dropout | RowMasks | None],
    ) -> Float[Array, "B _ N H"]:
        """What the columns wanted ask, the plain features before those that turn."""
        if wanted is not None:
            x, positions = take_columns(x, wanted), take_columns(positions, wanted)
        if self.sizes.query_latent_dim is not None:
            x = self.query_norm(self.query_latent(x, site(4)))
        query = self.query(x, site(0)).reshape(*x.shape[:2], -1, self.sizes.query_dim)
        plain, turning = jnp.split(constrain(query, "rows", "columns", "heads", "head"), [self.sizes.plain_dim], -1)
        return jnp.concatenate([plain, self._turned(turning, positions)], -1)

    def _kept(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], site: Callable[[int], Dropout | RowMasks | None]
    ) -> LatentCache:
        """What is kept of each column. Whole along the columns: every query looks back on all of them."""
        latent, turning = jnp.split(self.latent(x, site(1)), [self.sizes.latent_dim], -1)
        turned = self._turned(turning[:, :, None], positions)[:, :, 0]
        return LatentCache(
            *[constrain(part, *LatentCache.AXES) for part in (self.latent_norm(latent), turned)],
        )

    def _expanded(self, kept: LatentCache) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N _"]]:
        """Every head's keys and values."""
        made = self.expansion(kept.latent).reshape(*kept.latent.shape[:2], self.config.num_heads, -1)
        plain, values = jnp.split(made, [self.sizes.plain_dim], -1)
        turned = jnp.broadcast_to(kept.turned[:, :, None], (*plain.shape[:3], kept.turned.shape[-1]))
        return jnp.concatenate([plain, turned], -1), values

    def _absorbed(
        self,
        query: Float[Array, "B T N H"],
        sources: list[Any],
        visible: list[Any],
        kept: list[Bool[Array, "B N T _"]] | None,
    ) -> tuple[Float[Array, "B T N _"], Any]:
        """What the heads find in the vectors kept, and the last source from there on."""
        B, T, N, _ = query.shape
        matrix = self.expansion.by_heads(N, query.dtype)
        of_keys, of_values = jnp.split(matrix, [self.sizes.plain_dim], -1)
        plain, turned = jnp.split(query * jnp.asarray(self.scale, query.dtype), [self.sizes.plain_dim], -1)
        asking = jnp.einsum("btnh,rnh->bntr", plain, of_keys)
        # All heads ask of the same: one head of keys for N x T queries.
        grouped = (asking.reshape(B, 1, N * T, -1), turned.swapaxes(1, 2).reshape(B, 1, N * T, -1))
        found, own = attend_by_groups(
            grouped, sources, visible, T, score=_score, weigh=_weigh, kept=kept, dropout=self.config.dropout
        )
        found = found.reshape(B, N, T, -1).astype(query.dtype)
        return jnp.einsum("bntr,rnv->btnv", found, of_values), own

    def _turned(self, x: Float[Array, "B T _ P"], positions: Int[Array, "B T"]) -> Float[Array, "B T _ P"]:
        if self.sizes.interleaved:
            # Queries and keys change places alike, so their products stay as they are.
            x = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
        return rotate(x, positions, self.config.rotary_base, self.config.rotary_scaling)


def _score(queries: tuple[Array, Array], kept: LatentCache, wide: DTypeLike) -> Array:
    asking, turned = queries
    scores = jnp.einsum("bmqr,bcr->bmqc", asking, kept.latent, preferred_element_type=wide)
    return scores + jnp.einsum("bmqp,bcp->bmqc", turned, kept.turned, preferred_element_type=wide)


def _weigh(weights: Array, kept: LatentCache, wide: DTypeLike) -> Array:
    return jnp.einsum("bmqc,bcr->bmqr", weights, kept.latent, preferred_element_type=wide)
