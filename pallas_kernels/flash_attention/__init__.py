"""Attention of many queries to many keys, forward and backward: see `flash_attention`."""

from pallas_kernels.flash_attention.api import choose, flash_attention
from pallas_kernels.flash_attention.visibility import NO_KEYS

__all__ = ["NO_KEYS", "choose", "flash_attention"]
