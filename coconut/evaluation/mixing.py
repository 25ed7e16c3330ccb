"""Which of several trained vectors answers a question, or how they are mixed (Transformer-squared, Sun et al. 2025).

Two of the paper's ways: a classifier looks at each question, as the decoder without vectors reads it, and picks a
vector; or the cross-entropy method looks for the weights by which a mixture of all answers a few questions best.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int

from coconut.errors import CoconutError, check_fields
from coconut.latent.generate import prefill
from coconut.models.decoder import Decoder

Worth = tuple[float, float]
"""How good a mixture is: its accuracy, and what decides between equals. Larger is better."""


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """The cross-entropy method (Rubinstein 1999) over weights between 0 and 1, with the published code's numbers.

    Attributes:
      population: weights tried at a time; of the first time all are drawn evenly between 0 and 1.
      elites: the best of them, whose mean and deviation the next ones are drawn with.
      iterations: times, at most: it ends where all elites agree.
      seed: of the draws.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    population: int = 32
    elites: int = 6
    iterations: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for field, least in (("population", 2), ("elites", 1), ("iterations", 1)):
            if getattr(self, field) < least:
                raise CoconutError(f"CrossEntropyConfig.{field} = {getattr(self, field)!r}: must be at least {least}")
        if self.elites >= self.population:
            raise CoconutError(f"CrossEntropyConfig.elites = {self.elites!r}: must be below the population")


class Found(NamedTuple):
    """What the cross-entropy method found.

    Attributes:
      weights: the best of all that were tried.
      score: theirs.
      history: the best score after each iteration.
      tried: how many weights were scored.
    """

    weights: Float[np.ndarray, " W"]
    score: Worth
    history: tuple[Worth, ...]
    tried: int


def cross_entropy_search(
    score: Callable[[Float[np.ndarray, " W"]], Worth],
    start: Float[np.ndarray, " W"],
    config: CrossEntropyConfig = CrossEntropyConfig(),
    *,
    advance: Callable[[int], None] = lambda rows: None,
) -> Found:
    """Looks for the weights of the highest score.

    Args:
      score: of some weights; the same each time it is asked.
      start: tried first, and always kept among the elites until something better is found.
      config: how to look.
      advance: called with 1 after each score.
    """
    rng, best, scored = np.random.default_rng(config.seed), start, score(start)
    advance(1)
    history, tried = [], 1
    mean, deviation = start, np.full(len(start), np.inf)
    for _ in range(config.iterations):
        shape = (config.population - 1, len(start))
        drawn = rng.uniform(size=shape) if not history else np.clip(rng.normal(mean, deviation, shape), 0.0, 1.0)
        scores = [scored]
        for weights in drawn:
            scores.append(score(weights))
            advance(1)
        tried += len(drawn)
        every = np.concatenate([best[None], drawn])
        order = sorted(range(len(every)), key=lambda index: scores[index], reverse=True)
        best, scored = every[order[0]], scores[order[0]]
        elites = every[order[: config.elites]]
        mean, deviation = elites.mean(0), elites.std(0)
        history.append(scored)
        if deviation.max() < 1e-3:
            break
    return Found(best, scored, tuple(history), tried)


def question_states(
    decoder: Decoder, questions: Sequence[Int[np.ndarray, " _"]], *, batch_size: int = 64, pad_id: int = 0
) -> Float[np.ndarray, "Q D"]:
    """The state with which a decoder ends each question."""
    columns, found = max(map(len, questions)), []
    for start in range(0, len(questions), batch_size):
        here = questions[start : start + batch_size]
        tokens = np.full((batch_size, columns), pad_id, np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(here):
            tokens[row, columns - len(ids) :], valid[row, columns - len(ids) :] = ids, True
        valid[len(here) :, -1] = True  # so that a row that only fills the batch has something to see
        found.append(np.asarray(prefill(decoder, tokens, valid).last, np.float32)[: len(here)])
    return np.concatenate(found)


class QuestionClassifier(NamedTuple):
    """Says to which of several kinds a question is nearest: to whose mean, in units of the deviation within kinds.

    Attributes:
      means: of each kind.
      deviation: of each feature around the mean of its kind.
    """

    means: Float[np.ndarray, "K D"]
    deviation: Float[np.ndarray, " D"]

    @classmethod
    def fitted(cls, kinds: Sequence[Float[np.ndarray, "_ D"]]) -> "QuestionClassifier":
        """Of the states of some questions of each kind."""
        means = np.stack([states.mean(0) for states in kinds])
        around = np.concatenate([states - mean for states, mean in zip(kinds, means, strict=True)])
        return cls(means, np.sqrt((around**2).mean(0)) + 1e-6)

    def __call__(self, states: Float[np.ndarray, "Q D"]) -> Int[np.ndarray, " Q"]:
        """The kind of each question."""
        away = (states[:, None] - self.means) / self.deviation
        return np.argmin((away**2).sum(-1), -1)


def check_mixable(names: Sequence[str], parameters: Sequence[dict[str, Any]]) -> None:
    """Looks whether several models differ by their vectors alone.

    Raises:
      CoconutError: one has another parameter; the message names it.
    """
    first = parameters[0]
    if not any(name.endswith(".singular_z") for name in first):
        raise CoconutError(f"{names[0]}: its run trained no vectors of singular values (SingularValueConfig)")
    for where, own in zip(names[1:], parameters[1:], strict=True):
        if own.keys() != first.keys():
            other = sorted(own.keys() ^ first.keys())[0]
            raise CoconutError(f"{where}: parameter {other} is in one of it and {names[0]} alone: they are not alike")
        for name, value in own.items():
            same = value.shape == first[name].shape
            if name.endswith(".singular_z") and same:
                continue
            if not same or not bool((value == first[name]).all()):
                factor = name.rpartition(".")[2] in ("singular_u", "singular_s", "singular_v")
                why = (
                    "start both runs from one that has these vectors (RunConfig.init_from)"
                    if factor
                    else ("vectors can be mixed where they are all that runs from one start have trained")
                )
                raise CoconutError(f"{where}: parameter {name} is not that of {names[0]}; {why}")
