"""An MLP of experts, of which each column uses a few that a router chooses (`coconut.models.experts_config`).

Columns are sorted by expert and multiplied in groups (`pallas_kernels.grouped_product`), however large each group is.
No column is dropped, and none waits for another: what a column gets is what it gets alone, which the gradient through
thoughts relies on (`coconut.latent.thoughts`). A CPU has no such product (jax 0.10): it would multiply every column by
every expert, once for each that the column chose. A single one does so once (`apply_all_experts`), so that time and
memory are those of a dense MLP of all experts.

On a mesh each device computes, for its own rows, those of the experts chosen that it holds, and the parts are summed:
no row travels.

The correction bias of a sigmoid router has no gradient. A train step moves it by how many columns chose each expert
(`coconut.training.balancing`), which reaches the step as the cotangent of a `Tally`: so a column counts once however
layers are scanned and activations made again, over microbatches and devices. Where a loss runs the model over a column
more often, in sweeps (PCCoT, KaVa) or in a second view (CODI, SIM-CoT), it counts as often.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.dropout import Dropout, RowMasks
from coconut.models.experts_config import ExpertsConfig
from coconut.models.layers import FeedForward, activate, rows_of
from coconut.sharding import constrain, fitting_partition
from pallas_kernels.grouped_product import grouped_product
from pallas_kernels.platform import platform

_CORRECTION = "correction"


def is_correction(name: str) -> bool:
    """Whether a parameter of this name is a router's correction bias, which no gradient trains."""
    return name.rpartition(".")[2] == _CORRECTION


def kernel_beside(correction: str) -> str:
    """The name of the matrix of the router whose correction bias has this name."""
    return f"{correction.rpartition('.')[0]}.kernel"


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Tally:
    """A correction bias whose router counts; layers that are scanned have a leading axis.

    Attributes:
      correction: the bias.
      loads: zeros, whose cotangent is how many columns chose each expert. A column counts where the derivative of what
        is differentiated by what its experts made of it is not 0: not where it is padding, and not in a last layer
        whose output nobody reads.
    """

    correction: Float[Array, "*L E"]
    loads: Float[Array, "*L E"]


