"""Adapters: a frozen decoder, and few trained numbers beside its matrices.

Those of low rank (LoRA, Hu et al. 2022) are a small matrix product beside each of its own; vectors that scale singular
values are `coconut.models.singular_values`.

With an adapter of low rank a matrix ``W`` of ``[D, F]`` computes ``x W + b + s (drop(x) A) B``, where ``A`` is ``[D,
rank]``, ``B`` is ``[rank, F]`` and ``s = alpha / rank``. ``B`` starts at zero, so that training starts from the decoder
as it was.

``A`` and ``B`` are parameters of the decoder's own modules, ``layers.0.attention.query.lora_a``, and lie on a mesh as
their matrix does. Gradients reach them like any other parameter; which parameters are trained is not said here.
"""

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from coconut.errors import CoconutError, check_fields
from coconut.models.decoder import Decoder
from coconut.models.layers import Linear
from coconut.models.parameters import decoder_of, decoder_parameters
from coconut.models.singular_values import SingularValueConfig, decomposed, fresh_vector, scales, weights_of

_FROZEN = ("singular_u", "singular_s", "singular_v")
_LEAVES = ("lora_a", "lora_b", "trained_rows", "singular_z", *_FROZEN)


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which matrices of a decoder have an adapter of low rank, and of which kind.

    Attributes:
      rank: columns of ``A``.
      alpha: the adapter counts ``alpha / rank``.
      dropout: rate at which units of what an adapter is applied to are dropped, where a dropout key is given.
      targets: patterns of names of matrices, such as ``layers.*.attention.query``; all matrices of the layers by
        default. Embedding and head are none of them.
      trained_rows: tokens whose rows of the embedding are trained while the others are frozen, and of the head where it
        is the embedding: ids, or in the config of a run names (`coconut.training.setup.token_ids`).
      rank_stabilized: the adapter counts ``alpha / rank ** 0.5`` instead (Kalajdzievski 2023).

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("layers.*",)
    trained_rows: tuple[str | int, ...] = ()
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"AdapterConfig.{field} = {getattr(self, field)!r}: {why}")

        if self.rank < 1:
            reject("rank", "must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            reject("alpha", "must be positive")
        if not 0.0 <= self.dropout < 1.0:
            reject("dropout", "must be in [0, 1)")
        if not self.targets:
            reject("targets", "must name a matrix")
        if len(set(self.trained_rows)) < len(self.trained_rows):
            reject("trained_rows", "a token stands there twice")

    @property
    def scaling(self) -> float:
        """Factor on ``A B``."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to the adapters, or is a row that is trained beside them."""
    return name.rpartition(".")[2] in _LEAVES


def is_trained_adapter(name: str) -> bool:
    """Whether it is one of those that are trained: the decompositions of matrices are not."""
    return is_adapter(name) and name.rpartition(".")[2] not in _FROZEN


def add_adapters(decoder: Decoder, config: AdapterConfig, key: Key[Array, ""]) -> Decoder:
    """A decoder with fresh adapters, which computes what it computed before. Traceable.

    ``A`` is uniform in ``+- D ** -0.5``, as in PEFT (He et al. 2015 with a slope of ``5 ** 0.5``). Adapters and rows
    are kept in float32 at least, whatever the decoder's parameters are.

    Args:
      decoder: the decoder, without adapters. It stays as it is; its parameters are shared.
      config: which matrices and rows.
      key: of ``A``. Stacked or not, the layers get the same numbers.

    Raises:
      CoconutError: a target fits no matrix, or of stacked layers some alone; an adapter would have to drop what
        it is not applied to; a row is no token's.
    """
    decoder = jax.tree.map(lambda x: x, decoder)  # new modules around the same arrays
    for name, linear in _targeted(decoder, config).items():
        if config.dropout and not linear.of_rows:
            raise CoconutError(
                f"AdapterConfig.dropout = {config.dropout}: {name} is taken in by queries, where an adapter drops "
                f"nothing; choose 0, or AdapterConfig.targets that do not name it"
            )
        kernel, axes = linear.kernel[...], linear.kernel.get_metadata("axes")
        *stack, D, F = kernel.shape
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        index, path = _place(name)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        draw = lambda index, own=own, D=D, dtype=dtype: jax.random.uniform(
            jax.random.fold_in(own, index), (D, config.rank), dtype, -(D**-0.5), D**-0.5
        )
        a = draw(index) if index is not None else jax.vmap(draw)(jnp.arange(stack[0]))
        linear.lora_a = nnx.Param(a, axes=(*axes[:-1], "rank"))
        linear.lora_b = nnx.Param(jnp.zeros((*stack, config.rank, F), dtype), axes=(*axes[:-2], "rank", axes[-1]))
        linear.lora_scaling, linear.lora_dropout = float(config.scaling), float(config.dropout)
    decoder.lora_dropout = float(config.dropout)
    _train_rows(decoder, config)
    return decoder


def add_singular_values(decoder: Decoder, config: SingularValueConfig, key: Key[Array, ""]) -> Decoder:
    """A decoder whose matrices have fresh vectors of scales beside them. Traceable.

    It computes what it computed before: to the bit, or with masks nearly. Vectors, singular values and rows are kept in
    float32 at least, whatever the decoder's parameters are.

    Args:
      decoder: the decoder, without adapters. It stays as it is; its parameters are shared.
      config: which matrices and rows.
      key: of vectors that start from draws. Stacked or not, the layers get the same numbers.

    Raises:
      CoconutError: a target fits no matrix, or of stacked layers some alone; a row is no token's.
    """
    decoder = jax.tree.map(lambda x: x, decoder)  # new modules around the same arrays
    for name, linear in _targeted(decoder, config).items():
        kernel, axes = linear.kernel[...], linear.kernel.get_metadata("axes")
        left, values, right = decomposed(kernel)
        index, path = _place(name)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        draw = lambda index, own=own, values=values: jax.random.normal(
            jax.random.fold_in(own, index), values.shape[-1:], values.dtype
        )
        draws = draw(index) if index is not None else jax.vmap(draw)(jnp.arange(len(kernel)))
        linear.singular_u = nnx.Param(left, axes=(*axes[:-1], "rank"))
        linear.singular_s = nnx.Param(values, axes=(*axes[:-2], "rank"))
        linear.singular_v = nnx.Param(right, axes=(*axes[:-2], "rank", axes[-1]))
        linear.singular_z = nnx.Param(fresh_vector(values, config.form, draws), axes=(*axes[:-2], "rank"))
        linear.singular_form = config.form
    _train_rows(decoder, config)
    return decoder


def with_scales(decoder: Decoder, change: Callable[[str, Array], Array]) -> Decoder:
    """A decoder with other scales of its singular values. Traceable.

    Args:
      decoder: with vectors, of either form. It stays as it is.
      change: (a matrix's name, the scales that its vector makes now) -> its scales. Those of decoders that are made
        here have one structure, whatever form they come from.
    """
    decoder = jax.tree.map(lambda x: x, decoder)
    for name, linear in matrices_of(decoder).items():
        if linear.singular_z is not None:
            found = change(name, linear.singular_scales())
            linear.singular_z, linear.singular_form = linear.singular_z.replace(found), "scales"
    return decoder


def mix_singular_values(decoders: Sequence[Decoder], weights: Float[Array, "K *L"]) -> Decoder:
    """The decoder whose vectors are weighted sums of those of several. Traceable.

    Masks are summed as masks, and the sum of singular values is kept then (Sun et al. 2025, section 3.3).

    Args:
      decoders: alike but for their vectors.
      weights: of each decoder, or of each decoder and layer.
    """
    vectors = [
        {
            name: (linear.singular_s[...], weights_of(linear.singular_z[...], linear.singular_form))
            for name, linear in matrices_of(decoder).items()
            if linear.singular_z is not None
        }
        for decoder in decoders
    ]
    matrices = matrices_of(decoders[0])

    def mixed(name: str, own_scales: Array) -> Array:
        index = _place(name)[0]
        own = weights if weights.ndim == 1 or index is None else weights[:, index]
        values = vectors[0][name][0]
        stacked = own[..., None] if own.ndim == 2 else own.reshape(-1, *[1] * values.ndim)
        summed = (stacked * jnp.stack([vector[name][1] for vector in vectors])).sum(0)
        return scales(values, summed, matrices[name].singular_form).astype(own_scales.dtype)

    return with_scales(decoders[0], mixed)


def _train_rows(decoder: Decoder, config: AdapterConfig | SingularValueConfig) -> None:
    """Gives a decoder the rows that are trained, which start as they are in its table."""
    if not config.trained_rows:
        return
    ids = _checked_ids(decoder, config)
    rows = jnp.take(decoder.tokens.embedding[...], jnp.asarray(ids), axis=0)
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    decoder.tokens.trained_rows = nnx.Param(rows.astype(dtype), axes=("trained_rows", "embed"))
    decoder.tokens.trained_ids = ids


def merge_adapters(decoder: Decoder) -> Decoder:
    """The decoder without adapters that computes the same: each of them added to its matrix, rows put in their table.

    Sums are rounded to the dtype of the matrices, here and nowhere else.
    """
    own = decoder_parameters(decoder)
    merged = {name: value for name, value in own.items() if not is_adapter(name)}
    for name, linear in matrices_of(decoder).items():
        if linear.lora_a is not None or linear.singular_z is not None:
            merged[f"{name}.kernel"] = _merged(linear)
    merged["tokens.embedding"] = decoder.tokens.table(merged["tokens.embedding"].dtype)
    return decoder_of(decoder.config, decoder.execution, merged)


def _merged(linear: Linear) -> Float[Array, "*L D F"]:
    kernel, highest = linear.kernel[...], jax.lax.Precision.HIGHEST
    if linear.lora_a is not None:
        delta = linear.lora_scaling * jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision=highest)
    else:
        change = linear.singular_change()
        left, right = (factor[...].astype(change.dtype) for factor in (linear.singular_u, linear.singular_v))
        delta = jnp.matmul(left * change[..., None, :], right, precision=highest)
    return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype)


