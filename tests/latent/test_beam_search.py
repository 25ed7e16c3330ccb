"""A scorer's incremental and parallel passes, and beam search against a slow loop over whole passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.errors import CoconutError
from coconut.latent.beam_search import search_beams
from coconut.latent.generate import SamplingConfig
from coconut.latent.sampling import Given
from coconut.latent.scorer import LatentScorer, ScoreHead, block_columns, thoughts_of
from coconut.types import Language, Latent
from tests.latent.sampled import EOS, POLICY_CONFIGS, VOCAB, parts_for, questions, sampler_of
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE, quick_jit, random_decoder

BATCH = questions()
ACTIVE = jnp.ones(3, bool)
GREEDY = SamplingConfig(max_new_tokens=3)


@pytest.fixture(scope="module", params=["gaussian", pytest.param("gumbel", marks=pytest.mark.slow)])
def thinking(request):
    """A decoder, its scorer, which is another decoder, and a greedy sampler, in float64."""
    style = {"gaussian": GPT2_STYLE, "gumbel": LLAMA_STYLE}[request.param]
    policy = POLICY_CONFIGS[request.param]
    with jax.enable_x64(True):
        config = dataclasses.replace(style, num_layers=1, param_dtype="float64")
        decoder = random_decoder(config)
        kernel = nnx.Param(jnp.asarray(np.random.default_rng(5).normal(size=config.embed_dim)))
        scorer = LatentScorer(random_decoder(config, seed=1), ScoreHead(kernel))
        sampler = sampler_of(policy, decoder, parts_for(policy, decoder))
        yield decoder, scorer, dataclasses.replace(sampler, sampling=GREEDY)


def keys_of(each: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), 3 * each)


@pytest.fixture(scope="module")
def six(thinking):
    """The beams of two beams of three candidates."""
    return found(thinking, 2, 3)


def found(thinking, beams: int, candidates: int):
    decoder, scorer, sampler = thinking

    @quick_jit
    def run(decoder, scorer):
        keys = keys_of(beams * candidates)
        return search_beams(sampler, scorer, decoder, BATCH, keys, beams=beams, candidates=candidates, active=ACTIVE)

    return run(decoder, scorer)


@quick_jit
def run_row(decoder, inputs, valid):
    return decoder.trunk(inputs[None], positions=jnp.arange(len(valid))[None], valid=valid[None])[0][0]


def whole_pass(decoder, inputs):
    """States of the only row of some inputs. Columns behind them, which nothing sees, save compiling each length."""
    padded = jnp.pad(inputs, ((0, 12 - len(inputs)), (0, 0)))
    return run_row(decoder, padded, jnp.arange(12) < len(inputs))[: len(inputs)]


def slow_search(thinking, row: int, beams: int, candidates: int):
    """The thoughts, the scores and the tokens of each beam of one question, each by passes over all of its columns."""
    decoder, scorer, sampler = thinking
    block = block_columns(BATCH.schedule)
    tokens = jnp.asarray(BATCH.tokens[row, : block.start][BATCH.valid[row, : block.start]])
    keys = keys_of(beams * candidates).reshape(3, -1)[row]
    nothing = jnp.zeros((0, decoder.config.embed_dim))
    kept = [(nothing, 0.0)] * beams
    for index in range(int(BATCH.valid[row, block].sum())):
        tried = []
        for number, key in enumerate(keys):
            thoughts, _ = kept[number // candidates]
            hidden = whole_pass(decoder, jnp.concatenate([decoder.embed(tokens), thoughts]))[-1]
            key = jax.random.fold_in(jax.random.fold_in(key, 1), index)
            thought = sampler.policy.sample(decoder, hidden[None], key[None])[0]
            thoughts = jnp.concatenate([thoughts, thought])
            states = whole_pass(scorer.decoder, jnp.concatenate([scorer.decoder.embed(tokens), thoughts]))
            tried.append((thoughts, float((states[len(tokens) :] @ scorer.head.kernel[...]).sum())))
        kept = sorted(tried, key=lambda beam: -beam[1])[:beams]
    texts = []
    for thoughts, _ in kept:
        inputs, text = jnp.concatenate([decoder.embed(tokens), thoughts]), []
        following = int(BATCH.tokens[row, -1])
        for _ in range(GREEDY.max_new_tokens):
            inputs = jnp.concatenate([inputs, decoder.embed(jnp.asarray([following]))])
            following = int(jnp.argmax(decoder.unembed(whole_pass(decoder, inputs)[-1:])[0, :VOCAB]))
            if following == EOS:
                break
            text.append(following)
        texts.append(text)
    return kept, texts


def test_beams_are_those_of_a_slow_loop(thinking, six):
    beams = six
    for row in (1, 2):  # Of three thoughts, and of one.
        kept, texts = slow_search(thinking, row, 2, 3)
        for number, ((thoughts, score), text) in enumerate(zip(kept, texts, strict=True)):
            own = 2 * row + number
            np.testing.assert_allclose(beams.thoughts[own, : len(thoughts)], thoughts, rtol=0, atol=1e-9)
            assert not np.any(beams.thoughts[own, len(thoughts) :])
            assert float(beams.scores[own]) == pytest.approx(score, abs=1e-9)
            assert beams.written.tokens[own, : beams.written.lengths[own]].tolist() == text


def test_sums_of_a_search_are_those_of_one_parallel_pass(thinking, six):
    scorer, beams = thinking[1], six
    used = np.arange(3) < np.repeat(thoughts_of(BATCH), 2)[:, None]
    scores = quick_jit(lambda scorer: scorer.scores(scorer.read(BATCH), beams.thoughts, used))(scorer)
    assert np.all(np.asarray(scores)[~used] == 0)
    np.testing.assert_allclose(scores.sum(1), beams.scores, rtol=0, atol=1e-10)
    assert np.all(np.diff(np.asarray(beams.scores).reshape(3, 2), axis=1) <= 0)
    assert len(np.unique(np.round(beams.scores, 8))) == 6


def test_one_beam_of_one_candidate_is_a_sample(thinking):
    decoder, _, sampler = thinking
    beams = found(thinking, 1, 1)
    samples, written = quick_jit(lambda decoder: sampler.sample(decoder, BATCH, keys_of(1)))(decoder)
    inputs = sampler.policy.inputs(decoder, samples.records)
    used = np.arange(3) < np.asarray(written.thoughts)[:, None]
    np.testing.assert_allclose(beams.thoughts, np.where(used[..., None], inputs, 0.0), rtol=0, atol=1e-10)
    for ours, theirs in zip(beams.written, written, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_samples_go_on_behind_thoughts_that_are_given(thinking):
    decoder, _, sampler = thinking
    counts = np.asarray(thoughts_of(BATCH))

    @quick_jit
    def run(decoder, count):
        samples, written = sampler.sample(decoder, BATCH, keys_of(1))
        inputs = sampler.policy.inputs(decoder, samples.records)
        go_on = lambda begun: sampler.sample(decoder, BATCH, jax.random.split(jax.random.key(1), 3), begun=begun)[1]
        return written, go_on(Given(inputs, count)), go_on(None)

    own, whole, _ = run(decoder, jnp.asarray(3))
    # All thoughts are given: only the greedy answer is left, which is that of the trajectory.
    for ours, theirs in zip(whole, own, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    _, none, fresh = run(decoder, jnp.asarray(0))
    for ours, theirs in zip(none, fresh, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    _, first, _ = run(decoder, jnp.asarray(1))
    differs = lambda one, two: np.abs(np.asarray(one.thought_size) - np.asarray(two.thought_size)) > 1e-9
    np.testing.assert_array_equal(differs(first, own), counts > 1)
    assert differs(first, none).all()


def test_several_blocks_are_refused():
    with pytest.raises(CoconutError, match="reads one block of thoughts behind a question, and here are 2"):
        block_columns((Language(2), Latent(1), Language(1), Latent(1)))
