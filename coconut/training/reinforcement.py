"""Learning from rewards: advantages, and what is maximised of the draws of samples. Pure functions and their config.

The family is that of GRPO (Shao et al. 2024, arXiv 2402.03300): a sample's reward is compared with those of the other
samples of its question, so that no value function is learnt. What the members differ in are fields of
`ReinforcementConfig`:

============ ==================================================================================================
GRPO         ``advantage="standardized"``, ``average="sample"``
Dr.GRPO      ``advantage="centered"``, ``average="constant"`` over the longest sample (arXiv 2503.20783)
RLOO         ``advantage="leave_one_out"``, ``average="constant"`` likewise, without clipping (arXiv 2402.14740)
DAPO         ``clip_high=0.28``, ``average="action"``, ``dead_groups="resample"``, reward ``overlong`` (2503.14476)
GSPO         ``ratio="sequence"``, ``clip_low=3e-4``, ``clip_high=4e-4`` (arXiv 2507.18071)
============ ==================================================================================================

`rlax` was looked at: its losses have no groups, no sequence ratio and no masks for ragged rows, and it would bring a
nightly build of TensorFlow Probability. `tunix` has the objectives inside a trainer of its own, over its own models and
samplers, and pins safetensors below the version that we need. What remains is this page.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coconut.errors import CoconutError, check_fields
from coconut.latent.policies.config import PolicyConfig
from coconut.latent.sampling import Actions
from coconut.losses import Ratio
from coconut.training.rewards import check_rewards

Advantage = Literal["standardized", "centered", "leave_one_out"]
DeadGroups = Literal["keep", "drop", "resample"]
Average = Literal["sample", "action", "constant"]
Divergence = Literal["k1", "k2", "k3"]


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcementConfig:
    """How a run learns from rewards. The defaults are GRPO's, without a reference model.

    A step draws ``group`` samples of each of ``PipelineConfig.batch_size`` questions, which the method writes down as
    it is asked them, and updates the parameters by all of them, ``epochs`` times, in ``minibatches`` parts each time.

    Attributes:
      policy: what draws thoughts.
      group: samples of a question.
      temperature: of the tokens written. How many there are at most says ``RunConfig.sampling``.
      rewards: weight of each reward (`coconut.training.rewards.REWARDS`).
      advantage: a sample's reward minus its group's mean, ``standardized`` by the group's standard deviation (which is
        that of a population), only ``centered``, or minus the mean of the others (``leave_one_out``).
      advantage_epsilon: added to the standard deviation.
      dead_groups: what becomes of questions whose samples all have the same reward, and so no gradient: ``keep`` them
        in the mean, ``drop`` them from it, or ``resample``: draw samples of further questions in their place.
      most_draws: with ``resample``, batches that a step draws at most; questions that are still dead are dropped.
      ratio: importance ratios and clipping of each ``action``, or of a whole ``sequence``: the geometric mean of those
        of its actions (GSPO).
      clip_low: ratios count no further than ``1 - clip_low``; None for no clipping.
      clip_high: likewise, ``1 + clip_high``.
      dual_clip: where the advantage is negative, a ratio counts no further than this; None for no such bound.
      average: the objective is a mean over samples of the mean over each sample's actions (``sample``), over all
        actions (``action``), or a mean over samples of the sum over each one's actions over a ``constant``.
      constant: see ``average``; such as the most tokens and thoughts that a sample may have.
      thoughts_factor: weight of the draws of thoughts beside those of tokens and stops.
      sampler_cap: weigh each action by the ratio of its probability in training to that at sampling, no further than
        this (truncated importance sampling); None for no such weight. The two differ by rounding alone.
      kl_weight: factor of the Kullback-Leibler divergence from the model that the run starts from, which is kept beside
        the own one with all of its parts. It needs ``RunConfig.init_from`` or ``pretrained``.
      kl: its estimator (`divergence`): ``k1``, the log-ratio; ``k2``, half its square; ``k3``, never negative.
      epochs: times that a step's samples are used.
      minibatches: parts that they are used in, each an update of its own.
      best_first_thought: in a group, only the sample of positive advantage whose first draw was likeliest keeps the
        advantage of its first thought (Latent-GRPO, which finds that averaging several first thoughts fits none).

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    group: int = 8
    temperature: float = 1.0
    rewards: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"answer": 1.0})
    advantage: Advantage = "standardized"
    advantage_epsilon: float = 1e-4
    dead_groups: DeadGroups = "keep"
    most_draws: int = 4
    ratio: Literal["action", "sequence"] = "action"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    average: Average = "sample"
    constant: float = 1.0
    thoughts_factor: float = 1.0
    sampler_cap: float | None = None
    kl_weight: float = 0.0
    kl: Divergence = "k3"
    epochs: int = 1
    minibatches: int = 1
    best_first_thought: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"ReinforcementConfig.{field} = {getattr(self, field)!r}: {why}")

        if self.best_first_thought and self.policy.kind in ("deterministic", "dropout"):
            reject("best_first_thought", f"PolicyConfig.kind = {self.policy.kind!r} draws no thought")
        check_rewards(self.rewards, "ReinforcementConfig.rewards")
        if self.group < 2:
            reject("group", "must be at least 2: a sample is compared with the others of its question")
        if not 0 < self.temperature < math.inf:
            reject("temperature", "must be positive: samples of a question have to differ")
        for field in ("advantage_epsilon", "thoughts_factor", "kl_weight"):
            if not 0 <= getattr(self, field) < math.inf:
                reject(field, "must be at least 0")
        for field in ("most_draws", "epochs", "minibatches"):
            if getattr(self, field) < 1:
                reject(field, "must be at least 1")
        if (self.clip_low is None) != (self.clip_high is None):
            reject("clip_high", f"clip_low = {self.clip_low!r}: give both or none")
        for field, bound in (("clip_low", 0.0), ("clip_high", 0.0), ("dual_clip", 1.0), ("sampler_cap", 0.0)):
            value = getattr(self, field)
            if value is not None and not bound < value < math.inf:
                reject(field, f"must be None or above {bound:g}")
        if not 0 < self.constant < math.inf or (self.constant != 1.0 and self.average != "constant"):
            reject("constant", "must be positive, and 1 where average is not 'constant'")

    @property
    def updates(self) -> int:
        """Updates of a step."""
        return self.epochs * self.minibatches


