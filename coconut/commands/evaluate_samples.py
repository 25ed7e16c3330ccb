"""``coconut evaluate --samples``: what several samples of each question are worth, and what they cost."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.sample_statistics import (
    SUBSETS,
    Choose,
    best,
    expected_largest,
    of_chosen,
    pass_at,
    sizes_up_to,
    vote,
)
from coconut.evaluation.samples import SCORERS, Sample, SampleConfig, SampleDrawing, first_finish
from coconut.evaluation.statistics import bootstrap_interval
from coconut.evaluation.subject import Subject
from coconut.latent.policies.config import PolicyConfig
from coconut.latent.scorer import LatentScorer, check_scored
from coconut.storage_path import StoragePath
from coconut.tokenizers import TokenizedExample
from coconut.training.config import to_json
from coconut.types import Example

CURVES = {
    "pass_at": "pass@n (an oracle's choice)",
    "majority": "majority",
    "first_finish": "first finish",
    "likelihood": "most likely",
}
"""The measures, and what they are called where they are shown."""
SCORER_CURVE = {"scorer": "best by scorer"}
"""The one there is with a latent scorer besides."""


def curves_in(content: Mapping[str, Any]) -> dict[str, str]:
    """The measures that the samples of an evaluation have, and what they are called."""
    return {**CURVES, **SCORER_CURVE} if content.get("scorer") is not None else dict(CURVES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Which samples are drawn, and what is measured of them.

    Attributes:
      count: samples of each question.
      policy: how thoughts are drawn.
      budgets: numbers of thoughts to draw them with (`SampleConfig.thoughts`); none for what was trained.
      pass_at: numbers of samples to measure besides 1, 2, 4, .. and all of them.
      scorer: workdir of a run that trained a scorer of thoughts (`RunConfig.scorer`), to choose the best sample by;
        None for no such choice.
      beams: with a scorer, also search with so many beams (`coconut.latent.beam_search`); None for not.
      candidates: thoughts drawn behind each beam.

    Raises:
      CoconutError: there is no sample, or fewer than are to be measured; or beams without a scorer or candidates, or a
        scorer with budgets, none of which it knows.
    """

    count: int
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    budgets: tuple[int, ...] = ()
    pass_at: tuple[int, ...] = ()
    scorer: StoragePath | None = None
    beams: int | None = None
    candidates: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CoconutError(f"--samples {self.count}: must be at least 1")
        sizes_up_to(self.count, self.pass_at)
        for flag in ("beams", "candidates"):
            value, other = getattr(self, flag), {"beams": "candidates", "candidates": "beams"}[flag]
            if value is None:
                continue
            if value < 1:
                raise CoconutError(f"--{flag} {value}: must be at least 1")
            if self.scorer is None:
                raise CoconutError(f"--{flag} {value}: beams are chosen by a scorer, give one: --scorer RUN")
            if getattr(self, other) is None:
                raise CoconutError(f"--{flag} {value}: needs --{other}")
        if self.scorer is not None:
            check_scored(self.policy, "--scorer")
            if self.budgets:
                raise CoconutError(f"--budgets {self.budgets}: a scorer knows the number of thoughts it was trained on")

    @property
    def sizes(self) -> list[int]:
        """Numbers of samples that are measured: as many as a beam search has candidates are among them, if drawn."""
        scored = (self.beams or 0) * (self.candidates or 0)
        return sizes_up_to(self.count, (*self.pass_at, *([scored] if 0 < scored <= self.count else [])))


def policy_from(values: Mapping[str, Any]) -> PolicyConfig:
    """The policy of some flags: what is no field of a `PolicyConfig` is an option of its kind.

    Raises:
      CoconutError: there is no such kind or option, or a value is out of range.
    """
    own = {name: value for name, value in values.items() if name in ("kind", "learnt_stop", "least")}
    return PolicyConfig(**own, options={name: value for name, value in values.items() if name not in own})