class Router(nnx.Module):
    """Scores experts, and chooses some for each column. It computes and keeps its numbers in at least float32.

    Attributes:
      correction: what a sigmoid router adds to the scores where it chooses, and not in the weights
        (DeepSeek-V3, section 2.1.2). It has no gradient; a `Tally` in its place counts what is chosen.
    """

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, rngs: nnx.Rngs):
        self.experts = experts
        dtype = jnp.promote_types(config.param_dtype, jnp.float32)
        kernel = nnx.initializers.normal(config.kernel_stddev)
        self.kernel = nnx.Param(
            kernel(rngs.params(), (config.embed_dim, experts.count), dtype), axes=("embed", "router")
        )
        if experts.router == "sigmoid":
            self.correction = nnx.Param(jnp.zeros(experts.count, dtype), axes=("router",))

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Int[Array, "B T _"], Float[Array, "B T _"]]:
        """The experts that each column chooses, in no order, and their weights in at least float32."""
        experts, kernel = self.experts, self.kernel[...]
        logits = jnp.matmul(x.astype(kernel.dtype), kernel, precision=jax.lax.Precision.HIGHEST)
        logits = constrain(logits, rows_of(x), "columns", "router")
        if experts.router == "sigmoid":
            correction = self.correction.get_value()
            scores = jax.nn.sigmoid(logits)
            choice = scores + (correction.correction if isinstance(correction, Tally) else correction)
            excluded = -jnp.inf
        else:
            scores = choice = jax.nn.softmax(logits, axis=-1)
            excluded = 0.0
        if experts.groups > 1:
            choice = jnp.where(self._in_groups_chosen(choice), choice, excluded)
        chosen = jax.lax.top_k(jax.lax.stop_gradient(choice), experts.chosen)[1]
        weights = jnp.take_along_axis(scores if experts.router == "sigmoid" else choice, chosen, axis=-1)
        if experts.normalized:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return chosen, weights * experts.scaling

    def counted(self, made: Float[Array, "B T D"], chosen: Int[Array, "B T _"]) -> Float[Array, "B T D"]:
        """What experts made of the columns, which are counted on the way back where a `Tally` asks for it."""
        tally = self.correction.get_value() if self.experts.router == "sigmoid" else None
        return _counted(made, tally.loads, chosen) if isinstance(tally, Tally) else made

    def _in_groups_chosen(self, choice: Float[Array, "B T E"]) -> Array:
        """Which experts lie in the groups that a column chooses from."""
        experts = self.experts
        grouped = jax.lax.stop_gradient(choice).reshape(*choice.shape[:2], experts.groups, -1)
        best = grouped.max(-1) if experts.router == "softmax" else jax.lax.top_k(grouped, 2)[0].sum(-1)
        groups = jax.lax.top_k(best, experts.groups_chosen)[1]
        inside = (groups[..., None] == jnp.arange(experts.groups)).any(-2)
        return jnp.repeat(inside, experts.count // experts.groups, axis=-1)


@jax.custom_vjp
def _counted(made: Array, loads: Array, chosen: Array) -> Array:
    return made


def _counted_forward(made: Array, loads: Array, chosen: Array) -> tuple[Array, tuple[Array, Array]]:
    return made, (jnp.zeros_like(loads), chosen)


def _counted_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    zeros, chosen = residuals
    counts = (cotangent != 0).any(-1)[..., None, None]
    chose = (chosen[..., None] == jnp.arange(len(zeros))) & counts
    return cotangent, zeros + chose.sum(tuple(range(chose.ndim - 1)), dtype=zeros.dtype), None


_counted.defvjp(_counted_forward, _counted_backward)


class ExpertMatrix(nnx.Module):
    """A matrix of every expert: ``[E, D, F]``."""

    def __init__(self, config: DecoderConfig, shape: tuple[int, int, int], axes: tuple[str, str, str], **options: Any):
        scale, rngs = options["scale"], options["rngs"]
        draw = nnx.initializers.normal(config.kernel_stddev * scale)
        self.kernel = nnx.Param(draw(rngs.params(), shape, jnp.dtype(config.param_dtype)), axes=axes)


class Experts(nnx.Module):
    """Routed experts, and the shared ones as one MLP beside them."""

    def __init__(self, config: DecoderConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs):
        assert config.experts is not None
        self.config, self.execution = config.experts, execution
        E, D, F = config.experts.count, config.embed_dim, config.experts.width
        make = functools.partial(ExpertMatrix, config, rngs=rngs)
        self.router = Router(config, config.experts, rngs)
        self.up = make((E, D, F), ("expert", "embed", "expert_mlp"), scale=1.0)
        self.gate = make((E, D, F), ("expert", "embed", "expert_mlp"), scale=1.0)
        self.down = make((E, F, D), ("expert", "expert_mlp", "embed"), scale=(2 * config.num_layers) ** -0.5)
        if config.experts.shared:
            self.shared = FeedForward(config, execution, width=config.experts.shared * F, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], dropout: Dropout | RowMasks | None = None) -> Float[Array, "B T D"]:
        """What the experts of each column make of it; ``dropout`` is that of the shared ones' adapters."""
        chosen, weights = self.router(x)
        made = self.router.counted(self._routed(x, chosen, weights), chosen)
        return made + self.shared(x, dropout) if self.config.shared else made

    def _routed(
        self, x: Float[Array, "B T D"], chosen: Int[Array, "B T _"], weights: Float[Array, "B T _"]
    ) -> Float[Array, "B T D"]:
        matrices = [matrix.kernel[...].astype(x.dtype) for matrix in (self.gate, self.up, self.down)]
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            apply = apply_all_experts if platform() == "cpu" else apply_experts
            return apply(x, chosen, weights, *matrices)
        # As in the other matrices: a pass of one column leaves them where they are, and splits its features.
        one = x.shape[1] == 1
        of_x = fitting_partition((rows_of(x), "columns", "split_features" if one else "features"), x.shape)
        embed = "embed" if one else "features"
        of_matrices = [
            fitting_partition(axes, matrix.shape)
            for axes, matrix in zip(
                [("expert", embed, "expert_mlp")] * 2 + [("expert", "expert_mlp", embed)], matrices, strict=True
            )
        ]
        of_choice = PartitionSpec(*of_x[:2])
        local = functools.partial(apply_experts, features=of_x[2], experts=of_matrices[0][0])
        return jax.shard_map(local, in_specs=(of_x, of_choice, of_choice, *of_matrices), out_specs=of_x)(
            x, chosen, weights, *matrices
        )


