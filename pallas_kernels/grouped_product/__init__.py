"""Rows that lie in groups, each multiplied by the matrix of its group; no group has a limit."""

from pallas_kernels.grouped_product.api import grouped_product

__all__ = ["grouped_product"]
