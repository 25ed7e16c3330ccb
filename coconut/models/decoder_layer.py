"""A layer of the decoder: a mixer of columns and an MLP, each chosen by its name from a table.

The decoder and the layer know nothing of either but `Mixer` and what an MLP is called with: what each column is, what
it may see, and what earlier passes kept of their columns (`coconut.models.cache.LayerCache`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coconut.models.cache import Filling, LayerCache
from coconut.models.config import DecoderConfig, ExecutionConfig, MixerKind, MlpKind
from coconut.models.dropout import Dropout, RowMasks
from coconut.models.experts import Experts
from coconut.models.latent_attention import LatentAttention
from coconut.models.layers import Attention, FeedForward, make_norm, residual, take_columns


class Mixer(Protocol):
    """What mixes columns, a module made of ``(config, execution, index of the layer, rngs=)``."""

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        past: list[Any],
        visible: list[Any],
        implementation: str,
        dropout: Dropout | RowMasks | None,
        columns: list[Int[Array, " _"]],
        wanted: Int[Array, "B W"] | None = None,
        write_at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Attends to ``past`` and to the columns of ``x``; see `coconut.models.layers.Attention`."""
        ...

    def weights(
        self,
        x: Float[Array, "B T D"],
        *,
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B W T"],
        wanted: Int[Array, "B W"],
    ) -> Float[Array, "B N W T"]:
        """The weights with which some columns of a pass attend to all of them, by head, without dropout."""
        ...

    def on_wanted_columns(self) -> list[nnx.Module]:
        """What a pass applies to the wanted columns alone."""
        ...


MIXERS: Mapping[MixerKind, Callable[..., Mixer]] = MappingProxyType(
    {"attention": Attention, "latent_attention": LatentAttention}
)
"""`DecoderConfig.mixer` -> what it is."""

MLPS: Mapping[MlpKind, Callable[..., Any]] = MappingProxyType({"dense": FeedForward, "experts": Experts})
"""`DecoderConfig.mlp_of` a layer -> what it is: a module made of ``(config, execution, rngs=)`` that maps the columns
``[B, T, D]``, each by itself, with the adapters' dropout or None beside them."""


class Layer(nnx.Module):
    """Mixer and MLP, each added to the residual stream, with norms before them, behind them, or both."""

    def __init__(
        self, config: DecoderConfig, execution: ExecutionConfig, index: Int[Array, ""] | int, *, rngs: nnx.Rngs
    ):
        self.norm_placement = config.norm_placement
        self.attention_norm = make_norm(config, execution, rngs)
        self.attention: Any = MIXERS[config.mixer](config, execution, index, rngs=rngs)
        self.mlp_norm = make_norm(config, execution, rngs)
        self.mlp: Any = MLPS[config.mlp_of(index)](config, execution, rngs=rngs)
        if config.norm_placement == "both":
            self.attention_output_norm = make_norm(config, execution, rngs)
            self.mlp_output_norm = make_norm(config, execution, rngs)

    def on_wanted_columns(self) -> list[nnx.Module]:
        """What a pass applies to the wanted columns alone."""
        return [*self.attention.on_wanted_columns(), self.mlp]

    def attention_reads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the attention reads of the residual stream."""
        return x if self.norm_placement == "after" else self.attention_norm(x)

    def attention_adds(self, made: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What is added to the residual stream of what the attention made."""
        if self.norm_placement == "before":
            return made
        return (self.attention_output_norm if self.norm_placement == "both" else self.attention_norm)(made)

    def mlp_reads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the MLP reads of the residual stream."""
        return x if self.norm_placement == "after" else self.mlp_norm(x)

    def mlp_adds(self, x: Float[Array, "B T D"], dropout: Dropout | RowMasks | None = None) -> Float[Array, "B T D"]:
        """What the MLP adds to the residual stream; ``dropout`` is the adapters'."""
        made = self.mlp(self.mlp_reads(x), dropout)
        if self.norm_placement == "before":
            return made
        return (self.mlp_output_norm if self.norm_placement == "both" else self.mlp_norm)(made)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        index: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        past: list[LayerCache | Filling],
        visible: list[Any],
        implementation: str,
        dropout: Dropout | RowMasks | None,
        columns: list[Int[Array, " _"]],
        wanted: Int[Array, "B W"] | None = None,
        write_at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], LayerCache | Filling]:
        """One layer, whose output has the columns wanted alone; see `Attention` for the arguments."""
        drop = (lambda y, site: y) if dropout is None else (lambda y, site: dropout.at(site).units(y))
        branch, own = self.attention(
            self.attention_reads(x),
            index=index,
            positions=positions,
            past=past,
            visible=visible,
            implementation=implementation,
            dropout=None if dropout is None else dropout.at(0),
            columns=columns,
            wanted=wanted,
            write_at=write_at,
        )
        branch = drop(self.attention_adds(branch), 1)
        x = residual((x if wanted is None else take_columns(x, wanted)) + branch)
        return residual(x + drop(self.mlp_adds(x, None if dropout is None else dropout.at(3)), 2)), own
