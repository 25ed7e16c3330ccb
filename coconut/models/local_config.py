"""Which layers look back through a window, and how far."""

import dataclasses
from typing import Literal, no_type_check

from coconut.errors import check_fields
from coconut.models.latent_config import LARGEST_NUMBER, LARGEST_SIZE, reject

LayerType = Literal["local", "global"]


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalAttentionConfig:
    """Layers that look back through a window, among others that see everything before (Gemma 3, Gemma Team 2025).

    A window counts the columns of a row: a token is one, a thought is one, and padding is none. It counts what a row
    has, wherever its columns stand: the same row sees the same through it, alone or beside others.

    A decoder looks back only. ModernBERT (Warner et al. 2024) looks both ways: of its ``local_attention = 128`` a token
    sees 64 on either side, and itself. What a decoder keeps of that is the half that lies behind: its own column and
    the 64 before are ``window = 65``. `transformers`' ModernBERT decoder sees one fewer, ``window = 64``. Its first
    layer is global, and then every third: ``pattern = ("global", "local", "local")``.

    The caches keep the columns that have left a window: what it saves is arithmetic of the kernels, and no memory.

    Attributes:
      window: how many columns a column of a local layer sees: itself and the ``window - 1`` before it.
      pattern: which layers are ``local`` and which ``global``, from the first layer; it repeats. Gemma 3: five local
        ones and a global one.
      rotary_base: base of the rotary wavelengths of local layers, which are then not stretched; None for wavelengths as
        in the global ones.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    window: int
    pattern: tuple[LayerType, ...] = ("local",)
    rotary_base: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.window <= LARGEST_SIZE:
            reject(self, "window", f"must be from 1 to {LARGEST_SIZE:,}")
        if "local" not in self.pattern:
            reject(self, "pattern", "has no 'local' layer, so there is no window: leave local_attention out")
        if self.rotary_base is not None and not 0 < self.rotary_base <= LARGEST_NUMBER:
            reject(self, "rotary_base", "must be None, or positive and finite")

    @property
    def alike(self) -> bool:
        """Whether all layers are local."""
        return "global" not in self.pattern

    def shortest(self) -> "LocalAttentionConfig":
        """The same with the shortest pattern that repeats to it."""
        whole = self.pattern
        parts = (whole[:length] for length in range(1, len(whole) + 1))
        fits = (part for part in parts if (part * len(whole))[: len(whole)] == whole)
        return dataclasses.replace(self, pattern=next(fits))
