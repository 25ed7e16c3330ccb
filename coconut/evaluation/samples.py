"""Several samples of each question: thoughts drawn by a policy, answers by a temperature, and scores of them.

Each question is read once for a batch of its samples. The draws of a sample depend on the seed, its question's index
and its own number alone, so the first ``n`` samples are the same however many follow, and whatever a batch holds.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from coconut.batching import align, page_shape
from coconut.errors import CoconutError, NotFiniteError, check_fields
from coconut.evaluation.reading import given_pages
from coconut.evaluation.subject import Subject
from coconut.latent.generate import SamplingConfig
from coconut.latent.policies.config import PolicyConfig, make_policy
from coconut.latent.policies.policy import DrawingPolicy
from coconut.latent.sampling import Sampler, Written
from coconut.latent.scorer import LatentScorer, block_columns, check_scored
from coconut.models.decoder import Decoder
from coconut.pages import Page, Text, count_thoughts
from coconut.sharding import replicate
from coconut.tokenizers import TokenizedExample
from coconut.types import Batch, Example


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How samples are drawn.

    Attributes:
      count: samples of each question.
      batch_size: samples drawn together, of several questions where they fit.
      sampling: how tokens are drawn.
      policy: how thoughts are drawn.
      thoughts: the budget of each question's block; None for what the stage was trained with. Where the policy has a
        ``learnt_stop`` the stop head ends the block between ``PolicyConfig.least`` thoughts and this; elsewhere it is
        ended behind exactly so many. Coconut's authors warn that more thoughts than were trained make it worse.
      forced: text that each sample goes on from behind its thoughts.
      seed: of the draws.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    count: int
    batch_size: int = 64
    sampling: SamplingConfig = dataclasses.field(default_factory=lambda: SamplingConfig(temperature=1.0))
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    thoughts: int | None = None
    forced: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("count", "batch_size"):
            if getattr(self, field) < 1:
                raise CoconutError(f"SampleConfig.{field} = {getattr(self, field)!r}: must be at least 1")
        if self.thoughts is not None and not 0 <= self.policy.least <= self.thoughts:
            raise CoconutError(
                f"SampleConfig.thoughts = {self.thoughts!r}: must be None or at least PolicyConfig.least = "
                f"{self.policy.least}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of a question.

    Attributes:
      example: index of its question.
      number: its own among those of the question, from 0.
      text: forced beginning and generated text, without EOS.
      answer: the answer extracted from it and normalised; empty where there is none.
      right: whether the task takes it for the right one.
      thoughts: thoughts, or pause tokens.
      new_tokens: tokens of ``text``, the forced ones included.
      drawn_tokens: tokens that were drawn, EOS included.
      passes: passes of the decoder that had to wait for each other, as in `coconut.evaluation.answers.Answer`.
      log_probs: log-probability of all draws of a kind, in nats: ``tokens``, and ``thoughts`` and ``stops`` where the
        policy draws these (`coconut.latent.sampling`).
      ended: whether it ended by itself, by EOS.
      score: sum of a latent scorer's scores of its thoughts; None without one.
    """

    example: int
    number: int
    text: str
    answer: str
    right: bool
    thoughts: int
    new_tokens: int
    drawn_tokens: int
    passes: int
    log_probs: Mapping[str, float]
    ended: bool
    score: float | None = None


class Scorer(Protocol):
    """Gives each sample of a question a score; the highest one is chosen, the first of equals."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float]:
        """The scores of all samples of one question, in their order."""
        ...


def likelihood(samples: Sequence[Sample]) -> list[float]:
    """The mean log-probability of a sample's tokens, EOS included, at the temperature they were drawn with."""
    return [sample.log_probs["tokens"] / sample.drawn_tokens for sample in samples]


def first_finish(samples: Sequence[Sample]) -> list[float]:
    """The fewer passes one after the other, the better (first-finish search, arXiv 2505.18149).

    Samples that are drawn together finish in this order. One that was cut off at its limit has not finished.
    """
    return [-float(sample.passes) if sample.ended else -math.inf for sample in samples]


SCORERS: Mapping[str, Scorer] = MappingProxyType({"first_finish": first_finish, "likelihood": likelihood})
"""Scores by name that need no training."""


class Drawn(NamedTuple):
    """The samples of some questions.

    Attributes:
      samples: of each question, in the order of their numbers.
      seconds: of a question with all of its samples; compilation is not in it.
    """

    samples: list[list[Sample]]
    seconds: float


class DrawnTogether(NamedTuple):
    """What a program draws.

    Attributes:
      written: what the host reads of the samples.
      log_probs: of all draws of a kind.
      scores: of their thoughts; None without a scorer.
    """

    written: Written
    log_probs: dict[str, Any]
    scores: Any


