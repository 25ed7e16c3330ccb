"""Dropout whose masks are known by their keys: of each column, or of a row."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout whose masks depend on the column, not on the pass that computes it.

    A thought is computed twice in training, first alone and then beside its neighbours (`coconut.latent.rollout`);
    both must drop the same units. So every column folds its own index into the key.

    Attributes:
      key: key of this site; `at` derives the next one.
      columns: index of each column of this pass in the whole sequence.
      total: number of columns of the whole sequence. Static.
      rate: share of units dropped. Static.
    """

    key: Key[Array, ""]
    columns: Int[Array, " T"]
    total: int = dataclasses.field(metadata={"static": True})
    rate: float = dataclasses.field(metadata={"static": True})

    def at(self, site: int | Array) -> "Dropout":
        """The same columns with a key of their own for one site of the network."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, site))

    def _kept(self, shape: tuple[int, ...]) -> Bool[Array, "T ..."]:
        keys = jax.vmap(lambda column: jax.random.fold_in(self.key, column))(self.columns)
        return jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, shape))(keys)

    def units(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Drops units of ``x`` and scales the rest."""
        if not self.rate:
            return x
        kept = self._kept((x.shape[0], x.shape[2])).swapaxes(0, 1)
        return jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)

    def embedded(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`units` of what the first layer reads."""
        return self.at(0).units(x)

    def adapted(self, x: Float[Array, "B T D"], rate: float) -> Float[Array, "B T D"]:
        """`units` of what an adapter is applied to, at the adapter's own rate."""
        return dataclasses.replace(self, rate=rate).units(x)

    def weights(self, batch: int, heads: int, sources: list[Int[Array, " _"]]) -> list[Bool[Array, "B N T _"]] | None:
        """Which attention weights to keep, for sources holding the given columns; None for all."""
        if not self.rate:
            return None
        kept = self._kept((batch, heads, self.total)).transpose(1, 2, 0, 3)
        return [kept[..., columns] for columns in sources]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class RowMasks:
    """Dropout as a draw that a row keeps: one mask for each site of the network, the same in all of its columns.

    It makes thoughts random that a row's key makes again: with the key each mask is known. It drops units of what the
    layers add to the residual stream, of some columns alone; embeddings, attention weights and adapters keep theirs.

    Attributes:
      keys: a key for each row at this site; `at` derives the next ones.
      columns: index of each column of this pass in the whole sequence.
      dropping: which columns of the whole sequence drop units.
      rate: share of units dropped. Static.
      afresh: draw another mask for each column. Static.
    """

    keys: Key[Array, " B"]
    columns: Int[Array, " T"]
    dropping: Bool[Array, " _"]
    rate: float = dataclasses.field(metadata={"static": True})
    afresh: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def total(self) -> int:
        """Number of columns of the whole sequence."""
        return len(self.dropping)

    def at(self, site: int | Array) -> "RowMasks":
        """The same columns with keys of their own for one site of the network."""
        return dataclasses.replace(self, keys=_fold_in_rows(self.keys, site))

    def units(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Drops units of ``x`` in the columns that do, and scales the rest of these."""

        def mask(key: Key[Array, ""]) -> Bool[Array, " D"]:
            return jax.random.bernoulli(key, 1.0 - self.rate, x.shape[-1:])

        if self.afresh:
            # Counted from the first thought: how wide the prompts of a batch are changes no mask.
            numbers = jnp.maximum(self.columns - jnp.argmax(self.dropping), 0)
            kept = jax.vmap(jax.vmap(lambda key, number: mask(jax.random.fold_in(key, number)), (None, 0)), (0, None))(
                self.keys, numbers
            )
        else:
            kept = jax.vmap(mask)(self.keys)[:, None]
        dropped = jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)
        return jnp.where(self.dropping[self.columns][:, None], dropped, x)

    def embedded(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the first layer reads, whole."""
        return x

    def adapted(self, x: Float[Array, "B T D"], rate: float) -> Float[Array, "B T D"]:
        """What an adapter is applied to, whole."""
        del rate
        return x

    def weights(self, batch: int, heads: int, sources: list[Int[Array, " _"]]) -> None:
        """Which attention weights to keep: all."""
        del batch, heads, sources


def _fold_in_rows(keys: Key[Array, " B"], data: int | Array) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)