# --- On the host --------------------------------------------------------------------------------------------------


def advantages(
    rewards: Float[np.ndarray, "Q G"], config: ReinforcementConfig
) -> tuple[Float[np.ndarray, "Q G"], Bool[np.ndarray, " Q"]]:
    """The advantage of each sample of each question, and which questions are dead: all of their rewards are equal."""
    centered = rewards - rewards.mean(1, keepdims=True)
    dead = np.ptp(rewards, axis=1) == 0
    # Of equal rewards the mean may differ from them by rounding.
    centered[dead] = 0.0
    if config.advantage == "standardized":
        centered = centered / (rewards.std(1, keepdims=True) + config.advantage_epsilon)
    elif config.advantage == "leave_one_out":
        centered = centered * (config.group / (config.group - 1))
    return centered, dead


def first_thoughts_that_count(
    advantage: Float[np.ndarray, "Q G"], first: Float[np.ndarray, "Q G"]
) -> Bool[np.ndarray, "Q G"]:
    """Which samples keep the advantage of their first thought (`ReinforcementConfig.best_first_thought`).

    Args:
      advantage: of each sample.
      first: log-probability of its first thought, as it was drawn; ``-inf`` for one that has none.
    """
    likely = np.where(advantage > 0, first, -np.inf)
    winner = np.arange(advantage.shape[1]) == likely.argmax(1)[:, None]
    return winner & np.isfinite(likely)


# --- On the device ------------------------------------------------------------------------------------------------


