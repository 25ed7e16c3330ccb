"""Attention over several segments by the kernels: one call for each segment, joined by their log-normalizers.

The kernels know of each row which columns it may see as one range. So the valid columns of a segment must follow each
other in every row, as they do in what `coconut.batching` and `coconut.latent` write.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from coconut.models.attention import fold_rows, unfold_rows
from coconut.models.cache import Filling, KeyValue, look_back
from coconut.models.config import KERNEL_DTYPES, DecoderConfig, ExecutionConfig, split_implementation
from coconut.sharding import fitting_partition
from pallas_kernels.decode_attention import decode_attention, merge_segments
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.measured import gpu_kernel_is_faster
from pallas_kernels.platform import log_once, platform

FEW_QUERIES = 64
"""Most queries that share a head of keys for which `decode_attention` is called: what its kernels take."""


class Range(NamedTuple):
    """The columns of a segment that each row may see, from ``start`` to before ``end``.

    Attributes:
      start: see above.
      end: see above.
      asking: where the first column that asks would stand, counted as these columns are; for a window.
    """

    start: Int[Array, " B"]
    end: Int[Array, " B"]
    asking: Int[Array, " B"] | None = None


def choose_attention(config: DecoderConfig, execution: ExecutionConfig) -> str:
    """What ``ExecutionConfig.attention`` means here: ``auto`` is the kernels on a TPU and on some GPUs, else ``dense``.

    On a CPU blocks save little at the lengths of this field's questions. On a GPU the kernels are taken where they were
    measured to make a training step faster (`pallas_kernels.measured`). What the kernels do not take, dropout, latent
    attention, other dtypes than `KERNEL_DTYPES`, and local beside global layers that are scanned, is ``dense``
    everywhere.
    """
    if execution.attention != "auto":
        return execution.attention
    device = platform()
    faster = device == "tpu" or (
        device == "gpu" and gpu_kernel_is_faster("flash_attention", execution.dtype, config.max_positions)
    )
    applies = not config.dropout and config.mixer == "attention" and execution.dtype in KERNEL_DTYPES
    applies = applies and (config.layers_look_alike or not execution.scan_layers)
    chosen = "auto" if faster and applies else "dense"
    log_once(f"attention on {device}: {'the kernels, each by its own table' if chosen == 'auto' else chosen}")
    return chosen


def valid_range(valid: Bool[Array, "B C"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Start and end of the valid columns of each row; an empty range where there are none."""
    columns = jnp.arange(valid.shape[1])
    end = jnp.max(jnp.where(valid, columns + 1, 0), 1)
    return jnp.minimum(jnp.min(jnp.where(valid, columns, valid.shape[1]), 1), end), end


def attend_by_kernels(
    query: Float[Array, "B N T H"],
    sources: Sequence[KeyValue | Filling],
    ranges: Sequence[Range],
    implementation: str,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "B N T H"], KeyValue | Filling]:
    """Softmax attention over all sources together, the last of which is this pass's own and is seen causally.

    Args:
      query: queries, not yet scaled.
      sources: keys and values of ``C`` columns each, ``M`` heads.
      ranges: for each source the columns a row may see.
      implementation: of `flash_attention`, or for passes of few columns of `decode_attention`; see
        `split_implementation`.
      scale: factor on the scores; None for ``H ** -0.5``.
      window: how many columns of its row a query sees, its own among them; the ranges then have ``asking``. None for
        all before.

    Returns:
      Weighted values, in the dtype of ``query``, 0 where a query may see nothing; and the last source, from there on
      (`look_back`).

    Raises:
      ValueError: the implementation does not apply here.
    """
    outputs, normalizers, source = [], [], sources[-1]
    for index, (source, visible) in enumerate(zip(sources, ranges, strict=True)):
        causal = index == len(sources) - 1
        attend = functools.partial(_attend_to, causal=causal, implementation=implementation, scale=scale, window=window)
        (out, normalizer), source = look_back(attend, (query, visible), source)
        outputs.append(out)
        normalizers.append(normalizer)
    return merge_segments(outputs, normalizers)[0] if len(outputs) > 1 else outputs[0], source


def _attend_to(
    queries: tuple[Float[Array, "B N T H"], Range],
    source: KeyValue,
    *,
    causal: bool,
    implementation: str,
    scale: float | None,
    window: int | None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """One segment. On a mesh each device attends with its own rows, heads and columns, and nothing is exchanged."""
    query, visible = queries
    if window is not None and len(source.keys) != len(query):
        # Rows that share keys see each its own part of them.
        source = jax.tree.map(lambda x: jnp.repeat(x, len(query) // len(x), axis=0), source)
    name, interpret = split_implementation(implementation)
    rows, shared = len(query), len(source.keys)
    # A range is a row's own, the keys may be those of several rows: whose range is the same.
    query, bounds = fold_rows(query, shared), [x[:: rows // shared] for x in visible if x is not None]
    # Queries of several rows side by side are no columns that a mesh may split.
    columns = "columns" if rows == shared else "past"
    of_queries = fitting_partition(("rows", "heads", columns, "head"), query.shape)
    keys = fitting_partition(("rows", "kv_heads", "past", "head"), source.keys.shape)
    by_row = PartitionSpec(of_queries[0])
    split_columns = of_queries[2] if len(of_queries) > 2 else None

    def local(
        query: Array, keys: Array, values: Array, start: Array, end: Array, *asking: Array
    ) -> tuple[Array, Array]:
        columns = query.shape[2]
        # Of several queries with a window each sees other columns.
        alike = not causal and window is None
        few = columns == 1 or (alike and columns * query.shape[1] // keys.shape[1] <= FEW_QUERIES)
        if few and split_columns is None:
            if window is not None:
                start = jnp.clip(asking[0] - window + 1, start, end)
            return decode_attention(
                *(query, keys, values, start, end),
                scale=scale,
                return_log_normalizers=True,
                implementation=name,
                interpret=interpret,
            )
        offset = 0 if window is None else asking[0]
        if (causal or window is not None) and split_columns is not None:
            offset = offset + jax.lax.axis_index(split_columns) * columns
        out, normalizer = flash_attention(
            *(query, keys, values),
            causal=causal,
            query_offset=offset,
            start=start,
            length=end,
            window=window,
            scale=scale,
            return_log_normalizers=True,
            implementation=name,
            interpret=interpret,
        )
        return out, normalizer

    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        local = jax.shard_map(
            local,
            in_specs=(of_queries, keys, keys, *[by_row] * len(bounds)),
            out_specs=(of_queries, PartitionSpec(*of_queries[:3])),
            # Interpreted kernels cannot say over which axes they differ.
            check_vma=not interpret,
        )
    out, normalizers = local(query, source.keys, source.values, *bounds)
    return unfold_rows(out, rows), unfold_rows(normalizers[..., None], rows)[..., 0]
