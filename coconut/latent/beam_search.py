"""Beam search over thoughts: at each thought the prefixes of highest score go on, and the others are dropped.

It is the search of LatentTTS (arXiv 2510.07745), whose code leaves it out. Each of ``b`` beams is expanded
into ``c`` candidates, drawn by the policy from the state that the beam has reached. A scorer
(`coconut.latent.scorer`) gives each candidate its score, which is added to those of the thoughts before it, and the
best ``b`` of ``b c`` sums are kept. At the first thought all beams are the same question, so the best ``b`` of ``b c``
first thoughts are kept. Each beam is written to its end, and the answer is that of the highest sum.

Everything is one program: a scan over thoughts. The beams of a question share what was read of it. The decoder that
thinks runs the thoughts that were kept alone, the scorer all candidates; so a thought takes two passes, one of each.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.latent.generate import Continuation, decode, place_behind, prefill
from coconut.latent.policies.policy import DrawingPolicy
from coconut.latent.sampling import Sampler, Written, size_of, thought_keys
from coconut.latent.scorer import LatentScorer, block_columns, read_question, thoughts_of
from coconut.latent.thoughts import room_behind, run_one_column
from coconut.models.cache import take_rows
from coconut.models.decoder import Decoder
from coconut.types import Batch


class Beams(NamedTuple):
    """The beams of some questions: ``b`` of each, which follow each other, the best one first.

    Attributes:
      written: what the host reads of them.
      thoughts: what the columns of their thoughts were fed; zero in columns not used.
      scores: sums of the scores of their thoughts.
      log_probs: log-probability of the tokens of each, in nats.
    """

    written: Written
    thoughts: Float[Array, "B K D"]
    scores: Float[Array, " B"]
    log_probs: Float[Array, " B"]


def search_beams(
    sampler: Sampler,
    scorer: LatentScorer,
    decoder: Decoder,
    batch: Batch,
    keys: Key[Array, " C"],
    *,
    beams: int,
    candidates: int,
    active: Bool[Array, " Q"],
) -> Beams:
    """Searches for the thoughts of highest score behind each question. Traceable.

    With one beam and one candidate the thoughts are those of the sample (`Sampler.sample`) with the same key.

    Args:
      sampler: how thoughts and tokens are drawn, with a policy that draws thoughts, and without a stop head.
      scorer: scores candidates.
      decoder: the decoder that thinks.
      batch: what is given of each question, with one block of thoughts.
      keys: a key for each candidate: ``beams * candidates`` of a question, which follow each other.
      beams: prefixes that are kept.
      candidates: thoughts drawn behind each of them.
      active: rows that are questions; the others only fill the batch.

    Raises:
      CoconutError: there are several blocks or none; or more columns than positions, as in `prefill`.
    """
    assert isinstance(sampler.policy, DrawingPolicy) and sampler.halt is None
    rows, each, block = len(batch.tokens), beams * candidates, block_columns(batch.schedule)
    room = block.stop - block.start
    to_beams = lambda x: jnp.repeat(x, beams, axis=0)
    to_candidates = lambda x: jnp.repeat(x, candidates, axis=0)
    asked, read = read_question(decoder, batch, active).shared(beams), scorer.read(batch, active).shared(each)
    of_questions = thoughts_of(batch)
    counts = to_beams(of_questions)
    place = place_behind(decoder, asked, jnp.ones((rows * beams, room), bool))
    scorer_place = place_behind(scorer.decoder, read, jnp.ones((rows * each, room), bool))
    stay = jnp.arange(beams) * candidates  # Each beam goes on as its first candidate.

    def body(carry: tuple, index: Int[Array, ""]) -> tuple[tuple, None]:
        hidden, own, judged, thoughts, total = carry
        going = index < counts
        # --- Candidates, and their scores.
        trying = to_candidates(going)
        drawn, _ = sampler.policy.sample(decoder, to_candidates(hidden), thought_keys(keys, index))
        drawn = jnp.where(trying[:, None], drawn, 0.0)
        here = dataclasses.replace(scorer_place.column(index), valid=trying[:, None])
        inputs = drawn.astype(scorer.decoder.execution.compute_dtype)
        judged = take_rows(judged, to_candidates(jnp.arange(rows * beams)))
        states, judged = run_one_column(scorer.decoder, inputs, here, read.past, judged, index)
        scores = to_candidates(total) + jnp.where(trying, scorer.head(scorer.decoder, states), 0.0)
        # --- The best of each question.
        found = jax.lax.top_k(scores.reshape(rows, each), beams)[1]
        found = jnp.where((index < of_questions)[:, None], found, stay)
        chosen = (found + jnp.arange(rows)[:, None] * each).reshape(-1)
        parents = chosen // candidates
        # --- They go on.
        thought = drawn[chosen]
        thoughts = jax.lax.dynamic_update_slice_in_dim(thoughts[parents], thought[:, None], index, axis=1)
        here = dataclasses.replace(place.column(index), valid=going[:, None])
        out, own = run_one_column(decoder, thought, here, asked.past, take_rows(own, parents), index)
        hidden = jnp.where(going[:, None], out, hidden[parents])
        return (hidden, own, take_rows(judged, chosen), thoughts, scores[chosen]), None

    of_beams = jnp.arange(rows * beams) * candidates
    start = (
        asked.last,
        room_behind(decoder, place, asked.past),
        take_rows(room_behind(scorer.decoder, scorer_place, read.past), of_beams),
        jnp.zeros((rows * beams, room, asked.last.shape[-1]), asked.last.dtype),
        jnp.zeros(rows * beams, scorer.decoder.execution.accumulation_dtype),
    )
    (last, own, _, thoughts, total), _ = jax.lax.scan(body, start, jnp.arange(room))
    prefix = Continuation(own, last, asked.length + counts).behind(asked.past)
    if batch.tokens.shape[1] > block.stop:
        behind = lambda x: to_beams(jnp.asarray(x)[:, block.stop :])
        prefix = prefill(decoder, behind(batch.tokens), behind(batch.valid), prefix)
    made = decode(
        decoder,
        prefix,
        to_beams(active),
        keys[of_beams],
        sampling=sampler.sampling,
        eos_id=sampler.eos_id,
        vocab_size=sampler.vocab_size,
        keep_log_probs=True,
    )
    assert made.log_probs is not None
    used = jnp.arange(room) < counts[:, None]
    written = Written(made.tokens, made.lengths, made.ended, made.finite, counts, size_of(thoughts, used))
    return Beams(written, thoughts, total, made.log_probs.sum(1))
