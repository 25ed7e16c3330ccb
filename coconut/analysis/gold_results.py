"""Whether a question's intermediate results can be read off its thoughts.

"Are latent reasoning models easily interpretable?" (arXiv 2604.04902) looks for the results of the written steps among
the most likely tokens of each thought. Here with a control: the results of another question. Tokens that are likely
whatever is asked are found as often there, and are no traces.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from coconut.analysis.intervals import Means, means_of_questions
from coconut.errors import CoconutError
from coconut.evaluation.evaluate import wilson_interval
from coconut.tokenizers import Tokenizer
from coconut.types import Example

Answers = Literal["all", "right", "wrong"]
Tokens = frozenset[int]
"""The tokens that a result may be written with; any of them is the result."""


def gold_results(example: Example) -> tuple[str, ...]:
    """The intermediate results of an example, in the order of its written steps.

    The rule: of a question with a graph, the last node that each step names; else what stands behind the last ``=`` of
    each step, up to a closing ``>``, with commas stripped. The last step is left out: it gives the answer, which a
    model about to answer may hold without having reasoned. A result that equals the answer is left out for the same
    reason, and so is one that was there before. A step with neither gives nothing.
    """
    found: list[str] = []
    for step in example.written_steps[:-1]:
        if example.graph is not None:
            named = [word for word in re.findall(r"\w+", step) if word in example.graph.symbols]
        else:
            named = [step.rpartition("=")[2].partition(">")[0].strip().replace(",", "")] if "=" in step else []
        if named and named[-1] and named[-1] != example.answer and named[-1] not in found:
            found.append(named[-1])
    return tuple(found)


def result_tokens(tokenizer: Tokenizer, results: Sequence[str]) -> tuple[Tokens, ...]:
    """The tokens of each result: alone or behind a space, where that is a single token.

    A result that is several tokens cannot be read off one thought. It has none, and is not counted.
    """
    spelled = [[tokenizer.encode(spelling) for spelling in (result, f" {result}")] for result in results]
    return tuple(frozenset(ids[0] for ids in both if len(ids) == 1) for both in spelled)


class Share(NamedTuple):
    """A share of questions.

    Attributes:
      share: NaN of no questions.
      low: lower end of Wilson's 95 % interval.
      high: its upper end.
      number: of how many questions.
    """

    share: float
    low: float
    high: float
    number: int


class Found(NamedTuple):
    """What was found among the top tokens of thoughts.

    Attributes:
      complete: questions all of whose results were found, each in some thought.
      results: the share of a question's results that were found in some thought, averaged over questions.
      by_thought: ``[K, J]``: the share of questions whose ``j``-th result is among the top tokens of their ``k``-th
        thought; of those that have both.
    """

    complete: Share
    results: Means
    by_thought: Means


class Traces(NamedTuple):
    """Results that were found, and how many are by chance.

    Attributes:
      own: the question's own results.
      control: those of another question that are not the question's own or its answer.
    """

    own: Found
    control: Found


def gold_traces(
    tops: Sequence[Int[np.ndarray, "_ _"]],
    golds: Sequence[Sequence[Tokens]],
    right: Bool[np.ndarray, " Q"],
    *,
    answers: Sequence[Tokens] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[Answers, Traces]:
    """Whether results are among the top tokens of thoughts, of questions answered right and wrong.

    A question counts that has a thought, and a result that is a single token. For the control, questions with results
    get those of one another, at random.

    Args:
      tops: of each question, the top tokens of each of its thoughts (`coconut.analysis.lens.top_tokens`).
      golds: of each question, the tokens of its results (`result_tokens` of `gold_results`).
      right: whether each question was answered right.
      answers: the tokens of each question's answer, which the control leaves out as its own results do.
      resamples: of the bootstrap.
      seed: of its draws, and of the control's.

    Raises:
      CoconutError: the arguments are not of the same questions, or there are none.
    """
    if not len(tops) == len(golds) == len(right) == len(golds if answers is None else answers):
        raise CoconutError(f"gold_traces: {len(tops)} questions' thoughts, {len(golds)} results, {len(right)} answers")
    if not len(tops):
        raise CoconutError("gold_traces: there are no questions")
    # A result that is not counted keeps its place: columns are those of steps.
    control: list[list[Tokens]] = [[] for _ in golds]
    order = np.random.default_rng(seed).permutation([index for index, gold in enumerate(golds) if any(gold)])
    if len(order) > 1:
        for index, other in zip(order, np.roll(order, 1), strict=True):
            known = frozenset().union(*golds[index], *(() if answers is None else (answers[index],)))
            control[index] = [frozenset() if tokens & known else tokens for tokens in golds[other]]
    among: dict[Answers, np.ndarray] = {"all": np.ones(len(right), bool), "right": right, "wrong": ~right}
    return {
        name: Traces(*(_found(tops, gold, counted, resamples, seed) for gold in (golds, control)))
        for name, counted in among.items()
    }


def _found(
    tops: Sequence[np.ndarray], golds: Sequence[Sequence[Tokens]], counted: np.ndarray, resamples: int, seed: int
) -> Found:
    most = max(map(len, tops)), max(map(len, golds))
    found = np.full((len(tops), *most), np.nan)
    for question, (top, gold) in enumerate(zip(tops, golds, strict=True)):
        if counted[question]:
            for index, tokens in ((index, tokens) for index, tokens in enumerate(gold) if tokens):
                found[question, : len(top), index] = np.isin(top, list(tokens)).any(-1)
    has = ~np.isnan(found)
    anywhere = np.where(has, found, 0.0).max(1, initial=0.0)
    results = has.any(1)
    with np.errstate(invalid="ignore"):
        shares = (anywhere * results).sum(1) / results.sum(1)
    number, complete = int(np.isfinite(shares).sum()), int((shares == 1.0).sum())
    interval = wilson_interval(complete, number) if number else (np.nan, np.nan)
    share = Share(complete / number if number else np.nan, *interval, number)
    return Found(share, *(means_of_questions(values, resamples=resamples, seed=seed) for values in (shares, found)))
