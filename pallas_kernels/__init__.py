"""Attention and loss kernels for TPU and GPU; usable without `coconut`."""
