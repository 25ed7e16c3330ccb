"""Cross-entropy of a linear output layer, from hidden states to losses, without the logits between them."""

import math
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import resolve
from pallas_kernels.linear_cross_entropy import gpu, reference, tpu, xla
from pallas_kernels.linear_cross_entropy.statistics import NO_LABEL, Statistics
from pallas_kernels.logits import LogitRule
from pallas_kernels.measured import gpu_kernel_is_faster
from pallas_kernels.platform import vary_over, varying_axes

DTYPES = (jnp.float32, jnp.bfloat16)
KERNELS: dict[str, ModuleType] = {"tpu": tpu, "gpu": gpu}


class LinearCrossEntropy(NamedTuple):
    """What is known of each row.

    Attributes:
      losses: in nats, float32; 0 where the label is ignored, NaN where it is no id of the vocabulary.
      log_normalizers: log of the sum of the exponentials of all logits, float32, of ignored rows too.
      predictions: the id of the largest logit, the first of equal ones, int32; not differentiated.
    """

    losses: Float[Array, " N"]
    log_normalizers: Float[Array, " N"]
    predictions: Int[Array, " N"]


def linear_cross_entropy(
    hidden: Array,
    vocabulary: Array,
    labels: Array,
    *,
    ignored_label: int = -100,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    axis_name: str | None = None,
    implementation: str = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> LinearCrossEntropy:
    """Cross-entropy of ``labels`` under the softmax of ``hidden @ vocabulary.T``.

    No implementation but ``reference`` ever holds ``[N, V]`` logits; the backward pass forms them again, a block at a
    time. Reverse-mode differentiation of ``losses`` and ``log_normalizers`` by ``hidden`` and ``vocabulary``. Sums are
    float32 whatever the inputs are.

    Args:
      hidden: ``[N, D]``, float32 or bfloat16.
      vocabulary: ``[V, D]``, of the same dtype; with ``axis_name``, this device's shard of it.
      labels: ``[N]``, integers.
      ignored_label: the label of rows that have no loss.
      z_loss: a row's loss is increased by this times the square of its log-normalizer (Chowdhery et al. 2022, section
        5).
      soft_cap: logits ``x`` become ``soft_cap * tanh(x / soft_cap)`` (Gemma Team 2024, section 2).
      logit_scale: logits are multiplied by this, before they are capped.
      axis_name: inside `jax.shard_map`, the mesh axis that the vocabulary is split over: shard ``i`` of ``n`` has the
        ids from ``i * V / n`` on. Hidden states and labels are the same on all shards, and so is what is returned.
      implementation: ``auto`` chooses by platform and shape, see `choose`; the others are taken at their word.
      interpret: runs the kernel of ``tpu`` or ``gpu`` step by step on any platform, for tests; ``tpu`` also takes
        `pltpu.InterpretParams`.

    Raises:
      ValueError: shapes or dtypes do not fit, a number is out of its range, ``axis_name`` is no axis, or the
        implementation asked for does not apply; the message says why.
    """
    _validate(hidden, vocabulary, labels, z_loss=z_loss, soft_cap=soft_cap, logit_scale=logit_scale)
    implementation = resolve(
        implementation,
        interpret,
        kernels=KERNELS,
        operand=hidden,
        choose=lambda device: choose(device, hidden, vocabulary),
        about=f"linear_cross_entropy, hidden {hidden.shape} by {vocabulary.shape} {hidden.dtype}",
    )
    columns, first = vocabulary.shape[0], 0
    if axis_name is not None:
        try:
            first = jax.lax.axis_index(axis_name) * columns
            columns *= jax.lax.axis_size(axis_name)
        except NameError as error:
            raise ValueError(f"axis_name={axis_name!r} is no axis of a shard_map around this call") from error

    labels = labels.astype(jnp.int32)
    ignored = labels == ignored_label
    known = (labels >= 0) & (labels < columns) & ~ignored
    here = known & (labels >= first) & (labels < first + vocabulary.shape[0])
    found = _statistics(
        hidden,
        vocabulary,
        jnp.where(here, labels - first, NO_LABEL),
        LogitRule(scale=logit_scale, soft_cap=soft_cap),
        implementation,
        interpret,
    )
    if axis_name is not None:
        found = _combine(found, first, axis_name)

    losses = found.log_normalizers - found.picked
    if z_loss:
        losses += z_loss * jnp.square(found.log_normalizers)
    losses = jnp.where(known, losses, jnp.where(ignored, 0.0, jnp.nan))
    return LinearCrossEntropy(losses, found.log_normalizers, found.predictions)


def choose(platform: str, hidden: Array, vocabulary: Array) -> str:
    """What ``auto`` means for these hidden states and this vocabulary.

    ``xla`` on a CPU, as measured (README). On a GPU the kernel where it was measured to be faster
    (`pallas_kernels.measured`). On a TPU the kernels, by arithmetic and not by measurement: they keep each block in
    VMEM, where ``xla`` moves it through HBM. But ``xla`` where one block of its takes all logits, or where the kernels
    refuse the shape.
    """
    rows, columns = hidden.shape[0], vocabulary.shape[0]
    if xla.block_columns(rows, columns) == columns:
        return "xla"
    if platform == "gpu" and gpu.refusal(hidden) is None:
        return "gpu" if gpu_kernel_is_faster("linear_cross_entropy", hidden.dtype, rows) else "xla"
    return "tpu" if platform == "tpu" and tpu.refusal(hidden) is None else "xla"


def _validate(
    hidden: Array, vocabulary: Array, labels: Array, *, z_loss: float, soft_cap: float | None, logit_scale: float
) -> None:
    shapes = f"hidden {hidden.shape} {hidden.dtype}, vocabulary {vocabulary.shape} {vocabulary.dtype}, "
    shapes += f"labels {labels.shape} {labels.dtype}"
    if (hidden.ndim, vocabulary.ndim, labels.ndim) != (2, 2, 1):
        raise ValueError(f"hidden is [N, D], vocabulary [V, D], labels [N], not {shapes}")
    if hidden.shape[1] != vocabulary.shape[1] or hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"sizes differ: hidden is [N, D], vocabulary [V, D], labels [N], not {shapes}")
    if 0 in hidden.shape or 0 in vocabulary.shape:
        raise ValueError(f"nothing to compute with: {shapes}")
    if hidden.dtype != vocabulary.dtype or hidden.dtype not in DTYPES:
        raise ValueError(f"hidden and vocabulary are both float32 or both bfloat16, not {shapes}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are integers, not {shapes}")
    if not (math.isfinite(z_loss) and z_loss >= 0):
        raise ValueError(f"z_loss={z_loss}: it is at least 0 and finite")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap={soft_cap}: it is above 0 and finite, or None")
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ValueError(f"logit_scale={logit_scale}: it is above 0 and finite")