def matrices_of(decoder: Decoder) -> dict[str, Linear]:
    """The matrices of the layers that may have an adapter, by name.

    ``layers.0.attention.query``, or ``layers.attention.query`` of all layers.
    """
    return {
        ".".join(map(str, ("layers", *path))): module
        for path, module in nnx.iter_modules(decoder.layers)
        if isinstance(module, Linear)
    }


def _place(name: str) -> tuple[int | None, str]:
    """The layer of a matrix, None for that of all, and its name within it."""
    first, _, rest = name.removeprefix("layers.").partition(".")
    return (int(first), rest) if first.isdecimal() else (None, f"{first}.{rest}")


def _targeted(decoder: Decoder, config: AdapterConfig | SingularValueConfig) -> Mapping[str, Linear]:
    """The matrices that get an adapter, by name."""
    matrices = matrices_of(decoder)
    paths = list(dict.fromkeys(_place(name)[1] for name in matrices))
    reject = lambda why: CoconutError(f"{type(config).__name__}.targets = {config.targets!r}: {why}")
    fitting: set[str] = set()
    layers = range(decoder.config.num_layers)
    each = {  # of one layer; where some have other matrices than others, those that are there
        f"layers.{own}.{path}" for name in matrices for index, path in [_place(name)]
        for own in (layers if index is None else [index])
    }  # fmt: skip
    for pattern in config.targets:
        found = set(fnmatch.filter(each, pattern))
        if not found:
            raise reject(f"{pattern!r} fits no matrix; there are {', '.join(f'layers.*.{path}' for path in paths)}")
        fitting |= found
    targeted = {}
    for name, matrix in matrices.items():
        index, path = _place(name)
        layers = range(decoder.config.num_layers) if index is None else (index,)
        hit = [f"layers.{index}.{path}" in fitting for index in layers]
        if any(hit) and not all(hit):
            raise reject(
                f"some layers alone have layers.*.{path}, which ExecutionConfig.scan_layers = True does not do"
            )
        if all(hit):
            targeted[name] = matrix
    return targeted


def _checked_ids(decoder: Decoder, config: AdapterConfig | SingularValueConfig) -> tuple[int, ...]:
    ids, vocabulary = [], decoder.config.vocabulary
    for token in config.trained_rows:
        if isinstance(token, str) or not 0 <= token < vocabulary:
            why = f"{token!r} is no id of a token, which run from 0 to {vocabulary - 1}"
            raise CoconutError(f"{type(config).__name__}.trained_rows = {config.trained_rows!r}: {why}")
        ids.append(token)
    return tuple(ids)
