"""What becomes of a model's answers if some of its thoughts are replaced, left out, or thought on.

`coconut.evaluation.interventions` says how thoughts are altered; here is what that does: to the answers, to the
probability of the right one, to what would be written next, and to the thoughts behind. An effect is measured on the
questions that *have* the thoughts it is about, and says how many these are. A figure that divides by all questions
shows a cliff at the first thought that most of them lack, whatever the model does.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coconut.analysis.intervals import means_of_questions
from coconut.batching import Shape, align, page_shape
from coconut.errors import CoconutError, NotFiniteError, check_fields
from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions, thoughts_of_questions
from coconut.evaluation.evaluate import wilson_interval
from coconut.evaluation.interventions import (
    ALTERATIONS,
    REMOVED,
    Alter,
    Surroundings,
    at_thoughts,
    check_interventions,
    mean_thoughts,
)
from coconut.evaluation.reading import given_pages, latent_columns, pages_for_inputs, place_inputs, teacher_forced
from coconut.evaluation.statistics import mcnemar
from coconut.evaluation.subject import Subject
from coconut.latent.thinkers import OneByOne, Thinker
from coconut.losses import scored_columns, token_losses
from coconut.model import Model
from coconut.models.decoder import Decoder
from coconut.pages import Page, Text, Thoughts
from coconut.sharding import replicate
from coconut.types import IGNORED_LABEL, Batch, Example

Later = Literal["kept", "made again"]


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervention:
    """What is done to which thoughts.

    Attributes:
      kind: one of `ALTERATIONS`; or ``removed``, which leaves no columns behind. With ``alter`` only a name.
      thoughts: numbers of the thoughts it is done to, the first one is 1; None for all. It applies to questions that
        have all of them, and one more where those behind are made again.
      later: whether thoughts behind the last of these stay as they were (``kept``: what follows reads one altered
        thought), or are ``made again`` of what is altered (the intervention runs on through the chain).
      forced: whether the answer is forced behind the thoughts, as it is for ``removed`` in any case. ``intact`` and
        forced is what other forced answers are to be compared with.
      alter: an alteration of one's own.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    kind: str
    thoughts: tuple[int, ...] | None = None
    later: Later = "kept"
    forced: bool = False
    alter: Alter | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.alter is None:
            check_interventions([self.kind])
        if self.thoughts is not None and (not self.thoughts or list(self.thoughts) != sorted({*self.thoughts, 0})[1:]):
            raise CoconutError(f"Intervention.thoughts = {self.thoughts!r}: must be numbers from 1 on, in their order")
        if self.later == "made again" and (self.thoughts is None or self.kind == REMOVED):
            what = "thoughts = None" if self.thoughts is None else f"kind = {self.kind!r}"
            raise CoconutError(f"Intervention.later = 'made again': {what} leaves none behind that could be made again")

    @property
    def label(self) -> str:
        """In a few words."""
        again = ", later made again" if self.later == "made again" else ""
        return f"{self.kind} ({self.which}{again})" + ", answer forced" * (self.forced and self.kind != REMOVED)

    @property
    def which(self) -> str:
        """The thoughts, in a few characters."""
        if self.thoughts is None:
            return "all"
        first, last = self.thoughts[0], self.thoughts[-1]
        in_a_row = len(self.thoughts) == last - first + 1
        return f"{first}-{last}" if in_a_row and last > first else ", ".join(map(str, self.thoughts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberOfThoughts:
    """Another number of the model's own thoughts, with the answer forced: stopped early, or sent on behind its last.

    Attributes:
      count: how many.
      beyond: whether it applies to questions that have fewer thoughts, which are sent on; else to those that have more,
        which are stopped.
    """

    count: int
    beyond: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise CoconutError(f"NumberOfThoughts.count = {self.count!r}: must be at least 0")

    @property
    def label(self) -> str:
        """In a few words."""
        many = f"{self.count} thought{'s' * (self.count != 1)}"
        return f"sent on to {many}" if self.beyond else f"stopped after {many}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """What an intervention does, on the questions that it applies to. Intervals hold 95 %.

    Attributes:
      label: which intervention.
      kind: of what kind.
      thoughts: which thoughts, in words.
      later: what became of those behind.
      forced: whether the answer was forced behind the thoughts, as it is where their number is another one: the model
        cannot fall back on writing the steps.
      examples: number of questions.
      accuracy_before: share of right answers of these questions as the model was trained.
      accuracy: and under the intervention.
      accuracy_interval: Wilson's.
      flips: share of questions with another answer than before, right or wrong.
      flips_interval: Wilson's.
      to_wrong: questions that were right before.
      to_right: questions that are right only now.
      p_value: McNemar's exact test of these two.
      log_probability_change: of the right answer's own tokens, straight behind the thoughts, nats; mean.
      log_probability_interval: bootstrap over questions.
      kl: Kullback-Leibler divergence, in nats, of the distribution of each own token of the right answer behind those
        before it, before against after; mean over these tokens, then over questions.
      kl_interval: bootstrap over questions.
      kl_of_later_thoughts: of the tokens that thoughts made again stand for, as they are fed, through the model's own
        head, mean over these thoughts and then over the same questions; None where none were.
    """

    label: str
    kind: str
    thoughts: str
    later: str
    forced: bool
    examples: int
    accuracy_before: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    flips: float
    flips_interval: tuple[float, float]
    to_wrong: int
    to_right: int
    p_value: float
    log_probability_change: float
    log_probability_interval: tuple[float, float]
    kl: float
    kl_interval: tuple[float, float]
    kl_of_later_thoughts: float | None


class Outcome(NamedTuple):
    """An intervention question by question; None for questions that it does not apply to.

    Attributes:
      intervention: which.
      texts: what was written.
      right: whether that is the right answer.
      flipped: whether it is another answer than before.
      effect: over all; None where it applies to no question.
    """

    intervention: Intervention | NumberOfThoughts
    texts: list[str | None]
    right: list[bool | None]
    flipped: list[bool | None]
    effect: Effect | None


class Intervened(NamedTuple):
    """A model before and under interventions.

    Attributes:
      answers: before.
      right: whether they are.
      thoughts: ``[K, D]`` of each question.
      outcomes: of each intervention, in order.
    """

    answers: list[Answer]
    right: list[bool]
    thoughts: list[np.ndarray]
    outcomes: list[Outcome]


def intervene(
    subject: Subject,
    examples: Sequence[Example],
    config: AnswerConfig,
    interventions: Sequence[Intervention | NumberOfThoughts],
    *,
    averaged: Sequence[Example] = (),
    seed: int = 0,
    advance: Callable[[int], None] = lambda rows: None,
) -> Intervened:
    """Answers all questions, and once more under each intervention.

    Args:
      subject: the model, and how it is asked.
      examples: the questions.
      config: how they are answered.
      interventions: what is done.
      averaged: questions whose thoughts give the mean that ``mean`` and ``mean_of_all`` put in the place of others:
        those of another split.
      seed: of what interventions draw.
      advance: called with the number of rows after each batch that is answered.

    Raises:
      CoconutError: there are no questions, or one has several blocks of thoughts; the method feeds no thoughts back, or
        ends its blocks itself; a mean is asked for without questions to take it from; or thoughts that are made
        together are to be made again.
      NotFiniteError: the model gives numbers that are not finite.
    """
    if not examples:
        raise CoconutError("there are no questions to intervene on")
    if config.halting is not None or config.soft_thinking is not None or subject.method.ends_blocks:
        raise CoconutError(f"the method {subject.method.name!r} ends its thoughts itself: which of them are given?")
    if not subject.method.feeds_back(subject.placing.options):
        raise CoconutError(
            f"the method {subject.method.name!r} feeds no thoughts back: there is nothing to intervene on"
        )
    think = subject.method.think(subject.placing.options)
    again = [one.label for one in interventions if isinstance(one, Intervention) and one.later == "made again"]
    if again and not isinstance(think, OneByOne):
        raise CoconutError(f"{again[0]}: {think} makes all thoughts together, so that none are made behind others")
    own = [one for one in interventions if isinstance(one, Intervention) and one.alter is None]
    means = [one.kind for one in own if one.kind in ("mean", "mean_of_all")]
    if means and not averaged:
        raise CoconutError(f"{means[0]!r}: there are no questions to take the mean thought from")
    experiment = _Experiment(subject, examples, config, advance)
    mean = None
    if means:
        tokenized = [subject.tokenize(example) for example in averaged]
        mean = mean_thoughts(thoughts_of_questions(*subject.asked, tokenized, config))
    surroundings = Surroundings(questions=[example.question for example in examples], mean=mean, seed=seed)
    outcomes = [experiment.run(one, surroundings) for one in interventions]
    return Intervened(experiment.before, experiment.right.tolist(), experiment.thoughts, outcomes)


class _Experiment:
    """The questions with their answers, thoughts and predictions as the model was trained."""

    def __init__(
        self, subject: Subject, examples: Sequence[Example], config: AnswerConfig, advance: Callable[[int], None]
    ):
        self.subject, self.examples, self.config, self.advance = subject, examples, config, advance
        self.tokenized = [subject.tokenize(example) for example in examples]
        self.pages = given_pages(subject.method, subject.placing, self.tokenized)
        blocks = [sum(isinstance(part, Thoughts) for part in page) for page in self.pages]
        if max(blocks) > 1:
            raise CoconutError(f"question {int(np.argmax(blocks))} has {max(blocks)} blocks of thoughts: must be one")
        self.thoughts = thoughts_of_questions(*subject.asked, self.tokenized, config)
        self.before, self.right = self._answer(self.thoughts, config)
        self.said = [self._extract(answer) for answer in self.before]
        self.predictors = self._predict(self.thoughts)

    def run(self, intervention: Intervention | NumberOfThoughts, surroundings: Surroundings) -> Outcome:
        """One intervention."""
        found = self._altered(intervention, surroundings)
        counted = np.asarray([new is not None for new in found])
        if not counted.any():
            nobody: list[None] = [None] * len(found)
            return Outcome(intervention, [*nobody], [*nobody], [*nobody], None)
        # The others are asked as ever: a question's neighbours in a batch stay what they were.
        inputs = [own if new is None else new for own, new in zip(self.thoughts, found, strict=True)]
        forced = isinstance(intervention, NumberOfThoughts) or intervention.forced or _leaves_no_columns(intervention)
        prefix = self.subject.text_format.answer_prefix.strip()
        config = dataclasses.replace(self.config, forced=prefix) if forced else self.config
        answers, right = self._answer(inputs, config)
        flipped = np.asarray([self._extract(one) != said for one, said in zip(answers, self.said, strict=True)])
        change, kl = self._compare(self._predict(inputs))
        later = None
        if isinstance(intervention, Intervention) and intervention.later == "made again":
            assert intervention.thoughts is not None
            later = self._kl_of_thoughts(inputs, intervention.thoughts[-1], counted)
        means = means_of_questions(np.stack([change, kl], 1)[counted])
        versus = mcnemar(self.right[counted], right[counted])
        number, correct, flips = int(counted.sum()), int(right[counted].sum()), int(flipped[counted].sum())
        effect = Effect(
            label=intervention.label,
            kind=intervention.kind if isinstance(intervention, Intervention) else "number",
            thoughts=intervention.which if isinstance(intervention, Intervention) else str(intervention.count),
            later=intervention.later if isinstance(intervention, Intervention) else "made again",
            forced=forced,
            examples=number,
            accuracy_before=float(self.right[counted].mean()),
            accuracy=correct / number,
            accuracy_interval=wilson_interval(correct, number),
            flips=flips / number,
            flips_interval=wilson_interval(flips, number),
            to_wrong=versus.first_only,
            to_right=versus.second_only,
            p_value=versus.p_value,
            log_probability_change=float(means.mean[0]),
            log_probability_interval=(float(means.low[0]), float(means.high[0])),
            kl=float(means.mean[1]),
            kl_interval=(float(means.low[1]), float(means.high[1])),
            kl_of_later_thoughts=later,
        )
        applies = lambda values: [value if one else None for value, one in zip(values, counted, strict=True)]
        texts = [answer.text for answer in answers]
        return Outcome(intervention, applies(texts), applies(right.tolist()), applies(flipped.tolist()), effect)

    def _altered(
        self, intervention: Intervention | NumberOfThoughts, surroundings: Surroundings
    ) -> list[np.ndarray | None]:
        """What is run in the place of each question's thoughts."""
        if isinstance(intervention, NumberOfThoughts):
            count = intervention.count
            config = dataclasses.replace(self.config, thoughts=count)
            made = thoughts_of_questions(*self.subject.asked, self.tokenized, config) if count else self.thoughts
            return [
                new[:count] if (len(own) < count if intervention.beyond else len(own) > count) and len(own) else None
                for own, new in zip(self.thoughts, made, strict=True)
            ]
        chosen = intervention.thoughts
        if _leaves_no_columns(intervention):
            return [_removed(own, chosen) for own in self.thoughts]
        alter = intervention.alter or ALTERATIONS[intervention.kind]
        found = (alter if chosen is None else at_thoughts(alter, chosen))(self.thoughts, surroundings)
        if intervention.later == "kept":
            return found
        assert chosen is not None
        # Where none is behind, none is made again.
        found = [new if len(own) > chosen[-1] else None for own, new in zip(self.thoughts, found, strict=True)]
        given = [own[:0] if new is None else new[: chosen[-1]] for own, new in zip(self.thoughts, found, strict=True)]
        made = thoughts_of_questions(*self.subject.asked, self.tokenized, self.config, given=given)
        return [None if new is None else again for new, again in zip(found, made, strict=True)]

    def _answer(self, inputs: Sequence[np.ndarray], config: AnswerConfig) -> tuple[list[Answer], Bool[np.ndarray, "N"]]:
        answers = list(
            answer_questions(*self.subject.asked, self.tokenized, config, inputs=inputs, advance=self.advance)
        )
        check = self.subject.task.check
        return answers, np.asarray([check(x.text, example) for x, example in zip(answers, self.examples, strict=True)])

    def _extract(self, answer: Answer) -> str:
        task = self.subject.task
        return task.normalize_answer(task.extract_answer(answer.text))

    def _predict(self, inputs: Sequence[np.ndarray]) -> "list[_Prediction]":
        """What predicts the right answer, straight behind the thoughts, batch by batch."""
        pages: list[Page] = [
            (*page, Text(example.answer, True, 0, True))
            for page, example in zip(pages_for_inputs(self.pages, inputs), self.tokenized, strict=True)
        ]
        # One shape for all interventions that have no more thoughts than the model.
        whole = [(*page, Text(example.answer, True)) for page, example in zip(self.pages, self.tokenized, strict=True)]
        shape = page_shape([*pages, *whole])
        size = self.config.batch_size
        return [
            self._predict_batch(pages[start : start + size], inputs[start : start + size], shape)
            for start in range(0, len(pages), size)
        ]

    def _predict_batch(self, pages: Sequence[Page], inputs: Sequence[np.ndarray], shape: Shape) -> "_Prediction":
        subject = self.subject
        model, tokenizer, method, placing = subject.asked
        rows: list[Page | None] = [*pages, *[None] * (self.config.batch_size - len(pages))]
        batch = align(
            rows,
            shape,
            pad_id=tokenizer.eos_id,
            latent_id=tokenizer.latent_id,
            feeds_back=method.feeds_back(placing.options),
        )
        placed = place_inputs(batch, inputs) if latent_columns(batch).any() else None
        found = _predict_scored(model, batch, placed, method.think(placing.options))
        return _Prediction(*(np.asarray(array) for array in found))

    def _compare(self, after: "list[_Prediction]") -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
        """Of each question the change of the right answer's log-probability, and the divergence at its tokens."""
        changes, divergences = [], []
        for before, now in zip(self.predictors, after, strict=True):
            found = _compare_predictions(self.subject.model.decoder, before.hidden, now.hidden, now.labels)
            old, new, kl = (np.asarray(array) for array in found)
            is_label = now.labels != IGNORED_LABEL
            # The prefix of an answer is a matter of form.
            number = np.cumsum(is_label, axis=1) - 1
            prefixes = np.zeros((len(is_label), 1), int)
            own = self.tokenized[len(changes) * self.config.batch_size :][: len(is_label)]
            prefixes[: len(own), 0] = [example.answer_prefix for example in own]
            is_own = is_label & (number >= prefixes)
            changes.append(((new - old) * is_own).sum(1))
            # Rows that only fill the batch have none.
            divergences.append((kl * is_own).sum(1) / np.maximum(is_own.sum(1), 1))
        change, kl = (np.concatenate(parts)[: len(self.examples)] for parts in (changes, divergences))
        if not (np.isfinite(change).all() and np.isfinite(kl).all()):
            raise NotFiniteError("the probability of an answer is not finite: the model is broken")
        return change, kl

    def _kl_of_thoughts(
        self, inputs: Sequence[np.ndarray], behind: int, counted: Bool[np.ndarray, "N"]
    ) -> float | None:
        """How much the later thoughts stand for other tokens."""
        means = []
        for own, new, one in zip(self.thoughts, inputs, counted, strict=True):
            if one and len(own) > behind:
                kl = _divergence_of_thoughts(self.subject.model.decoder, own[behind:], new[behind:])
                means.append(float(np.asarray(kl).mean()))
        return float(np.mean(means)) if means else None


class _Prediction(NamedTuple):
    """What predicts the scored columns of a batch.

    Attributes:
      hidden: hidden states.
      labels: what they should predict.
    """

    hidden: Float[np.ndarray, "B S D"]
    labels: Int[np.ndarray, "B S"]


def _leaves_no_columns(intervention: Intervention) -> bool:
    return intervention.kind == REMOVED and intervention.alter is None


def _removed(own: np.ndarray, numbers: Sequence[int] | None) -> np.ndarray | None:
    if numbers is None:
        return own[:0] if len(own) else None
    return np.delete(own, [number - 1 for number in numbers], axis=0) if len(own) >= max(numbers) else None


@functools.partial(jax.jit, static_argnames="think")
def _predict_scored(
    model: Model, batch: Batch, inputs: Float[Array, "B L D"] | None, think: Thinker
) -> tuple[Float[Array, "B S D"], Int[Array, "B S"]]:
    """What predicts the scored columns of a batch, and their labels."""
    return replicate((teacher_forced(model, batch, inputs, think), scored_columns(batch.labels, batch.schedule)))


@jax.jit
def _compare_predictions(
    decoder: Decoder, before: Float[Array, "B S D"], after: Float[Array, "B S D"], labels: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Float[Array, "B S"], Float[Array, "B S"]]:
    """Log-probabilities of the labels, before and after, and the divergence of the two distributions."""
    logits = [decoder.unembed(hidden) for hidden in (before, after)]
    return replicate((-token_losses(logits[0], labels), -token_losses(logits[1], labels), _divergence(*logits)))


@jax.jit
def _divergence_of_thoughts(
    decoder: Decoder, before: Float[Array, "K D"], after: Float[Array, "K D"]
) -> Float[Array, " K"]:
    return replicate(_divergence(decoder.unembed(before), decoder.unembed(after)))


def _divergence(before: Float[Array, "*B V"], after: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Kullback-Leibler divergence of two distributions, given by logits."""
    first, second = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    return (jnp.exp(first) * (first - second)).sum(-1)
