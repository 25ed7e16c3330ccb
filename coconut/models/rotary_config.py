"""How rotary wavelengths are stretched to contexts longer than a model was trained on first.

YaRN's is in `coconut.models.latent_config`, beside the attention that it multiplies the scores of.
"""

import dataclasses
from typing import no_type_check

from coconut.errors import CoconutError, check_fields
from coconut.models.latent_config import LARGEST_NUMBER, reject


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRotaryScaling:
    """How the larger models of Gemma 3 stretch the wavelengths of their global layers: all alike (Chen et al. 2023).

    Attributes:
      factor: how much longer every wavelength becomes.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    factor: float

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.factor <= LARGEST_NUMBER:
            reject(self, "factor", "must be positive and finite")


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How Llama 3.1 and later stretch rotary wavelengths to contexts longer than they were trained on first.

    A wavelength that fits into the original context ``high_frequency_factor`` times or more stays as it is, one that
    fits ``low_frequency_factor`` times or less becomes ``factor`` times as long, and between the two the frequency
    is interpolated (Grattafiori et al. 2024, section 3.4.2; the rule itself is in Meta's published code).

    Attributes:
      factor: how much longer the longest wavelengths become.
      low_frequency_factor: see above.
      high_frequency_factor: see above.
      original_positions: length of the original context.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("factor", "low_frequency_factor", "high_frequency_factor", "original_positions"):
            if not 0 < getattr(self, field) <= LARGEST_NUMBER:
                raise CoconutError(f"RotaryScaling.{field} = {getattr(self, field)!r:.80}: must be positive and finite")
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise CoconutError(
                f"RotaryScaling.high_frequency_factor = {self.high_frequency_factor!r}: must be larger than "
                f"low_frequency_factor = {self.low_frequency_factor!r}"
            )


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRotaryScaling:
    """How Phi 3.5 and Phi 4 mini stretch rotary wavelengths, each by a factor of its own (LongRoPE, Ding et al. 2024).

    Such a model has two sets of factors: one for rows of at most ``original_positions``, one for longer rows. A decoder
    here uses the first and takes no longer rows; the second is kept for whoever reads what is written of it.

    Attributes:
      short_factors: how much longer each wavelength becomes, the shortest first: one for each pair of features that
        turns.
      long_factors: those of longer rows.
      original_positions: see above.
      attention_factor: what rotated queries and keys are multiplied by, in rows of any length.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_positions: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("short_factors", "long_factors"):
            if not all(0 < factor <= LARGEST_NUMBER for factor in getattr(self, field)):
                raise CoconutError(
                    f"LongRotaryScaling.{field} = {getattr(self, field)!r:.80}: must be positive, finite"
                )
        if len(self.short_factors) != len(self.long_factors):
            raise CoconutError(
                f"LongRotaryScaling.long_factors: has {len(self.long_factors)} factors, short_factors "
                f"{len(self.short_factors)}"
            )
        for field in ("original_positions", "attention_factor"):
            if not 0 < getattr(self, field) <= LARGEST_NUMBER:
                raise CoconutError(
                    f"LongRotaryScaling.{field} = {getattr(self, field)!r:.80}: must be positive, finite"
                )
