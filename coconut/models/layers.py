"""The pieces a decoder layer is built from."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from coconut.models.attention import attend, attention_weights, offset_query_bias, rotate
from coconut.models.cache import Filling, KeyValue, write
from coconut.models.config import DecoderConfig, ExecutionConfig, Mlp
from coconut.models.dropout import Dropout, RowMasks
from coconut.models.lending import Lent
from coconut.models.products import apply_matrix
from coconut.models.segment_attention import attend_by_kernels
from coconut.models.singular_values import ScaleForm, scales, weights_of
from coconut.sharding import constrain


def make_norm(
    config: DecoderConfig,
    execution: ExecutionConfig,
    rngs: nnx.Rngs,
    *,
    width: int | None = None,
    axis: str = "embed",
    epsilon: float | None = None,
) -> nnx.LayerNorm | nnx.RMSNorm:
    """The configured normalisation over ``D``, or another width, with statistics in at least float32.

    ``axis`` is its logical axis (`RULES`); ``epsilon`` is the configured one where it is None.
    """
    axes = {"axes": (axis,)}
    kind, metadata = {
        "layernorm": (nnx.LayerNorm, {"scale_metadata": axes, "bias_metadata": axes}),
        "rmsnorm": (NormAroundOne if config.norm_around_one else nnx.RMSNorm, {"scale_metadata": axes}),
    }[config.normalization]
    return kind(
        config.embed_dim if width is None else width,
        epsilon=config.norm_epsilon if epsilon is None else epsilon,
        dtype=execution.compute_dtype,
        param_dtype=jnp.dtype(config.param_dtype),
        # E[x^2] - E[x]^2 cancels where thoughts grow large.
        use_fast_variance=False,
        rngs=rngs,
        **metadata,
    )


class NormAroundOne(nnx.RMSNorm):
    """`nnx.RMSNorm` that multiplies by one plus its scale, which starts at zero, and rounds once (Gemma)."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options, scale_init=nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "*B D"], mask: None = None) -> Float[Array, "*B D"]:
        """Normalises the last axis, in at least float32."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        spread = jnp.square(wide).mean(-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(spread + self.epsilon) * scale_of(self).astype(wide.dtype)
        return normed.astype(self.dtype)


def scale_of(norm: nnx.LayerNorm | nnx.RMSNorm) -> Float[Array, " D"]:
    """What a norm multiplies by, in at least the dtype of its parameter."""
    assert norm.scale is not None
    scale = norm.scale[...]
    if not isinstance(norm, NormAroundOne):
        return scale
    return 1.0 + scale.astype(jnp.promote_types(scale.dtype, jnp.float32))


class Linear(nnx.Linear):
    """`nnx.Linear` whose matrix may be on loan (`coconut.models.lending`), and may have an adapter beside it.

    Attributes:
      lora_a, lora_b: the adapter's matrices (`coconut.models.adapters.add_adapters`), ``[D, rank]`` and ``[rank, F]``;
        None without one.
      lora_scaling: factor on what they make.
      lora_dropout: rate at which units of what they are applied to are dropped.
      singular_u, singular_s, singular_v: the matrix's decomposition, where its singular values are scaled
        (`coconut.models.singular_values`), ``[D, R]``, ``[R]`` and ``[R, F]``; None where they are not.
      singular_z: what they are scaled by, ``[R]``.
      singular_form: how.
      of_rows: whether it is applied to rows of activations alone. Else it cannot be lent, nor its adapter drop units.
    """

    of_rows: bool = True

    singular_u: Any = None
    singular_s: Any = None
    singular_v: Any = None
    singular_z: Any = None
    singular_form: ScaleForm = "scales"

    lora_a: Any = None
    lora_b: Any = None
    lora_scaling: float = 0.0
    lora_dropout: float = 0.0

    def __call__(self, x: Float[Array, "B T D"], dropout: Dropout | RowMasks | None = None) -> Float[Array, "B T F"]:
        """Applies the layer to the last axis; ``dropout`` is the adapter's, whatever its own rate."""
        kernel, x = self.kernel.get_value(), x.astype(self.dtype)
        y = kernel.apply(x) if isinstance(kernel, Lent) else apply_matrix(x, kernel.astype(self.dtype))
        if self.lora_a is not None:
            kept = x if dropout is None else dropout.adapted(x, self.lora_dropout)
            low = apply_matrix(kept, self.lora_a[...].astype(y.dtype))
            y = y + self.lora_scaling * apply_matrix(low, self.lora_b[...].astype(y.dtype))
        if self.singular_z is not None:
            turned = apply_matrix(x, self.singular_u[...].astype(y.dtype)) * self.singular_change().astype(y.dtype)
            y = y + apply_matrix(turned, self.singular_v[...].astype(y.dtype))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def singular_scales(self) -> Float[Array, "*L R"]:
        """What each singular value is multiplied by."""
        return scales(self.singular_s[...], weights_of(self.singular_z[...], self.singular_form), self.singular_form)

    def singular_change(self) -> Float[Array, "*L R"]:
        """What is added to each singular value."""
        return self.singular_s[...] * (self.singular_scales() - 1.0)


