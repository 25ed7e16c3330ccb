"""The sizes of multi-head latent attention, and how its rotary wavelengths are stretched."""

import dataclasses
import math
from typing import Any, no_type_check

from coconut.errors import CoconutError, check_fields

LARGEST_SIZE = 2**31 - 1
"""Sizes beyond it are slips or malice: XLA's indices end there."""
LARGEST_NUMBER = 3e38
"""The largest a number may be: float32 ends there. JSON and gin both know infinity and integers of any length."""


def reject(config: Any, field: str, why: str) -> None:
    """Says what is wrong with a field of a config.

    Raises:
      CoconutError: always; it names the class, the field and the value.
    """
    raise CoconutError(f"{type(config).__name__}.{field} = {getattr(config, field)!r:.80}: {why}")


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRotaryScaling:
    """How DeepSeek V2 and V3 stretch rotary wavelengths (YaRN, Peng et al. 2023, section 3).

    Of the pairs of features that turn, those that turn ``beta_fast`` times or more in the original context stay as they
    are, those that turn ``beta_slow`` times or less become ``factor`` times as slow, and between them the share of both
    is linear in the number of the pair.

    Attributes:
      factor: how much longer the longest wavelengths become.
      original_positions: length of the original context.
      beta_fast: see above.
      beta_slow: see above.
      mscale: with ``mscale_all_dim``, what rotated queries and keys are multiplied by is the ratio of
        ``0.1 mscale ln(factor) + 1`` for the two; where one of them is None or 0 it is ``0.1 ln(factor) + 1``.
      mscale_all_dim: the scores of attention are multiplied by ``(0.1 mscale_all_dim ln(factor) + 1) ** 2``, too; not
        where it is None or 0.
      truncate: whether the range between the two betas is widened to whole pairs.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.factor <= LARGEST_NUMBER:
            reject(self, "factor", "must be positive and finite")
        if not 1 <= self.original_positions <= LARGEST_SIZE:
            reject(self, "original_positions", f"must be from 1 to {LARGEST_SIZE:,}")
        for field in ("beta_fast", "beta_slow"):
            if not 1e-6 <= getattr(self, field) <= 1e6:
                reject(self, field, "must be from 1e-6 to 1e6")
        for field in ("mscale", "mscale_all_dim"):
            if not 0 <= (getattr(self, field) or 0) <= LARGEST_NUMBER:
                reject(self, field, "must be None, or at least 0 and finite")
        if not self.beta_slow < self.beta_fast:
            reject(self, "beta_fast", f"must be larger than beta_slow = {self.beta_slow!r}")

    @property
    def attention_factor(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.mscale and self.mscale_all_dim:
            return self._stretch(self.mscale) / self._stretch(self.mscale_all_dim)
        return self._stretch(1.0)

    @property
    def score_factor(self) -> float:
        """What the scores of attention are multiplied by besides."""
        return self._stretch(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _stretch(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def blended(self, width: int, base: float) -> tuple[float, float]:
        """Between which two pairs of ``width`` features wavelengths go from kept to stretched."""

        def pair(turns: float) -> float:
            return width * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return low, high + 0.001 if high == low else high


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Sizes of multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1).

    Of each column one vector is kept, of which all heads' keys and values are made, and one rotated key for all heads.

    Attributes:
      latent_dim: width of the vector kept (``kv_lora_rank``).
      plain_dim: features of a head's queries and keys that carry no position (``qk_nope_head_dim``).
      rotary_dim: features of a head's queries, and of the key for all heads, that turn (``qk_rope_head_dim``).
      value_dim: width of a head's values.
      query_latent_dim: width of the vector that queries are made of (``q_lora_rank``); None where one matrix makes
        them.
      interleaved: whether the features ``2 i`` and ``2 i + 1`` turn together, or ``i`` and ``i + rotary_dim / 2``.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    latent_dim: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    query_latent_dim: int | None = None
    interleaved: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("latent_dim", "plain_dim", "rotary_dim", "value_dim", "query_latent_dim"):
            value = getattr(self, field)
            if value is not None and not 1 <= value <= LARGEST_SIZE:
                reject(self, field, f"must be from 1 to {LARGEST_SIZE:,}")
        if self.rotary_dim % 2:
            reject(self, "rotary_dim", "must be even")

    @property
    def query_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.plain_dim + self.rotary_dim
