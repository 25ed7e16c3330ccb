"""Cross-entropy over a large vocabulary that never holds its logits."""

from pallas_kernels.linear_cross_entropy.api import LinearCrossEntropy, linear_cross_entropy

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]
