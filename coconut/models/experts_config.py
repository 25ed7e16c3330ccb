"""How many experts there are, and how each column chooses its own."""

import dataclasses
from typing import Literal, no_type_check

from coconut.errors import check_fields
from coconut.models.latent_config import LARGEST_NUMBER, LARGEST_SIZE, reject

MOST_EXPERTS = 10_000
"""More are slips or malice: each has tensors of its own in a checkpoint."""


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """MLPs of which each column uses a few (DeepSeekMoE, Dai et al. 2024; DeepSeek-V3, DeepSeek-AI 2024, section 2.1).

    No column is dropped, however many choose the same expert: the gradient through thoughts needs that a column's
    result does not depend on the columns beside it (`coconut.latent.thoughts`). There is no capacity to set.

    Attributes:
      count: ``E``, how many experts a router chooses from.
      chosen: how many each column uses.
      width: width of an expert's hidden layer.
      shared: how many further experts every column uses, as one MLP of ``shared * width``.
      first_layer: the first layer that has experts; those before have the dense MLP.
      router: what scores an expert: a ``sigmoid`` of its own logit, to which a correction bias is added where experts
        are chosen (V3; training moves it by ``OptimizerConfig.correction_rate``), or a ``softmax`` over all (V2).
      groups: in how many groups of equal size the experts lie.
      groups_chosen: from how many of them a column chooses: those whose best expert scores highest (``softmax``), or
        whose best two do together (``sigmoid``).
      normalized: divide the weights of the experts chosen by their sum. ``sigmoid`` alone.
      scaling: factor on the weights.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    count: int
    chosen: int
    width: int
    shared: int = 0
    first_layer: int = 0
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    groups: int = 1
    groups_chosen: int = 1
    normalized: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("count", "chosen", "width", "groups", "groups_chosen"):
            if not 1 <= getattr(self, field) <= LARGEST_SIZE:
                reject(self, field, f"must be from 1 to {LARGEST_SIZE:,}")
        if self.count > MOST_EXPERTS:
            reject(self, "count", f"must be at most {MOST_EXPERTS:,}")
        if self.shared * self.width > LARGEST_SIZE:
            reject(self, "shared", f"times width = {self.width} is more than {LARGEST_SIZE:,}")
        for field in ("shared", "first_layer"):
            if not 0 <= getattr(self, field) <= LARGEST_SIZE:
                reject(self, field, f"must be from 0 to {LARGEST_SIZE:,}")
        if self.count % self.groups:
            reject(self, "groups", f"must divide count = {self.count}")
        if self.groups_chosen > self.groups:
            reject(self, "groups_chosen", f"must be at most groups = {self.groups}")
        if self.router == "sigmoid" and self.groups > 1 and self.count // self.groups < 2:
            reject(self, "groups", f"of count = {self.count} experts must have two each: their best two are added")
        within = self.groups_chosen * (self.count // self.groups)
        if self.chosen > within:
            reject(self, "chosen", f"must be at most the {within} experts of groups_chosen = {self.groups_chosen}")
        if self.normalized and self.router == "softmax":
            reject(self, "normalized", "is for the sigmoid router alone")
        if not 0 < self.scaling <= LARGEST_NUMBER:
            reject(self, "scaling", "must be positive and finite")