def plan_samples(
    subject: Subject,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    default: AnswerConfig,
    config: SamplesConfig,
    scorer: LatentScorer | None = None,
) -> dict[int | None, SampleDrawing]:
    """What is to be drawn, by its budget of thoughts; None for that of the training.

    Args:
      subject: who is asked.
      examples: the questions.
      tokenized: their ids.
      default: how questions are answered once.
      config: which samples.
      scorer: scores their thoughts, if given.

    Raises:
      CoconutError: see `SampleDrawing`; or blocks are to end in a way that samples do not know; or the scorer is named
        and not given.
    """
    if config.scorer is not None and scorer is None:
        raise CoconutError(f"--scorer {config.scorer}: belongs to a run's model, whose thoughts it was trained on")
    if default.halting is not None and not config.policy.learnt_stop:
        raise CoconutError(
            f"HaltingConfig.stop = {default.halting.stop!r}: the run ends its blocks so, and samples do not; give them "
            "--policy learnt_stop=True"
        )
    return {
        thoughts: SampleDrawing(
            subject,
            examples,
            tokenized,
            sample_config(default, config, count=config.count, thoughts=thoughts),
            scorer,
        )
        for thoughts in config.budgets or (None,)
    }


def sample_config(
    default: AnswerConfig, config: SamplesConfig, *, count: int, thoughts: int | None = None
) -> SampleConfig:
    """How ``count`` samples are drawn, of how questions are answered once and a budget of thoughts."""
    return SampleConfig(
        count=count,
        batch_size=default.batch_size,
        sampling=default.sampling,
        policy=config.policy,
        thoughts=thoughts,
        forced=default.forced,
        seed=default.seed,
    )


