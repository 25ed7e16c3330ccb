"""Attention of one or a few queries a row to a cache."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.segments import NO_COLUMN, merge_segments

__all__ = ["NO_COLUMN", "decode_attention", "merge_segments"]
