"""How many devices a mesh has along each axis; `coconut.sharding` says what each axis splits.

The command line asks, so nothing heavy is imported.
"""

import dataclasses
from typing import no_type_check

from coconut.errors import CoconutError, check_fields

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of a mesh. It decides no number of a run but their rounding: a checkpoint restores onto any mesh.

    Attributes:
      data: copies of the model; None for as many as there are devices for.
      fsdp: shards of rows and parameters.
      sequence: shards of columns.
      tensor: shards of heads, MLP, experts and vocabulary.

    Raises:
      CoconutError: a size that is not positive; the message names the field and the value.
    """

    data: int | None = None
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for field in MESH_AXES:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise CoconutError(f"MeshConfig.{field} = {value!r}: must be at least 1")

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """The mesh of ``data=2,fsdp=4``; axes that are not named have their defaults.

        Raises:
          CoconutError: the text has another form, or an axis is unknown or named twice.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            axis, equals, size = part.strip().partition("=")
            if not equals or not size.isdecimal():
                raise CoconutError(f"mesh {text!r}: {part!r} must be AXIS=SIZE, such as fsdp=8")
            if axis not in MESH_AXES:
                raise CoconutError(f"mesh {text!r}: unknown axis {axis!r}, known are {', '.join(MESH_AXES)}")
            if axis in sizes:
                raise CoconutError(f"mesh {text!r}: {axis} is named twice")
            sizes[axis] = int(size)
        return cls(**sizes)