class SampleDrawing:
    """Samples that can be drawn: what cannot be is refused when this is made, before any work.

    Args:
      subject: the model, and how it is asked.
      examples: the questions.
      tokenized: their ids.
      config: how samples are drawn.
      scorer: scores the thoughts of each sample, if given.

    Raises:
      CoconutError: there are no questions, or they have no place for the thoughts; the method has several blocks, or
        ends and opens blocks by itself; the policy does not fit the model, or nothing is drawn at all; a row is longer
        than the model's positions; or the scorer's scores of samples could not be compared.
    """

    def __init__(
        self,
        subject: Subject,
        examples: Sequence[Example],
        tokenized: Sequence[TokenizedExample],
        config: SampleConfig,
        scorer: LatentScorer | None = None,
    ):
        self._subject, self._examples, self._config, self._scorer = subject, examples, config, scorer
        if not examples:
            raise CoconutError("there are no questions to draw samples of: the split is empty")
        method, placing, tokenizer = subject.method, subject.placing, subject.tokenizer
        self._think = method.think(placing.options)
        self._forced = tokenizer.encode(config.forced)
        pages = given_pages(method, placing, tokenized, config.thoughts)
        self._pages: list[Page] = [(*page, Text(np.asarray(self._forced, np.int32))) for page in pages]
        self._shape = page_shape(self._pages)
        self._feeds_back = method.feeds_back(placing.options)
        self._check()
        self._group, self._questions = self._sizes()
        # Tracing finds what the sampler refuses.
        self._lowered = jax.jit(self._draw).lower(*self._arguments(0, 0))

    def _sizes(self) -> tuple[int, int]:
        """Samples of a question, and questions, that are drawn together."""
        # As many calls for a question as a batch's size asks for, and no more rows than they need.
        count, batch_size = self._config.count, self._config.batch_size
        group = -(-count // -(-count // batch_size))
        return group, min(max(batch_size // group, 1), len(self._examples))

    def _check(self) -> None:
        config, method, placing = self._config, self._subject.method, self._subject.placing
        policy = config.policy
        if self._scorer is not None:
            check_scored(policy, "SampleConfig.policy")
            if config.thoughts is not None:
                what = f"SampleConfig.thoughts = {config.thoughts!r}"
                raise CoconutError(f"{what}: a scorer knows the number of thoughts it was trained on")
        blocks = sum(map(bool, self._shape.thoughts)) if self._feeds_back else 0
        if blocks > 1:
            raise CoconutError(
                f"SampleConfig.policy: the method {method.name!r} writes {blocks} blocks of thoughts before an answer, "
                "samples are drawn with one at most"
            )
        columns = self._shape.columns + config.sampling.max_new_tokens
        if columns > (most := self._subject.model.decoder.config.max_positions):
            raise CoconutError(
                f"DecoderConfig.max_positions = {most}: what is given of a question, its thoughts and "
                f"{config.sampling.max_new_tokens} new tokens need {columns}"
            )
        fixed = policy.learnt_stop or (method.ends_blocks and config.thoughts is not None)
        if method.halting(placing) is not None and not fixed:
            raise CoconutError(
                f"PolicyConfig.learnt_stop = False: the method {method.name!r} opens or ends blocks by itself; samples "
                "know its stop head alone (learnt_stop = True), or where it has one block a number of thoughts"
            )
        if not blocks and config.thoughts != 0 and (policy.kind != "deterministic" or policy.learnt_stop):
            raise CoconutError(
                f"PolicyConfig.kind = {policy.kind!r}, learnt_stop = {policy.learnt_stop}: the method {method.name!r} "
                f"makes no thoughts of its own at stage {placing.stage}"
            )
        draws_thoughts = blocks and (policy.kind != "deterministic" or policy.learnt_stop)
        if config.count > 1 and config.sampling.temperature == 0 and not draws_thoughts:
            where = "" if config.thoughts is None else f" with {config.thoughts} thoughts"
            raise CoconutError(
                f"SamplingConfig.temperature = 0: PolicyConfig.kind = {policy.kind!r} draws nothing either{where}, so "
                "that all samples of a question were the same"
            )

    @property
    def rows(self) -> int:
        """Samples drawn together."""
        return self._questions * self._group

    def draw(self, advance: Callable[[int], None] = lambda questions: None) -> Drawn:
        """Draws the samples of every question.

        Args:
          advance: called with the number of questions after each batch.

        Raises:
          NotFiniteError: the model gives numbers that are not finite, so that its answers mean nothing.
        """
        run, samples, seconds = self._lowered.compile(), [], 0.0
        for start in range(0, len(self._pages), self._questions):
            count = len(self._pages[start : start + self._questions])
            began = time.perf_counter()
            calls = [
                jax.tree.map(np.asarray, run(*self._arguments(start, first)))
                for first in range(0, self._config.count, self._group)
            ]
            seconds += time.perf_counter() - began
            for row in range(count):
                samples.append(self._samples_of(start + row, row, calls))
            advance(count)
        return Drawn(samples, seconds / len(self._pages))

    def _arguments(self, start: int, first: int) -> tuple[Any, ...]:
        """What `_draw` is given for the samples from number ``first`` on of the questions from ``start`` on."""
        model, tokenizer = self._subject.model, self._subject.tokenizer
        rows: list[Page | None] = list(self._pages[start : start + self._questions])
        count = len(rows)
        batch = align(
            rows + [None] * (self._questions - count),
            self._shape,
            pad_id=tokenizer.eos_id,
            latent_id=tokenizer.latent_id,
            feeds_back=self._feeds_back,
            examples=range(start, start + self._questions),
        )
        active = np.arange(self._questions) < count
        return model.decoder, model.parts, self._scorer, batch, active, np.int32(first)

    def _draw(
        self,
        decoder: Decoder,
        parts: Mapping[str, Any],
        scorer: LatentScorer | None,
        batch: Batch,
        active: Bool[Array, " Q"],
        first: Int[Array, ""],
    ) -> "DrawnTogether":
        """Samples of some questions. Traceable."""
        sampler = self._sampler(decoder, parts)
        keys = sample_keys(self._config.seed, jnp.asarray(batch.examples), first + jnp.arange(self._group))
        samples, written = sampler.sample(decoder, batch, keys, self._group, active)
        scores = None
        if scorer is not None:
            policy = drawing_policy(sampler)
            used = samples.valid[:, block_columns(samples.schedule)]
            scores = scorer.scores(scorer.read(batch, active), policy.inputs(decoder, samples.records), used).sum(1)
        log_probs = {kind: log_probs.sum(1) for kind, log_probs in samples.sampled.items()}
        return replicate(DrawnTogether(written, log_probs, scores))

    def _sampler(self, decoder: Decoder, parts: Mapping[str, Any]) -> Sampler:
        """How the model is sampled from."""
        config, tokenizer = self._config, self._subject.tokenizer
        return Sampler(
            policy=make_policy(config.policy, decoder, parts, vocab_size=tokenizer.vocab_size),
            halt=parts["halt"] if config.policy.learnt_stop else None,
            least=config.policy.least,
            sampling=config.sampling,
            think=self._think,
            latent_id=tokenizer.latent_id,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )

    def _passes(self, thoughts: int, tokens: int) -> int:
        """Passes one after the other of so many thoughts and tokens."""
        return 1 + self._think.needed(thoughts) + tokens

    def _samples_of(self, index: int, row: int, calls: Sequence["DrawnTogether"]) -> list[Sample]:
        """The samples of question ``index``, which stand in row ``row`` of each call."""
        subject, example, found = self._subject, self._examples[index], []
        task, pauses = subject.task, 0 if self._feeds_back else count_thoughts(self._pages[index])
        for number in range(self._config.count):
            written, log_probs, scores = calls[number // self._group]
            own = row * self._group + number % self._group
            if not written.finite[own]:
                raise NotFiniteError(f"the model's numbers are not finite at question {index} and others: it is broken")
            tokens = [*self._forced, *written.tokens[own, : written.lengths[own]].tolist()]
            text, thoughts = subject.tokenizer.decode(tokens), int(written.thoughts[own])
            found.append(
                Sample(
                    example=index,
                    number=number,
                    text=text,
                    answer=task.normalize_answer(task.extract_answer(text)),
                    right=task.check(text, example),
                    thoughts=thoughts + pauses,
                    new_tokens=len(tokens),
                    drawn_tokens=int(written.lengths[own] + written.ended[own]),
                    passes=self._passes(thoughts, int(written.lengths[own])),
                    log_probs={kind: float(values[own]) for kind, values in log_probs.items()},
                    ended=bool(written.ended[own]),
                    score=None if scores is None else float(scores[own]),
                )
            )
        return found


def drawing_policy(sampler: Sampler) -> DrawingPolicy:
    """The policy of a sampler, for what reads the thoughts that it draws.

    Raises:
      CoconutError: it draws none.
    """
    if not isinstance(sampler.policy, DrawingPolicy):
        raise CoconutError(f"SampleConfig.policy: a {type(sampler.policy).__name__} draws no thoughts to be scored")
    return sampler.policy


def sample_keys(seed: int, examples: Int[Array, " Q"], numbers: Int[Array, " G"]) -> Key[Array, " B"]:
    """A key for each sample of each question; a question's samples follow each other."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold, (0, None))(fold(jax.random.key(seed), examples), numbers).reshape(-1)
