"""Training a latent scorer (`coconut.latent.scorer`): its config, what trajectories are labelled with, and the loss.

It follows LatentTTS (arXiv 2510.07745), whose LatentRM is trained on trajectories of a generator that stays as it is.
The label of a thought is the share of right answers among continuations that the policy draws behind it; that of the
last thought is whether the trajectory's own answer is right. The loss compares the trajectories of a question step by
step: a softmax over them of their scores of the ``k``-th thought, and its cross-entropy with their labels of that
thought. Where the paper leaves it open this is our reading, which was not compared with its code: the labels are not
normalised, so that a step at which more continuations are right counts for more; the softmax is of the scores of this
one thought, not of the sums so far; and the mean is over steps of questions. A binary cross-entropy of each thought on
its own, which it trains with as well, is not here.

We differ in one thing: trajectories are drawn as the run goes on, not written down before it.
"""

import dataclasses
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coconut.errors import CoconutError, check_fields
from coconut.latent.policies.config import PolicyConfig
from coconut.latent.scorer import check_scored
from coconut.losses import Ratio, ratio


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """How a run trains a scorer of the model that it starts from, which stays as it is.

    A step draws trajectories of ``PipelineConfig.batch_size`` questions, answers of continuations behind each of their
    thoughts, and updates the scorer by them.

    Attributes:
      policy: what draws thoughts.
      trajectories: of a question. The paper takes 8.
      continuations: drawn behind each thought but the last. The paper takes 64.
      temperature: of the tokens written; 0 for the likeliest ones, as the paper does. How many there are at most says
        ``RunConfig.sampling``.
      most_draws: questions whose trajectories are all right or all wrong are dropped; so many batches a step draws
        trajectories of at most, until as many questions as a batch has are left.
      epochs: updates by the trajectories of a step.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    policy: PolicyConfig = dataclasses.field(default_factory=lambda: PolicyConfig(kind="gaussian"))
    trajectories: int = 8
    continuations: int = 8
    temperature: float = 0.0
    most_draws: int = 4
    epochs: int = 1

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"ScorerConfig.{field} = {getattr(self, field)!r}: {why}")

        check_scored(self.policy, "ScorerConfig.policy")
        if self.trajectories < 2:
            reject("trajectories", "must be at least 2: a trajectory is compared with the others of its question")
        for field in ("continuations", "most_draws", "epochs"):
            if getattr(self, field) < 1:
                reject(field, "must be at least 1")
        if not 0 <= self.temperature < math.inf:
            reject("temperature", "must be at least 0")


def labels_of(
    right: Bool[np.ndarray, "Q G"],
    continued: Bool[np.ndarray, "K_1 Q G M"],
    thoughts: Int[np.ndarray, " Q"],
) -> Float[np.ndarray, "Q G K"]:
    """The label of each thought: its share of right continuations, and for the last one the trajectory's own answer.

    Args:
      right: whether the answer of each trajectory is.
      continued: whether that of each continuation is, behind the thoughts 1, 2, .., ``K - 1``. Those behind a last
        thought, or behind none, are not looked at.
      thoughts: of the trajectories of each question.
    """
    labels = np.zeros((*right.shape, len(continued) + 1), np.float32)
    for question, count in enumerate(thoughts):
        if count:
            labels[question, :, : count - 1] = np.moveaxis(continued[: count - 1, question].mean(-1), 0, -1)
            labels[question, :, count - 1] = right[question]
    return labels


def contrastive_loss(
    scores: Float[Array, "Q G K"], labels: Float[Array, "Q G K"], counted: Bool[Array, "Q K"]
) -> Ratio:
    """The cross-entropy of the softmax over the trajectories of a question with their labels, at each step.

    Args:
      scores: of each thought.
      labels: of each thought (`labels_of`); those of a step need not sum to 1.
      counted: steps that are part of the mean.
    """
    likely = jax.nn.log_softmax(scores, axis=1)
    return ratio(-(labels.astype(likely.dtype) * likely).sum(1), counted)


def chosen(scores: Float[Array, "Q G K"], right: Bool[Array, "Q G"]) -> Float[Array, " Q"]:
    """Whether the trajectory of the highest sum of scores is right, the first of equals, as 0 or 1."""
    best = jnp.argmax(scores.sum(-1), axis=1)
    return jnp.take_along_axis(right, best[:, None], 1)[:, 0].astype(scores.dtype)