class Embedding(nnx.Embed):
    """`nnx.Embed` some of whose rows may be trained while the table is frozen.

    Attributes:
      trained_rows: what stands in place of these rows of the table, ``[rows, D]``; None for the table as it is.
      trained_ids: the tokens they belong to.
    """

    trained_rows: Any = None
    trained_ids: tuple[int, ...] = ()

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Looks tokens up."""
        embedded = super().__call__(tokens)
        if self.trained_rows is None:
            return embedded
        # Not from `table`: that would copy it for every token that is decoded.
        found = tokens[..., None] == jnp.asarray(self.trained_ids)
        own = jnp.take(self.trained_rows[...], jnp.argmax(found, -1), axis=0)
        return jnp.where(found.any(-1)[..., None], own.astype(embedded.dtype), embedded)

    def table(self, dtype: jnp.dtype) -> Float[Array, "V D"]:
        """All rows, those that are trained among them."""
        table = self.embedding[...].astype(dtype)
        if self.trained_rows is None:
            return table
        return table.at[jnp.asarray(self.trained_ids)].set(self.trained_rows[...].astype(dtype))


def make_linear(
    config: DecoderConfig,
    execution: ExecutionConfig,
    inputs: int,
    outputs: int,
    axes: tuple[str, str],
    *,
    bias: bool,
    rngs: nnx.Rngs,
    scale: float = 1.0,
) -> Linear:
    """A dense layer initialised by ``config.kernel_stddev * scale``; ``axes`` are its logical axes (`RULES`)."""
    return Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=execution.compute_dtype,
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(config.kernel_stddev * scale),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Multi-head or grouped-query self-attention."""

    def __init__(
        self, config: DecoderConfig, execution: ExecutionConfig, index: Int[Array, ""] | int, *, rngs: nnx.Rngs
    ):
        D, H = config.embed_dim, config.width_of_head
        self.config = config
        self.query = make_linear(
            config, execution, D, config.num_heads * H, ("embed", "heads"), bias=config.qkv_bias, rngs=rngs
        )
        self.key = make_linear(
            config, execution, D, config.kv_heads * H, ("embed", "kv_heads"), bias=config.qkv_bias, rngs=rngs
        )
        self.value = make_linear(
            config, execution, D, config.kv_heads * H, ("embed", "kv_heads"), bias=config.qkv_bias, rngs=rngs
        )
        self.output = make_linear(
            config,
            execution,
            config.num_heads * H,
            D,
            ("heads", "embed"),
            bias=config.output_bias,
            rngs=rngs,
            scale=(2 * config.num_layers) ** -0.5,
        )
        if config.query_key_norm:
            together = (config.num_heads, config.kv_heads) if config.query_key_norm_over == "all" else (1, 1)
            axes = ("heads", "kv_heads") if config.query_key_norm_over == "all" else ("head", "head")
            self.query_norm, self.key_norm = (
                make_norm(config, execution, rngs, width=number * H, axis=axis)
                for number, axis in zip(together, axes, strict=True)
            )
        if config.offset_bias:
            first = jnp.where(jnp.asarray(index) == 0, config.offset_bias, 0.0)
            key_bias = jnp.full((config.kv_heads, H), first, jnp.dtype(config.param_dtype))
            turning = config.rotary_of(local=config.is_local(0))
            query_bias = offset_query_bias(key_bias, config.num_heads, *turning, config.rotary_width)
            assert self.key.bias is not None and self.query.bias is not None
            self.key.bias[...], self.query.bias[...] = key_bias.reshape(-1), query_bias.reshape(-1)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        past: list[KeyValue | Filling],
        visible: list[Any],
        implementation: str,
        dropout: Dropout | RowMasks | None,
        columns: list[Int[Array, " _"]],
        wanted: Int[Array, "B W"] | None = None,
        write_at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], KeyValue | Filling]:
        """Attends to ``past`` and to the columns of ``x``.

        Args:
          x: what the attention reads (`Layer.attention_reads`).
          index: number of the layer, which may be traced where layers are scanned.
          positions: position of each column in its row.
          past: keys and values of earlier passes.
          visible: what of ``past``, and last of ``x``, may be seen: masks for `attend`, else ranges.
          implementation: ``dense`` for `attend`, else one of `attend_by_kernels`.
          dropout: of the attention weights and the adapters, or None.
          columns: index of each column of ``past`` and ``x`` in the whole sequence, where there is dropout.
          wanted: the columns of ``x`` that attend, which ``visible`` is about; None for all.
          write_at: where in the last of ``past`` the keys and values of ``x`` are written, to be attended to there.

        Returns:
          The attention's output at the columns wanted, and keys and values of all columns of ``x``, or of what they
          were written into.
        """
        # The attention weights have the keys that are folded by a column: the adapters' stand behind them.
        site = sites_of(None if dropout is None else dropout.at(dropout.total))
        query, key, value = self._project(x, index, positions, wanted, site)
        B, T = query.shape[:2]
        # Whole along the columns: every query looks back on all of them.
        own = KeyValue(*[constrain(x.swapaxes(1, 2), "rows", "kv_heads", "past", "head") for x in (key, value)])
        if write_at is not None:
            *past, room = past
            own = write(room, own, write_at)
        query, sources = query.swapaxes(1, 2), [*past, own]
        if implementation == "dense":
            kept = None if dropout is None else dropout.weights(B, self.config.num_heads, columns)
            out, own = attend(
                query, sources, visible, kept=kept, dropout=self.config.dropout, scale=self.config.score_scale
            )
        else:
            out, own = attend_by_kernels(
                query,
                sources,
                visible,
                implementation,
                scale=self.config.score_scale,
                window=self.config.window_of(index),
            )
        out = out.swapaxes(1, 2).reshape(B, T, -1)
        return self.output(constrain(out, rows_of(out), "columns", "heads"), site(3)), own

    def on_wanted_columns(self) -> list[nnx.Module]:
        """What a pass applies to the wanted columns alone; its keys and values are made of all of them."""
        return [self.query, self.output]

    def weights(
        self,
        x: Float[Array, "B T D"],
        *,
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B W T"],
        wanted: Int[Array, "B W"],
    ) -> Float[Array, "B N W T"]:
        """The weights with which some columns of a pass attend to all of them, by head, without dropout.

        Args:
          x: what the attention reads (`Layer.attention_reads`).
          index: number of the layer.
          positions: position of each column in its row.
          visible: the columns that each column wanted may see.
          wanted: the columns that attend.
        """
        query, key, _ = self._project(x, index, positions, wanted, sites_of(None))
        return attention_weights(query.swapaxes(1, 2), key.swapaxes(1, 2), visible, self.config.score_scale)

    def _project(
        self,
        x: Float[Array, "B T D"],
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        wanted: Int[Array, "B W"] | None,
        site: Callable[[int], Dropout | RowMasks | None],
    ) -> tuple[Float[Array, "B _ N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
        """Queries of the columns wanted, keys and values of all columns."""
        reading = x if wanted is None else take_columns(x, wanted)
        of_queries = positions if wanted is None else take_columns(positions, wanted)
        query = self.queries(reading, index, of_queries, site(0))
        key = self._turned(self._by_heads(self.key(x, site(1)), "kv_heads", "key_norm"), index, positions)
        return query, key, self._by_heads(self.value(x, site(2)), "kv_heads")

    def queries(
        self,
        x: Float[Array, "B T D"],
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        dropout: Dropout | RowMasks | None = None,
    ) -> Float[Array, "B T N H"]:
        """What each column asks in the layer of this number, normalised and rotated; ``dropout`` is the adapter's."""
        return self._turned(self._by_heads(self.query(x, dropout), "heads", "query_norm"), index, positions)

    def _by_heads(self, y: Float[Array, "B T _"], axis: str, norm: str | None = None) -> Float[Array, "B T _ H"]:
        """Splits what a matrix made into heads, normalised where the config has that."""
        norm = norm if self.config.query_key_norm else None
        together = self.config.query_key_norm_over == "all"
        if norm is not None and together:
            y = getattr(self, norm)(y)
        y = y.reshape(*y.shape[:2], -1, self.config.width_of_head)
        y = constrain(y, "rows", "columns", axis, "head")
        return y if norm is None or together else getattr(self, norm)(y)

    def _turned(
        self, y: Float[Array, "B T _ H"], index: Int[Array, ""] | int, positions: Int[Array, "B T"]
    ) -> Float[Array, "B T _ H"]:
        config = self.config
        if config.position_embedding != "rotary":
            return y

        def turned(local: bool) -> Float[Array, "B T _ H"]:
            return rotate(y, positions, *config.rotary_of(local=local), config.rotary_width)

        if config.layers_look_alike or isinstance(index, int):
            return turned(config.is_local(index))
        # Of layers that are scanned, which may differ.
        return jnp.where(config.local_layers[index], turned(True), turned(False))


class FeedForward(nnx.Module):
    """The MLP of a layer: one hidden matrix with GELU, or two, one of them the gate, through SiLU or GELU."""

    def __init__(self, config: DecoderConfig, execution: ExecutionConfig, *, width: int | None = None, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.width_of_mlp if width is None else width
        self.kind = config.mlp
        self.up = make_linear(config, execution, D, F, ("embed", "mlp"), bias=config.mlp_bias, rngs=rngs)
        self.is_gated = config.mlp_is_gated
        if self.is_gated:
            self.gate = make_linear(config, execution, D, F, ("embed", "mlp"), bias=config.mlp_bias, rngs=rngs)
        self.down = make_linear(
            config,
            execution,
            F,
            D,
            ("mlp", "embed"),
            bias=config.mlp_bias,
            rngs=rngs,
            scale=(2 * config.num_layers) ** -0.5,
        )

    def __call__(self, x: Float[Array, "B T D"], dropout: Dropout | RowMasks | None = None) -> Float[Array, "B T D"]:
        """Applies the MLP to each column; ``dropout`` is the adapters'."""
        site = sites_of(dropout)
        hidden = constrain(self.up(x, site(0)), rows_of(x), "columns", "mlp")
        gate = None
        if self.is_gated:
            gate = constrain(self.gate(x, site(1)), rows_of(x), "columns", "mlp")
        return self.down(activate(self.kind, hidden, gate), site(2))


@functools.partial(jax.checkpoint, static_argnums=0)
def activate(kind: Mlp, hidden: Float[Array, "*B F"], gate: Float[Array, "*B F"] | None) -> Float[Array, "*B F"]:
    """What an MLP makes of its hidden numbers; those of ``gate`` go through SiLU or GELU, where there is one.

    A backward pass computes it anew from what it is given; of GELU it would otherwise keep five arrays of that size.
    """
    if gate is None:
        return jax.nn.gelu(hidden, approximate=kind == "gelu_tanh")
    if kind == "swiglu":
        return jax.nn.silu(gate) * hidden
    return jax.nn.gelu(gate, approximate=kind == "geglu_tanh") * hidden


def sites_of(dropout: Dropout | RowMasks | None) -> Callable[[int], Dropout | RowMasks | None]:
    """The dropout of each site of a module, by its number."""
    return lambda site: None if dropout is None else dropout.at(site)


def rows_of(x: Float[Array, "B T D"]) -> str:
    """The logical axis of the rows of a pass: those of a single column move to the matrices (`coconut.sharding`)."""
    return "moving_rows" if x.shape[1] == 1 else "rows"


def residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The residual stream where it belongs on the current mesh."""
    return constrain(x, rows_of(x), "columns", "split_features" if x.shape[1] == 1 else "features")


def take_columns(x: Shaped[Array, "B T *D"], wanted: Int[Array, "B W"]) -> Shaped[Array, "B W *D"]:
    """The columns of each row that ``wanted`` names."""
    taken = jnp.take_along_axis(x, wanted.reshape(*wanted.shape, *[1] * (x.ndim - 2)), axis=1)
    return constrain(taken, *("rows", "columns", "features")[: x.ndim])
