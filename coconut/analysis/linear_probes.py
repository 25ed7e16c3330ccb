"""Linear probes of thoughts: what can be read off them by a linear map, and how much of it the map has memorised.

A probe with enough parameters finds any label of questions that it can tell apart. So each is held against a control
task (Hewitt and Liang 2019, "Designing and interpreting probes with control tasks"): every *type* of question, such as
the token it ends with, gets a random label. Whoever knows the type alone can learn that, too. What is left, the
*selectivity*, is what the thoughts have beyond the identity of the type.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from coconut.errors import CoconutError
from coconut.evaluation.evaluate import wilson_interval


class Probes(NamedTuple):
    """Probes of every layer and thought; NaN where a thought has too few questions to be probed.

    Attributes:
      accuracy: of predictions for questions that the probe was not fitted on.
      low: lower ends of their 95 % intervals, Wilson's. They take the questions as independent, and the probe as given.
      high: upper ends.
      control: mean accuracy of the same probes on control tasks.
      p_value: of a permutation test: how often labels dealt to other questions are predicted as well. The smallest of
        many probes is small by chance alone: multiply by the number of cells (Bonferroni) before you call one found.
      majority: the share of the most frequent label among the questions that have the thought.
      number: how many questions have it.
    """

    accuracy: Float[np.ndarray, "L K"]
    low: Float[np.ndarray, "L K"]
    high: Float[np.ndarray, "L K"]
    control: Float[np.ndarray, "L K"]
    p_value: Float[np.ndarray, "L K"]
    majority: Float[np.ndarray, " K"]
    number: Int[np.ndarray, " K"]

    @property
    def selectivity(self) -> Float[np.ndarray, "L K"]:
        """Accuracy above that of the control tasks."""
        return self.accuracy - self.control


def probe(
    states: Float[np.ndarray, "L Q K D"],
    present: Bool[np.ndarray, "Q K"],
    labels: Int[np.ndarray, " Q"],
    types: Int[np.ndarray, " Q"],
    *,
    folds: int = 5,
    penalty: float = 0.1,
    permutations: int = 199,
    controls: int = 20,
    seed: int = 0,
) -> Probes:
    """Fits a ridge classifier for every layer and thought, and judges it on questions it has not seen.

    Each class is regressed on, and the largest value wins. The fit has a closed form, linear in the labels, so that
    control tasks and permutations cost a product of matrices each.

    Args:
      states: of each question's thoughts, from any number of layers (`coconut.analysis.traces.Trace.states`).
      present: the thoughts that each question has. A question without a ``k``-th thought counts for none of its probes.
      labels: of each question, from 0; -1 for a question without one, which counts nowhere.
      types: of each question, for the control task. It says something only where several questions share a type.
      folds: parts of the questions; each is predicted by a probe fitted on all others. A question is in the same part
        at every layer and thought.
      penalty: of the ridge, in units of the mean variance of the features times the number of rows.
      permutations: of the permutation test; the least p-value is 1 over one more.
      controls: random control tasks to average over.
      seed: of the parts, the permutations and the control tasks.

    Raises:
      CoconutError: a number is out of range, fewer than two labels occur, or no two questions share a type.
    """
    for name, value, least in (("folds", folds, 2), ("permutations", permutations, 1), ("controls", controls, 1)):
        if value < least:
            raise CoconutError(f"{name} = {value}: must be at least {least}")
    if not penalty > 0:
        raise CoconutError(f"penalty = {penalty}: must be positive")
    labelled = labels >= 0
    classes, target = np.unique(labels[labelled], return_inverse=True)
    if len(classes) < 2:
        raise CoconutError(f"labels: {len(classes)} different ones occur; a probe needs at least 2")
    known_types, kind = np.unique(types[labelled], return_inverse=True)
    if len(known_types) == len(target):
        raise CoconutError("types: no two questions share one, so that nothing of a control task can be learnt")
    rng = np.random.default_rng(seed)
    part = rng.permutation(len(target)) % folds
    control = np.stack([_control_labels(target, kind, rng) for _ in range(controls)])
    dealt = np.stack([rng.permutation(len(target)) for _ in range(permutations)])
    L, _, K, _ = states.shape
    found = np.full((5, L, K), np.nan)
    majority, number = np.full(K, np.nan), np.zeros(K, int)
    for place in range(K):
        here = present[labelled, place]
        own, number[place] = target[here], here.sum()
        if not here.any():
            continue
        majority[place] = np.bincount(own).max() / len(own)
        if len(np.unique(part[here])) < 2:
            continue
        # Dealt among those that have the thought: the others' order falls out.
        among = np.cumsum(here) - 1
        orders = among[[order[here[order]] for order in dealt]]
        tasks = np.concatenate([own[None], control[:, here], own[orders]])
        for layer in range(L):
            right = _predict(states[layer, labelled, place][here], tasks, part[here], len(classes), penalty) == tasks
            accuracy = right.mean(1)
            found[0, layer, place] = accuracy[0]
            found[1:3, layer, place] = wilson_interval(int(right[0].sum()), len(own))
            found[3, layer, place] = accuracy[1 : 1 + controls].mean()
            found[4, layer, place] = (1 + (accuracy[1 + controls :] >= accuracy[0]).sum()) / (1 + permutations)
    accuracy, low, high, of_control, p_value = found
    return Probes(accuracy, low, high, of_control, p_value, majority, number)


def _control_labels(target: Int[np.ndarray, " R"], kind: Int[np.ndarray, " R"], rng: np.random.Generator) -> np.ndarray:
    """A random label for each type, the labels as frequent as in ``target``, as nearly as whole types allow.

    Drawn one by one, the labels of a few types would often be frequent ones, and easier to guess than the real ones. So
    types in random order and labels in random order are laid side by side, each as long as it is frequent.
    """
    sizes, frequencies = np.bincount(kind), np.bincount(target)
    types, labels = rng.permutation(len(sizes)), rng.permutation(len(frequencies))
    middles = np.cumsum(sizes[types]) - sizes[types] / 2
    of_type = np.empty(len(sizes), int)
    of_type[types] = labels[np.searchsorted(np.cumsum(frequencies[labels]), middles)]
    return of_type[kind]


def _predict(
    features: Float[np.ndarray, "R D"],
    tasks: Int[np.ndarray, "S R"],
    part: Int[np.ndarray, " R"],
    classes: int,
    penalty: float,
) -> Int[np.ndarray, "S R"]:
    """What is predicted for each row by a classifier fitted on the other parts, for each of several labellings."""
    predicted = np.zeros(tasks.shape, int)
    for held_out in np.unique(part):
        test = part == held_out
        weights = ridge_weights(features[~test], features[test], penalty)
        targets = tasks[:, ~test, None] == np.arange(classes)
        predicted[:, test] = (weights @ targets).argmax(-1)
    return predicted


def ridge_weights(
    fitted: Float[np.ndarray, "R D"], asked: Float[np.ndarray, "A D"], penalty: float
) -> Float[np.ndarray, "A R"]:
    """What each fitted row's target counts in the ridge regression's prediction for each row that is asked.

    Features are centred on the fitted rows, and there is an intercept without a penalty.

    Args:
      fitted: features of the rows with targets.
      asked: features of the rows to be predicted.
      penalty: see `probe`.
    """
    mean = fitted.mean(0, dtype=np.float64)
    x, z = fitted - mean, asked - mean
    rows = len(x)
    gram = x @ x.T
    strength = penalty * np.trace(gram) / x.shape[1]
    if not strength:
        return np.full((len(z), rows), 1 / rows)  # All rows are alike: the mean of the targets.
    if rows <= x.shape[1]:
        slopes = np.linalg.solve(gram + strength * np.eye(rows), x @ z.T).T
    else:
        slopes = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), z.T).T @ x.T
    return slopes + 1 / rows
