"""Which columns the columns of a pass see, in each layer: of the segments before it, and of their own."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from coconut.models.config import DecoderConfig
from coconut.models.segment_attention import Range, valid_range


class Visibility:
    """What a pass sees, said once for all layers that see the same.

    A column sees the valid columns of all segments before, and of its own pass those that do not follow it. In a local
    layer (`coconut.models.local_config`) these are the last ``window`` valid columns of its row, itself among them,
    whichever segments they lie in. Where a row holds several examples, all this is said of the columns of its own.
    """

    def __init__(
        self,
        config: DecoderConfig,
        before: Sequence[Bool[Array, "B _"]],
        own: Bool[Array, "B T"] | None,
        *,
        dense: bool,
        members: Sequence[Int[Array, "B _"]] | None = None,
    ):
        """Looks at the columns.

        Args:
          config: the decoder's.
          before: which columns of each segment before are valid.
          own: which of the pass; None for a pass of one column, written into the last segment, whose last valid one it
            is.
          dense: whether to make masks for `attend`, or ranges for `attend_by_kernels`.
          members: which of its row's examples each column belongs to, segment by segment, the pass's own last; None
            where a row is one example. For masks, and for a pass that leaves a segment of its own.
        """
        self._members = members
        self._config, self._before, self._own, self._dense = config, before, own, dense
        kinds = sorted({config.is_local(layer) for layer in range(config.num_layers)})
        self._of_all = {local: self._seen(local, None) for local in kinds}

    def of_layer(self, index: Int[Array, ""] | int, wanted: Int[Array, "B W"] | None = None) -> list[Any]:
        """Masks or ranges of each segment, and last of the pass's own columns.

        Args:
          index: number of the layer; it may be traced where ``wanted`` is None.
          wanted: the columns that ask; None for all.
        """
        if wanted is not None:
            return self._seen(self._config.is_local(index), wanted)
        if self._config.layers_look_alike or isinstance(index, int):
            return self._of_all[self._config.is_local(index)]
        local = self._config.local_layers[index]
        return [
            jnp.where(local, near, all_) for near, all_ in zip(self._of_all[True], self._of_all[False], strict=True)
        ]

    def _seen(self, local: bool, wanted: Int[Array, "B W"] | None) -> list[Any]:
        window = self._config.local_attention.window if local and self._config.local_attention else None
        return self._masks(window, wanted) if self._dense else self._ranges(window, wanted)

    def _masks(self, window: int | None, wanted: Int[Array, "B W"] | None) -> list[Bool[Array, "B _ _"]]:
        masks = [valid[:, None, :] for valid in self._before]
        if self._own is not None:
            T = self._own.shape[1]
            queries = jnp.arange(T)[None] if wanted is None else wanted
            masks.append((jnp.arange(T) <= queries[..., None]) & self._own[:, None, :])
        if self._members is not None:
            own = self._members[-1] if wanted is None else jnp.take_along_axis(self._members[-1], wanted, axis=1)
            masks = [
                mask & (own[:, :, None] == other[:, None, :]) for mask, other in zip(masks, self._members, strict=True)
            ]
        if window is None:
            return masks
        segments = self._before if self._own is None else [*self._before, self._own]
        numbers = _numbered(segments) if self._members is None else _numbered_by_example(segments, self._members)
        asking = numbers[-1].max(1, keepdims=True) if self._own is None else numbers[-1]
        if wanted is not None:
            asking = jnp.take_along_axis(asking, wanted, axis=1)
        return [
            mask & (asking[:, :, None] - number[:, None, :] < window)
            for mask, number in zip(masks, numbers, strict=True)
        ]

    def _ranges(self, window: int | None, wanted: Int[Array, "B W"] | None) -> list[Range]:
        ranges = [Range(*valid_range(valid)) for valid in self._before]
        asking = jnp.int32(0) if wanted is None else wanted[:, 0]
        if self._own is not None:
            start, end = valid_range(self._own)
            ranges.append(Range(start, end if wanted is None else jnp.minimum(end, asking + 1)))
        if window is None:
            return ranges
        # The number among the row's columns of the first that asks; valid columns follow each other in a segment.
        counts = [end - start for start, end in map(valid_range, self._before)]
        seen = [sum(counts[:index], jnp.int32(0)) for index in range(len(counts) + 1)]
        asking = seen[-1] - 1 if self._own is None else seen[-1] + asking - ranges[-1].start
        return [
            range_._replace(asking=range_.start + asking - first) for range_, first in zip(ranges, seen, strict=False)
        ]


def _numbered(segments: Sequence[Bool[Array, "B _"]]) -> list[Int[Array, "B _"]]:
    """The number of each column among the valid ones of its row; of one that is not valid, that of the last before."""
    numbers, seen = [], jnp.int32(0)
    for valid in segments:
        counted = jnp.cumsum(valid, 1, dtype=jnp.int32)
        numbers.append(seen + counted - 1)
        seen = seen + valid.sum(1, keepdims=True, dtype=jnp.int32)
    return numbers


def _numbered_by_example(
    segments: Sequence[Bool[Array, "B _"]], members: Sequence[Int[Array, "B _"]]
) -> list[Int[Array, "B _"]]:
    """`_numbered` among the valid columns of the column's own example."""
    valid, of = jnp.concatenate(segments, 1), jnp.concatenate(members, 1)
    columns = jnp.arange(valid.shape[1])
    before = (of[:, :, None] == of[:, None, :]) & (columns <= columns[:, None]) & valid[:, None, :]
    numbers = before.sum(-1, dtype=jnp.int32) - 1
    ends = np.cumsum([segment.shape[1] for segment in segments])
    return jnp.split(numbers, ends[:-1], axis=1)