def apply_all_experts(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "B T D"]:
    """`apply_experts` by a dense MLP of all experts, whose hidden units count 0 where their expert was not chosen."""
    share = (weights[..., None] * (chosen[..., None] == jnp.arange(len(gate)))).sum(-2)
    hidden, gates = (jnp.einsum("btd,edf->btef", x, matrix) for matrix in (up, gate))
    # What an expert that was not chosen overflows to must reach neither the sum nor a gradient.
    used = (chosen[..., None] == jnp.arange(len(gate))).any(-2)[..., None]
    hidden, gates = jnp.where(used, hidden, 0), jnp.where(used, gates, 0)
    hidden = (jax.nn.silu(gates) * hidden * share[..., None]).astype(x.dtype)
    return jnp.einsum("btef,efd->btd", hidden, down)


def apply_experts(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    features: Any = None,
    experts: Any = None,
) -> Float[Array, "B T D"]:
    """The weighted sum of what the experts chosen make of each column: ``down (silu(gate x) * up x)``.

    Args:
      x: the columns.
      chosen: the experts of each of them.
      weights: their weights.
      gate: of each expert.
      up: of each expert.
      down: of each expert.
      features: the mesh axis that splits ``D``, inside of `jax.shard_map`; None for none.
      experts: the mesh axis that splits ``E``; None for none.
    """
    B, T, D = x.shape
    K, E = chosen.shape[-1], len(gate)
    own = chosen.reshape(-1)
    if experts is not None:
        own = own - jax.lax.axis_index(experts) * E
        own = jnp.where((own >= 0) & (own < E), own, E)  # Those of other devices come last.
    order = _order(own)
    sizes = (own[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
    here = (own[order] < E)[:, None]
    # What lies behind the last group is not said to be anything.
    known: Callable[[Array], Array] = (lambda y: y) if experts is None else (lambda y: jnp.where(here, y, 0))
    summed: Callable[[Array], Array] = (lambda y: y) if features is None else (lambda y: jax.lax.psum(y, features))
    rows = known(x.reshape(B * T, D)[order // K])
    hidden, gates = (known(summed(grouped_product(rows, matrix, sizes))) for matrix in (up, gate))
    made = known(grouped_product(activate("swiglu", hidden, gates), down, sizes))
    made = made.astype(weights.dtype)[_order(order)].reshape(B, T, K, D)
    out = (made * weights[..., None]).sum(2).astype(x.dtype)
    return out if experts is None else jax.lax.psum(out, experts)


def _order(keys: Int[Array, " n"]) -> Int[Array, " n"]:
    """The order that sorts ``keys``; equal ones stay as they lie."""
    # `jnp.argsort` forgets inside of `jax.shard_map` that its result differs from device to device where the keys do
    # (jax 0.10), and gradients come out wrong. These numbers differ wherever the keys do.
    numbers = jnp.arange(len(keys)) + 0 * keys
    return jax.lax.sort((keys, numbers), num_keys=1)[1]
