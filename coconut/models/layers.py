"""The pieces a decoder layer is built from."""

import dataclasses
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from coconut.models.attention import attend, attention_weights, offset_query_bias, rotate
from coconut.models.cache import Filling, KeyValue, write
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.lending import Lent, apply_matrix
from coconut.models.segment_attention import attend_by_kernels
from coconut.sharding import constrain


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout whose masks depend on the column, not on the pass that computes it.

    A thought is computed twice in training, first alone and then beside its neighbours (`coconut.latent.rollout`);
    both must drop the same units. So every column folds its own index into the key.

    Attributes:
      key: key of this site; `at` derives the next one.
      columns: index of each column of this pass in the whole sequence.
      total: number of columns of the whole sequence. Static.
      rate: share of units dropped. Static.
    """

    key: Key[Array, ""]
    columns: Int[Array, " T"]
    total: int = dataclasses.field(metadata={"static": True})
    rate: float = dataclasses.field(metadata={"static": True})

    def at(self, site: int | Array) -> "Dropout":
        """The same columns with a key of their own for one site of the network."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, site))

    def _kept(self, shape: tuple[int, ...]) -> Bool[Array, "T ..."]:
        keys = jax.vmap(lambda column: jax.random.fold_in(self.key, column))(self.columns)
        return jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, shape))(keys)

    def units(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Drops units of ``x`` and scales the rest."""
        if not self.rate:
            return x
        kept = self._kept((x.shape[0], x.shape[2])).swapaxes(0, 1)
        return jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)

    def embedded(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`units` of what the first layer reads."""
        return self.at(0).units(x)

    def adapted(self, x: Float[Array, "B T D"], rate: float) -> Float[Array, "B T D"]:
        """`units` of what an adapter is applied to, at the adapter's own rate."""
        return dataclasses.replace(self, rate=rate).units(x)

    def weights(self, batch: int, heads: int, sources: list[Int[Array, " _"]]) -> list[Bool[Array, "B N T _"]] | None:
        """Which attention weights to keep, for sources holding the given columns; None for all."""
        if not self.rate:
            return None
        kept = self._kept((batch, heads, self.total)).transpose(1, 2, 0, 3)
        return [kept[..., columns] for columns in sources]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class RowMasks:
    """Dropout as a draw that a row keeps: one mask for each site of the network, the same in all of its columns.

    It makes thoughts random that a row's key makes again: with the key each mask is known. It drops units of what the
    layers add to the residual stream, of some columns alone; embeddings, attention weights and adapters keep theirs.

    Attributes:
      keys: a key for each row at this site; `at` derives the next ones.
      columns: index of each column of this pass in the whole sequence.
      dropping: which columns of the whole sequence drop units.
      rate: share of units dropped. Static.
      afresh: draw another mask for each column. Static.
    """

    keys: Key[Array, " B"]
    columns: Int[Array, " T"]
    dropping: Bool[Array, " _"]
    rate: float = dataclasses.field(metadata={"static": True})
    afresh: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def total(self) -> int:
        """Number of columns of the whole sequence."""
        return len(self.dropping)

    def at(self, site: int | Array) -> "RowMasks":
        """The same columns with keys of their own for one site of the network."""
        return dataclasses.replace(self, keys=_fold_in_rows(self.keys, site))

    def units(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Drops units of ``x`` in the columns that do, and scales the rest of these."""

        def mask(key: Key[Array, ""]) -> Bool[Array, " D"]:
            return jax.random.bernoulli(key, 1.0 - self.rate, x.shape[-1:])

        if self.afresh:
            # Counted from the first thought: how wide the prompts of a batch are changes no mask.
            numbers = jnp.maximum(self.columns - jnp.argmax(self.dropping), 0)
            kept = jax.vmap(jax.vmap(lambda key, number: mask(jax.random.fold_in(key, number)), (None, 0)), (0, None))(
                self.keys, numbers
            )
        else:
            kept = jax.vmap(mask)(self.keys)[:, None]
        dropped = jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)
        return jnp.where(self.dropping[self.columns][:, None], dropped, x)

    def embedded(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the first layer reads, whole."""
        return x

    def adapted(self, x: Float[Array, "B T D"], rate: float) -> Float[Array, "B T D"]:
        """What an adapter is applied to, whole."""
        del rate
        return x

    def weights(self, batch: int, heads: int, sources: list[Int[Array, " _"]]) -> None:
        """Which attention weights to keep: all."""
        del batch, heads, sources


def _fold_in_rows(keys: Key[Array, " B"], data: int | Array) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def make_norm(
    config: DecoderConfig, execution: ExecutionConfig, rngs: nnx.Rngs, *, heads: bool = False
) -> nnx.LayerNorm | nnx.RMSNorm:
    """The configured normalisation over ``D``, or over ``H`` for heads, with statistics in at least float32."""
    axes = {"axes": ("head",) if heads else ("embed",)}
    kind, metadata = {
        "layernorm": (nnx.LayerNorm, {"scale_metadata": axes, "bias_metadata": axes}),
        "rmsnorm": (nnx.RMSNorm, {"scale_metadata": axes}),
    }[config.normalization]
    return kind(
        config.width_of_head if heads else config.embed_dim,
        epsilon=config.norm_epsilon,
        dtype=execution.compute_dtype,
        param_dtype=jnp.dtype(config.param_dtype),
        # E[x^2] - E[x]^2 cancels where thoughts grow large.
        use_fast_variance=False,
        rngs=rngs,
        **metadata,
    )


class Linear(nnx.Linear):
    """`nnx.Linear` whose matrix may be on loan (`coconut.models.lending`), and may have an adapter beside it.

    Attributes:
      lora_a, lora_b: the adapter's matrices (`coconut.models.adapters.add_adapters`), ``[D, rank]`` and ``[rank, F]``;
        None without one.
      lora_scaling: factor on what they make.
      lora_dropout: rate at which units of what they are applied to are dropped.
    """

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
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


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
            self.query_norm = make_norm(config, execution, rngs, heads=True)
            self.key_norm = make_norm(config, execution, rngs, heads=True)
        if config.offset_bias:
            first = jnp.where(jnp.asarray(index) == 0, config.offset_bias, 0.0)
            key_bias = jnp.full((config.kv_heads, H), first, jnp.dtype(config.param_dtype))
            query_bias = offset_query_bias(key_bias, config.num_heads, config.rotary_base, config.rotary_scaling)
            assert self.key.bias is not None and self.query.bias is not None
            self.key.bias[...], self.query.bias[...] = key_bias.reshape(-1), query_bias.reshape(-1)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
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
          x: the normed residual stream.
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
        site = _sites(None if dropout is None else dropout.at(dropout.total))
        query, key, value = self._project(x, positions, wanted, site)
        B, T = query.shape[:2]
        # Whole along the columns: every query looks back on all of them.
        own = KeyValue(*[constrain(x.swapaxes(1, 2), "rows", "kv_heads", "past", "head") for x in (key, value)])
        if write_at is not None:
            *past, room = past
            own = write(room, own, write_at)
        query, sources = query.swapaxes(1, 2), [*past, own]
        if implementation == "dense":
            kept = None if dropout is None else dropout.weights(B, self.config.num_heads, columns)
            out, own = attend(query, sources, visible, kept=kept, dropout=self.config.dropout)
        else:
            out, own = attend_by_kernels(query, sources, visible, implementation)
        out = out.swapaxes(1, 2).reshape(B, T, -1)
        return self.output(constrain(out, rows_of(out), "columns", "heads"), site(3)), own

    def weights(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B W T"],
        wanted: Int[Array, "B W"],
    ) -> Float[Array, "B N W T"]:
        """The weights with which some columns of a pass attend to all of them, by head, without dropout.

        Args:
          x: the normed residual stream.
          positions: position of each column in its row.
          visible: the columns that each column wanted may see.
          wanted: the columns that attend.
        """
        query, key, _ = self._project(x, positions, wanted, _sites(None))
        return attention_weights(query.swapaxes(1, 2), key.swapaxes(1, 2), visible)

    def _project(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        wanted: Int[Array, "B W"] | None,
        site: Callable[[int], Dropout | RowMasks | None],
    ) -> tuple[Float[Array, "B _ N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
        """Queries of the columns wanted, keys and values of all columns."""
        reading = x if wanted is None else take_columns(x, wanted)
        query, key, value = (
            constrain(y.reshape(*y.shape[:2], -1, self.config.width_of_head), "rows", "columns", heads, "head")
            for y, heads in (
                (self.query(reading, site(0)), "heads"),
                (self.key(x, site(1)), "kv_heads"),
                (self.value(x, site(2)), "kv_heads"),
            )
        )
        if self.config.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.position_embedding == "rotary":
            of_queries = positions if wanted is None else take_columns(positions, wanted)
            query = rotate(query, of_queries, self.config.rotary_base, self.config.rotary_scaling)
            key = rotate(key, positions, self.config.rotary_base, self.config.rotary_scaling)
        return query, key, value


class FeedForward(nnx.Module):
    """The MLP of a layer: one hidden matrix with GELU, or two with a SiLU gate."""

    def __init__(self, config: DecoderConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.width_of_mlp
        self.kind = config.mlp
        self.up = make_linear(config, execution, D, F, ("embed", "mlp"), bias=config.mlp_bias, rngs=rngs)
        if config.mlp == "swiglu":
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
        site = _sites(dropout)
        hidden = constrain(self.up(x, site(0)), rows_of(x), "columns", "mlp")
        if self.kind == "swiglu":
            hidden = jax.nn.silu(constrain(self.gate(x, site(1)), rows_of(x), "columns", "mlp")) * hidden
        else:
            hidden = jax.nn.gelu(hidden, approximate=self.kind == "gelu_tanh")
        return self.down(hidden, site(2))


def _sites(dropout: Dropout | RowMasks | None) -> Callable[[int], Dropout | RowMasks | None]:
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


class Layer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: DecoderConfig, execution: ExecutionConfig, index: Int[Array, ""] | int, *, rngs: nnx.Rngs
    ):
        self.attention_norm = make_norm(config, execution, rngs)
        self.attention = Attention(config, execution, index, rngs=rngs)
        self.mlp_norm = make_norm(config, execution, rngs)
        self.mlp = FeedForward(config, execution, rngs=rngs)

    def on_wanted_columns(self) -> list[nnx.Module]:
        """What a pass applies to the wanted columns alone; its keys and values are made of all of them."""
        return [self.attention.query, self.attention.output, self.mlp]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        past: list[KeyValue | Filling],
        visible: list[Any],
        implementation: str,
        dropout: Dropout | RowMasks | None,
        columns: list[Int[Array, " _"]],
        wanted: Int[Array, "B W"] | None = None,
        write_at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], KeyValue | Filling]:
        """One layer, whose output has the columns wanted alone; see `Attention` for the arguments."""
        drop = (lambda y, site: y) if dropout is None else (lambda y, site: dropout.at(site).units(y))
        branch, own = self.attention(
            self.attention_norm(x),
            positions=positions,
            past=past,
            visible=visible,
            implementation=implementation,
            dropout=None if dropout is None else dropout.at(0),
            columns=columns,
            wanted=wanted,
            write_at=write_at,
        )
        x = residual((x if wanted is None else take_columns(x, wanted)) + drop(branch, 1))
        return residual(x + drop(self.mlp(self.mlp_norm(x), None if dropout is None else dropout.at(3)), 2)), own
