"""Attention and loss kernels for TPU and GPU; usable without `coconut`. Empty until the first kernel is measured."""
