"""One decoder: GPT-2, Llama, Gemma, OLMo, Phi, Qwen and DeepSeek by configuration. It knows nothing of thoughts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coconut.errors import CoconutError
from coconut.models.cache import LOOKED_BACK, Filling, LayerCache, Segment
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder_layer import Layer
from coconut.models.dropout import Dropout, RowMasks
from coconut.models.layers import Embedding, make_linear, make_norm, residual, take_columns
from coconut.models.lending import lend
from coconut.models.products import logits_of
from coconut.models.segment_attention import choose_attention
from coconut.models.visibility import Visibility
from coconut.sharding import constrain
from pallas_kernels.platform import log_once


class Decoder(nnx.Module):
    """A decoder-only transformer in three pure pieces: `embed`, `trunk`, `unembed`.

    A decoder is a JAX pytree of its parameters: differentiate, jit and map over it like over any other.

    Attributes:
      lora_dropout: dropout rate of its adapters (`coconut.models.adapters`).
    """

    lora_dropout: float = 0.0

    def __init__(
        self,
        config: DecoderConfig,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - immutable
        *,
        rngs: nnx.Rngs,
    ):
        execution.check(config)
        self.config, self.execution = config, execution
        param_dtype = jnp.dtype(config.param_dtype)
        self.tokens = Embedding(
            config.vocabulary,
            config.embed_dim,
            dtype=execution.compute_dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(config.embedding_stddev),
            embedding_metadata={"axes": ("vocabulary", "embed")},
            rngs=rngs,
        )
        if config.position_embedding == "learned":
            self.positions = nnx.Embed(
                config.max_positions,
                config.embed_dim,
                dtype=execution.compute_dtype,
                param_dtype=param_dtype,
                embedding_init=nnx.initializers.normal(config.kernel_stddev),
                embedding_metadata={"axes": ("positions", "embed")},
                rngs=rngs,
            )
        # One key a layer in both layouts, so that they start from the same numbers.
        keys = jax.random.split(rngs.params(), config.num_layers)
        if execution.scan_layers:
            indices = jnp.arange(config.num_layers)
            self.layers: Any = jax.vmap(lambda key, index: Layer(config, execution, index, rngs=nnx.Rngs(key)))(
                keys, indices
            )
            for parameter in jax.tree.leaves(self.layers, is_leaf=lambda x: isinstance(x, nnx.Param)):
                parameter.set_metadata(axes=("layers", *parameter.get_metadata("axes")))
        else:
            self.layers = nnx.List(
                [Layer(config, execution, index, rngs=nnx.Rngs(key)) for index, key in enumerate(keys)]
            )
        self.norm = make_norm(config, execution, rngs)
        if not config.tied_head:
            self.head = make_linear(
                config, execution, config.embed_dim, config.vocabulary, ("embed", "vocabulary"), bias=False, rngs=rngs
            )

    def embed(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Token embeddings, without positions (these are added in `trunk`, to thoughts as to tokens)."""
        # Every device looks up its share of the features, for all rows of its group: the table is not gathered.
        tokens = constrain(tokens, *("moving_rows", "columns")[: tokens.ndim])
        embedded = constrain(self.tokens(tokens), *("moving_rows", "columns")[: tokens.ndim], "split_features")
        embedded = constrain(embedded, *("rows", "columns")[: tokens.ndim], "features")
        return self._scaled(embedded)

    def input_table(self, dtype: jnp.dtype) -> Float[Array, "V D"]:
        """What `embed` gives for each token."""
        return self._scaled(self.tokens.table(dtype))

    def _scaled(self, embedded: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.config.embedding_scale
        # Rounded to the dtype, as Gemma's own code does.
        return embedded if scale == 1.0 else embedded * jnp.asarray(scale, embedded.dtype)

    def output_matrix(self) -> Float[Array, "V D"]:
        """What makes logits of hidden states, in the compute dtype; they are scaled by ``config.logit_scale``."""
        # A method, not a second attribute: two attributes would become two parameters under jit.
        dtype = self.execution.compute_dtype
        return self.tokens.table(dtype) if self.config.tied_head else self.head.kernel[...].T.astype(dtype)

    @property
    def drops(self) -> bool:
        """Whether a dropout key changes what it computes."""
        return self.config.dropout > 0 or self.lora_dropout > 0

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits, in at least float32."""
        hidden = hidden.astype(self.execution.compute_dtype)
        logits = logits_of(hidden, self.output_matrix(), self.execution.accumulation_dtype)
        logits = constrain(logits, *("rows", "columns")[: logits.ndim - 1], "vocabulary")
        return logits * self.config.logit_scale if self.config.logit_scale != 1.0 else logits

    def by_masks(self) -> "Decoder":
        """This decoder with attention that masks say, also where ``auto`` chooses kernels, which know ranges alone.

        Raises:
          CoconutError: ``ExecutionConfig.attention`` names a kernel.
        """
        attention = self.execution.attention
        if attention not in ("auto", "dense"):
            raise CoconutError(
                f"ExecutionConfig.attention = {attention!r}: kernels do not take rows of several examples "
                "(PipelineConfig.examples_per_row); auto and dense do"
            )
        if attention == "auto":
            log_once("attention of rows of several examples: dense")
        masked = jax.tree.map(lambda x: x, self)  # a new module around the same arrays
        masked.execution = dataclasses.replace(self.execution, attention="dense")
        return masked

    def lend(
        self, batch: Sequence[int], columns: Sequence[int], wanted: Sequence[int] | None = None, *, drops: bool = False
    ) -> list["Decoder"]:
        """This decoder, once for each of several passes that share their weight gradients (`coconut.models.lending`).

        Args:
          batch: ``B`` of each pass: a multiple of the least.
          columns: ``T`` of each pass; its `trunk` must be called exactly once.
          wanted: columns that each pass wants (`trunk`); None for all.
          drops: whether the passes have dropout.
        """
        borrowers = [jax.tree.map(lambda x: x, self) for _ in columns]  # new modules around the same arrays
        fewer = [self.seen_by_last_layer(T, W, drops=drops) for T, W in zip(columns, wanted or columns, strict=True)]
        narrow = [] if self.execution.scan_layers else self.layers[-1].on_wanted_columns()
        loans = lend(self.layers, batch, columns, self.execution.compute_dtype, narrow=narrow, fewer=fewer)
        for borrower, layers in zip(borrowers, loans, strict=True):
            borrower.layers = layers
        return borrowers

    def seen_by_last_layer(self, columns: int, wanted: int, *, drops: bool = False) -> int:
        """How many of a pass's columns the last layer computes: those that are wanted, where it can leave out others.

        All others are in it only to be looked back on. It leaves none out as one of a stack that is scanned; nor with
        dropout, whose masks belong to columns; and the kernels see columns in order, or a single one.
        """
        alike = self.execution.scan_layers or drops
        dense = choose_attention(self.config, self.execution) == "dense"
        return wanted if wanted < columns and not alike and (wanted == 1 or dense) else columns

    def trunk(
        self,
        inputs: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        past: Sequence[Segment] = (),
        members: Int[Array, "B T"] | None = None,
        dropout: Dropout | RowMasks | None = None,
        wanted: Int[Array, "B W"] | None = None,
        write_at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """All layers and the final norm over ``T`` columns: `observe` with no column observed."""
        nothing = jnp.zeros((len(inputs), 0), jnp.int32)
        hidden, key_values, _ = self.observe(
            inputs,
            nothing,
            positions=positions,
            valid=valid,
            past=past,
            members=members,
            dropout=dropout,
            wanted=wanted,
            write_at=write_at,
        )
        return hidden, key_values

    def observe(
        self,
        inputs: Float[Array, "B T D"],
        observed: Int[Array, "B O"],
        *,
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        past: Sequence[Segment] = (),
        members: Int[Array, "B T"] | None = None,
        dropout: Dropout | RowMasks | None = None,
        wanted: Int[Array, "B W"] | None = None,
        write_at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any, Float[Array, "_ B O D"]]:
        """All layers and the final norm over ``T`` columns, and what lies between the layers at some of them.

        A column whose hidden state nobody reads is in the last layer only to be looked back on: it needs a key and a
        value there, and neither query nor MLP, which in a decoder of two layers is nearly half of the work.

        Args:
          inputs: token embeddings or thoughts.
          observed: the columns of each row to observe.
          positions: position of each column in its row.
          valid: columns that others may attend to. A column attends to valid columns of ``past``, and causally to
            valid columns of its own pass.
          past: segments earlier passes left; all their columns come before this pass's.
          members: which of its row's examples each column belongs to, where rows hold several and the segments of
            ``past`` say the same of theirs; None where a row is one example.
          dropout: masks to draw; None applies no dropout.
          wanted: the columns of each row whose hidden states are returned; None for all.
          write_at: for a pass of one column: where in the last segment of ``past`` its keys and values are written, to
            be attended to there. That segment's ``valid`` includes this column already.

        Returns:
          Hidden states after the final norm of the columns wanted; keys and values of all columns of this pass, or of
          the segment it wrote into, in the layout of `Segment.key_values`; and ``L + 1`` states of each column
          observed: what the first layer reads, what each layer leaves, the last of them after the final norm.

        Raises:
          ValueError: ``write_at`` for a pass of several columns.
        """
        T = inputs.shape[1]
        if write_at is not None and T != 1:
            raise ValueError(f"write_at is for a pass of one column, this one has {T}")
        x = constrain(inputs.astype(self.execution.compute_dtype), "rows", "columns", "features")
        if self.config.position_embedding == "learned":
            x = x + self.positions(positions)
        if dropout is not None:
            x = dropout.embedded(x)
        x = residual(x)
        implementation = choose_attention(self.config, self.execution)
        columns = []
        if dropout is not None:
            columns = [*(segment.columns for segment in past), *([dropout.columns] if write_at is None else [])]

        visible = Visibility(
            self.config,
            [_of_each_row(segment.valid, len(inputs)) for segment in past],
            valid if write_at is None else None,
            dense=implementation == "dense",
            members=None if members is None else [*(_members_of(segment) for segment in past), members],
        )

        def apply(
            layer: Layer,
            x: Array,
            index: int | Array,
            layer_past: list[LayerCache | Filling],
            wanted: Array | None = None,
        ) -> tuple[Array, LayerCache | Filling]:
            return layer(
                x,
                index=index,
                positions=positions,
                past=layer_past,
                visible=visible.of_layer(index, wanted),
                implementation=implementation,
                dropout=None if dropout is None else dropout.at(index + 1),
                columns=columns,
                wanted=wanted,
                write_at=write_at,
            )

        number_wanted, watch = None, observed.shape[1] > 0
        if wanted is not None and watch:
            number_wanted, wanted = wanted.shape[1], jnp.concatenate([wanted, observed], 1)
        drops = dropout is not None
        leaves_out = wanted is not None and self.seen_by_last_layer(T, wanted.shape[1], drops=drops) < T
        between = [take_columns(x, observed)] if watch else []
        if self.execution.remat != "none":
            keep = jax.checkpoint_policies
            policy = keep.save_only_these_names(LOOKED_BACK)
            if self.execution.remat == "dots":
                policy = keep.save_from_both_policies(keep.checkpoint_dots, policy)
            apply = jax.checkpoint(apply, policy=policy, static_argnums=() if self.execution.scan_layers else (2,))

        if self.execution.scan_layers:

            def step(x: Array, scanned: tuple[Layer, Array, list[Any]]) -> tuple[Array, tuple[Any, Array | None]]:
                x, layer_own = apply(*(scanned[0], x, scanned[1], scanned[2]))
                return x, (layer_own, take_columns(x, observed) if watch else None)

            x, (own, left) = jax.lax.scan(
                step, x, (self.layers, jnp.arange(self.config.num_layers), [segment.key_values for segment in past])
            )
            between += [] if left is None else list(left[:-1])
        else:
            own = []
            for index, layer in enumerate(self.layers):
                is_last = index == self.config.num_layers - 1
                layer_past = [segment.key_values[index] for segment in past]
                x, layer_own = apply(layer, x, index, layer_past, wanted if is_last and leaves_out else None)
                own.append(layer_own)
                between += [take_columns(x, observed)] if watch and not is_last else []
            own = tuple(own)
        if wanted is not None and not leaves_out:
            x = take_columns(x, wanted)
        hidden = constrain(self.norm(x), "rows", "columns", "features")
        if not watch:
            return hidden, own, jnp.zeros((self.config.num_layers + 1, *observed.shape, x.shape[-1]), x.dtype)
        last = take_columns(hidden, observed) if number_wanted is None else hidden[:, number_wanted:]
        return hidden[:, :number_wanted], own, jnp.stack([*between, last])


def _of_each_row(valid: Bool[Array, "_ C"], rows: int) -> Bool[Array, "B C"]:
    """The columns that each of ``rows`` rows may see of a segment, which several of them may share."""
    return valid if len(valid) == rows else jnp.repeat(valid, rows // len(valid), axis=0)


def _members_of(segment: Segment) -> Int[Array, "B C"]:
    assert segment.members is not None
    return segment.members