def surrogate(
    log_probs: Float[Array, "B X"],
    behaviour: Float[Array, "B X"],
    taken: Bool[Array, "B X"],
    advantage: Float[Array, "B X"],
    config: ReinforcementConfig,
) -> tuple[Float[Array, "B X"], Float[Array, "B X"], Bool[Array, "B X"]]:
    """What is maximised of each action (PPO's clipped objective, Schulman et al. 2017, equation 7).

    Args:
      log_probs: of the actions under the parameters.
      behaviour: of the actions under those that drew them.
      taken: which there are.
      advantage: of each.
      config: ratios and clipping.

    Returns:
      The objective, the ratio, and whether it was clipped, of each action.
    """
    difference = log_probs - behaviour
    if config.ratio == "sequence":
        mean = jnp.where(taken, difference, 0.0).sum(1, keepdims=True) / jnp.maximum(taken.sum(1, keepdims=True), 1)
        difference = jnp.broadcast_to(mean, difference.shape)
    # The exponential of a larger one overflows in float32; none means anything.
    ratio = jnp.exp(jnp.clip(difference, -_LARGEST, _LARGEST))
    value, clipped = ratio * advantage, jnp.zeros(ratio.shape, bool)
    if config.clip_low is not None and config.clip_high is not None:
        bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage
        clipped = bounded < value
        value = jnp.minimum(value, bounded)
    if config.dual_clip is not None:
        value = jnp.where(advantage < 0, jnp.maximum(value, config.dual_clip * advantage), value)
    return value, ratio, clipped & taken


_LARGEST = 20.0


def divergence(log_probs: Float[Array, "B X"], reference: Float[Array, "B X"], kind: Divergence) -> Float[Array, "B X"]:
    """An estimate of the Kullback-Leibler divergence from a reference, of each action (Schulman 2020).

    ``k1`` and ``k3`` have its value as their mean over draws of the policy, ``k2`` has its gradient. As a term of a
    loss ``k1`` has a gradient of mean zero, so it gets that of ``k2``. The gradient of ``k3`` is that of the divergence
    the other way round, of the reference from the policy, which GRPO's practice takes all the same.
    """
    difference = log_probs - reference
    square = 0.5 * jnp.square(difference)
    if kind == "k1":
        return jax.lax.stop_gradient(difference - square) + square
    if kind == "k2":
        return square
    # Densities of many components differ by more than any exponential means.
    opposite = jnp.clip(-difference, -_FARTHEST, _FARTHEST)
    return jnp.exp(opposite) - opposite - 1


_FARTHEST = 10.0


def averaged(
    values: Float[Array, "B X"],
    taken: Bool[Array, "B X"],
    counted: Bool[Array, " B"],
    config: ReinforcementConfig,
) -> Ratio:
    """The mean of values of actions, as the config takes it; samples that do not count are in none."""
    taken = taken & counted[:, None]
    values = jnp.where(taken, values, 0.0)
    if config.average == "action":
        return Ratio(values.sum(), taken.sum().astype(values.dtype))
    number = jnp.maximum(taken.sum(1), 1) if config.average == "sample" else config.constant
    return Ratio((values.sum(1) / number).sum(), counted.sum().astype(values.dtype))


def together(actions: Actions, config: ReinforcementConfig) -> dict[str, Array]:
    """All kinds of actions side by side.

    Returns:
      ``log_probs`` and ``taken`` of ``[B, X]``, ``weights``, and ``first``: which of them are the first of thoughts.
    """
    kinds = sorted(actions)
    join = lambda pick: jnp.concatenate([pick(kind, actions[kind]) for kind in kinds], 1)
    factor = lambda kind: config.thoughts_factor if kind == "thoughts" else 1.0
    return {
        "log_probs": join(lambda kind, draws: draws.log_probs),
        "taken": join(lambda kind, draws: draws.taken),
        "weights": join(lambda kind, draws: jnp.full(draws.log_probs.shape, factor(kind), draws.log_probs.dtype)),
        "first": join(
            lambda kind, draws: jnp.broadcast_to(
                (jnp.arange(draws.taken.shape[1]) == 0) & (kind == "thoughts"), draws.taken.shape
            )
        ),
    }


def beside(log_probs: Mapping[str, Float[Array, "B _"]], actions: Actions) -> Float[Array, "B X"]:
    """Log-probabilities by kind in the order of `together`."""
    return jax.lax.stop_gradient(jnp.concatenate([log_probs[kind] for kind in sorted(actions)], 1))