def _statistics(
    hidden: Array,
    vocabulary: Array,
    labels: Array,
    rule: LogitRule,
    implementation: str,
    interpret: bool | pltpu.InterpretParams,
) -> Statistics:
    """The statistics of this shard, by the implementation chosen, differentiable."""
    if implementation == "reference":
        return reference.statistics(hidden, vocabulary, labels, rule)
    module, options = KERNELS.get(implementation, xla), {}
    if implementation in KERNELS:
        options = {"interpret": interpret}

    @jax.custom_vjp
    def differentiable(hidden: Array, vocabulary: Array, labels: Array) -> Statistics:
        return module.statistics(hidden, vocabulary, labels, rule, **options)

    def forward(hidden: Array, vocabulary: Array, labels: Array) -> tuple[Statistics, tuple[Array, ...]]:
        found = differentiable(hidden, vocabulary, labels)
        return found, (hidden, vocabulary, labels, found.log_normalizers)

    def backward(residuals: tuple[Array, ...], cotangents: Statistics) -> tuple[Array, Array, None]:
        of = (cotangents.log_normalizers, cotangents.picked)
        return *module.gradients(*residuals, *of, rule, **options), None

    differentiable.defvjp(forward, backward)
    # Where shard_map checks what differs between devices, a gradient must differ where its input does: so all inputs
    # are made to differ alike, and the gradients are summed where they were not.
    axes = varying_axes(hidden, vocabulary, labels)
    return differentiable(*(vary_over(x, axes) for x in (hidden, vocabulary, labels)))


def _combine(shard: Statistics, first: Array | int, axis_name: str) -> Statistics:
    """The statistics of the whole vocabulary from those of its shards; JAX differentiates the collectives."""
    peak = jax.lax.pmax(jax.lax.stop_gradient(shard.log_normalizers), axis_name)
    total = jax.lax.psum(jnp.exp(shard.log_normalizers - peak), axis_name)
    shard_best = jax.lax.stop_gradient(shard.best)
    best = jax.lax.pmax(shard_best, axis_name)
    candidates = jnp.where(shard_best == best, shard.predictions + first, jnp.iinfo(jnp.int32).max)
    return Statistics(
        log_normalizers=peak + jnp.log(total),
        picked=jax.lax.psum(shard.picked, axis_name),
        best=best,
        predictions=jax.lax.pmin(candidates, axis_name),
    )
