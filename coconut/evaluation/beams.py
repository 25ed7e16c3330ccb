"""Beam search over the thoughts of each question (`coconut.latent.beam_search`), and what its beams answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from coconut.errors import CoconutError
from coconut.evaluation.samples import DrawnTogether, SampleConfig, SampleDrawing, drawing_policy, sample_keys
from coconut.evaluation.subject import Subject
from coconut.latent.beam_search import search_beams
from coconut.latent.scorer import LatentScorer
from coconut.models.decoder import Decoder
from coconut.sharding import replicate
from coconut.tokenizers import TokenizedExample
from coconut.types import Batch, Example


class BeamSearch(SampleDrawing):
    """A search that can be done: what cannot be is refused when this is made, before any work.

    Its samples are the beams of a question, the one of the highest score first; they are written greedily.

    Args:
      subject: the model, and how it is asked.
      examples: the questions.
      tokenized: their ids.
      config: how candidates are drawn; ``count`` beams are kept, and ``batch_size`` candidates are scored together,
        or those of one question, if they are more.
      scorer: scores candidates.
      candidates: thoughts drawn behind each beam.

    Raises:
      CoconutError: as `SampleDrawing`; or there are no candidates to choose from, or no thoughts.
    """

    def __init__(
        self,
        subject: Subject,
        examples: Sequence[Example],
        tokenized: Sequence[TokenizedExample],
        config: SampleConfig,
        scorer: LatentScorer,
        candidates: int,
    ):
        if candidates < 1:
            raise CoconutError(f"BeamSearch: candidates = {candidates!r}: must be at least 1")
        self._candidates = candidates
        greedy = dataclasses.replace(config.sampling, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)
        super().__init__(subject, examples, tokenized, dataclasses.replace(config, sampling=greedy), scorer)

    def _sizes(self) -> tuple[int, int]:
        config = self._config
        questions = config.batch_size // (config.count * self._candidates)
        return config.count, min(max(questions, 1), len(self._examples))

    def _passes(self, thoughts: int, tokens: int) -> int:
        # The scorer's pass over candidates and the model's over the thoughts that were kept wait for each other.
        return 1 + 2 * thoughts + tokens

    def _draw(
        self,
        decoder: Decoder,
        parts: Mapping[str, Any],
        scorer: LatentScorer | None,
        batch: Batch,
        active: Bool[Array, " Q"],
        first: Int[Array, ""],
    ) -> DrawnTogether:
        assert scorer is not None
        sampler, beams = self._sampler(decoder, parts), self._config.count
        drawing_policy(sampler)
        keys = sample_keys(self._config.seed, jnp.asarray(batch.examples), first + jnp.arange(beams * self._candidates))
        found = search_beams(
            sampler, scorer, decoder, batch, keys, beams=beams, candidates=self._candidates, active=active
        )
        return replicate(DrawnTogether(found.written, {"tokens": found.log_probs}, found.scores))