def measure_samples(
    drawings: Mapping[int | None, SampleDrawing],
    examples: Sequence[Example],
    default: AnswerConfig,
    config: SamplesConfig,
    advance: Callable[[int], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draws and measures.

    Args:
      drawings: what is drawn, by its budget.
      examples: the questions.
      default: how questions are answered once.
      config: what is measured.
      advance: called with the number of questions after each batch.

    Returns:
      Plain values: how samples were drawn, ``subsets`` that a measure of fewer than all samples is averaged over at
      most, and for each of ``budgets`` the ``curves`` and ``costs`` (`Measured`). And each sample as a line.
    """
    budgets, lines = [], []
    for thoughts, drawing in drawings.items():
        samples, seconds = drawing.draw(advance)
        curves, costs = measure(samples, config.sizes, seed=default.seed)
        costs |= {"seconds_per_question": seconds, "samples_at_once": drawing.rows}
        budgets.append({"thoughts": thoughts, "examples": len(samples), "curves": curves, "costs": costs})
        lines += sample_lines(samples, examples, setting="sample", budget=thoughts)
    content = {
        "count": config.count,
        "seed": default.seed,
        "policy": to_json(config.policy),
        "sampling": to_json(default.sampling),
        "forced": default.forced,
        "subsets": SUBSETS,
        "scorer": None if config.scorer is None else str(config.scorer),
        "budgets": budgets,
    }
    return content, lines


def sample_lines(
    samples: Sequence[Sequence[Sample]], examples: Sequence[Example], **where: Any
) -> list[dict[str, Any]]:
    """Each sample as plain values."""
    return [
        {
            **where,
            "question": examples[sample.example].question,
            "expected": examples[sample.example].answer,
            **dataclasses.asdict(sample),
        }
        for own in samples
        for sample in own
    ]


class Measured(NamedTuple):
    """What samples are worth, and what they cost.

    Attributes:
      curves: of each of `CURVES`, and of `SCORER_CURVE` where samples have scores, for each number of ``samples`` the
        ``accuracy`` over questions, its ``interval_95`` for other questions, ``passes`` one after the other until the
        choice can be made when all are drawn together, and ``all_passes``, those of all samples.
      costs: of one sample on average: ``passes`` one after the other, ``thoughts``, new ``tokens``, and the share that
        ``ended`` by themselves.
    """

    curves: dict[str, list[dict[str, Any]]]
    costs: dict[str, Any]


def measure(samples: Sequence[Sequence[Sample]], sizes: Sequence[int], *, seed: int = 0) -> Measured:
    """Measures samples.

    Args:
      samples: of each question, equally many.
      sizes: how many of them to measure.
      seed: of the subsets that a measure of fewer than all is averaged over.
    """
    table = lambda value: np.asarray([[value(sample) for sample in own] for own in samples])
    right, passes = table(lambda sample: sample.right), table(lambda sample: float(sample.passes))
    scores = {name: np.asarray([scorer(own) for own in samples], float) for name, scorer in SCORERS.items()}
    if samples[0][0].score is not None:
        scores["scorer"] = table(lambda sample: sample.score)
    answers = np.asarray([_numbered([sample.answer for sample in own]) for own in samples])
    choices: dict[str, tuple[np.ndarray, Choose]] = {"majority": (answers, vote)}
    choices |= {name: (score, best) for name, score in scores.items()}
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in (*CURVES, *scores.keys() - CURVES.keys())}
    for size in sizes:
        until_last = expected_largest(passes, size)
        chosen = {name: of_chosen(right, *how, size, seed=seed) for name, how in choices.items()}
        for name, of_questions in {"pass_at": pass_at(right, size), **chosen}.items():
            # Whoever takes the first one that finishes does not wait for the others.
            first = SCORERS.get(name) is first_finish
            waited = of_chosen(passes, *choices[name], size, seed=seed) if first else until_last
            scoring = float(name in SCORER_CURVE)  # A pass over the thoughts of all samples.
            curves[name].append(
                {
                    "samples": size,
                    "accuracy": float(of_questions.mean()),
                    "interval_95": list(bootstrap_interval(of_questions[None])),
                    "passes": float(waited.mean()) + scoring,
                    "all_passes": float(size * ((waited if first else passes).mean() + scoring)),
                }
            )
    costs = {
        "passes": float(passes.mean()),
        "thoughts": float(table(lambda sample: sample.thoughts).mean()),
        "tokens": float(table(lambda sample: sample.new_tokens).mean()),
        "ended": float(table(lambda sample: sample.ended).mean()),
    }
    return Measured(curves, costs)


def _numbered(answers: Sequence[str]) -> list[int]:
    """A number for each answer, the same for the same one; -1 for none."""
    numbers: dict[str, int] = {"": -1}
    return [numbers.setdefault(answer, len(numbers)) for answer in answers]


def sample_table(content: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Header and rows of the table of samples: a row for each budget and number of samples."""

    def share(point: Mapping[str, Any]) -> str:
        low, high = point["interval_95"]
        return f"{100 * point['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    rows, names = [], curves_in(content)
    for budget in content["budgets"]:
        for points in zip(*(budget["curves"][name] for name in names), strict=True):
            of_all, first = points[0], dict(zip(names, points, strict=True))["first_finish"]
            passes = f"{of_all['passes']:.1f} / {first['passes']:.1f}"
            rows.append([_budget_name(budget), str(of_all["samples"]), *map(share, points), passes])
    return ("thoughts", "samples", *names.values(), "passes, all / first"), rows


def sample_costs(content: Mapping[str, Any]) -> list[str]:
    """A line for each budget: what its samples cost."""
    lines = []
    for budget in content["budgets"]:
        costs = budget["costs"]
        lines.append(
            f"samples, thoughts {_budget_name(budget)}: one took {costs['passes']:.1f} passes one after the other, "
            f"{costs['thoughts']:.1f} thoughts and {costs['tokens']:.1f} tokens; a question with all "
            f"{content['count']} took {costs['seconds_per_question']:.3g} s, {costs['samples_at_once']} at once; "
            f"{100 * costs['ended']:.1f} % ended by themselves; {budget['examples']} questions"
        )
    return lines


def _budget_name(budget: Mapping[str, Any]) -> str:
    return "as trained" if budget["thoughts"] is None else str(budget["thoughts"])
