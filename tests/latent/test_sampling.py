"""Samples against a slow loop, and their log-probabilities when they are replayed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.sampling import latent_columns
from coconut.latent.thinkers import Sweeps
from tests.latent.sampled import EOS, POLICY_CONFIGS, VOCAB, parts_for, questions, sampler_of, with_learnt_stop
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder

GROUP = 3


@pytest.fixture(scope="module")
def decoder():
    config = dataclasses.replace(GPT2_STYLE, param_dtype="float64")
    with jax.enable_x64(True):
        yield random_decoder(config)


@pytest.fixture(scope="module")
def drawn(decoder):
    """Samples of every policy, and the replay of each."""
    found = {}

    def of(name, *, learnt_stop=False):
        if (name, learnt_stop) not in found:
            config = POLICY_CONFIGS[name]
            config = with_learnt_stop(config) if learnt_stop else config
            parts = parts_for(config, decoder, halts=learnt_stop)
            batch = questions((3, 3, 3)) if learnt_stop else questions()
            keys = jax.random.split(jax.random.key(0), GROUP * len(batch.tokens))

            @quick_jit
            def run(decoder, parts):
                sampler = sampler_of(config, decoder, parts)
                samples, written = sampler.sample(decoder, batch, keys, GROUP)
                return samples, written, sampler.replay(decoder, samples, entropies=True)

            found[name, learnt_stop] = (config, parts, batch, keys, *run(decoder, parts))
        return found[name, learnt_stop]

    return of


CASES = [(name, False) for name in POLICY_CONFIGS] + [("deterministic", True), ("gaussian", True), ("dropout", True)]


@pytest.mark.parametrize(("name", "learnt_stop"), CASES)
def test_a_replay_gives_the_log_probabilities_that_samples_were_drawn_with(drawn, name, learnt_stop):
    config, _, batch, _, samples, written, actions = drawn(name, learnt_stop=learnt_stop)

    expected_kinds = {"tokens"} | ({"stops"} if learnt_stop else set())
    if name not in ("deterministic", "dropout", "dropout_afresh"):
        expected_kinds.add("thoughts")
    assert set(actions) == set(samples.sampled) == expected_kinds
    for kind, draws in actions.items():
        assert draws.taken.any()
        np.testing.assert_allclose(draws.log_probs, samples.sampled[kind], rtol=0, atol=1e-10, err_msg=kind)
        assert np.all(np.asarray(draws.entropies)[~np.asarray(draws.taken)] == 0)
    # A row's own tokens up to EOS and no more are scored.
    new = np.asarray(actions["tokens"].taken)
    np.testing.assert_array_equal(new.sum(1), written.lengths + written.ended)
    thoughts = np.asarray(samples.valid)[:, latent_columns(samples.schedule)].sum(1)
    np.testing.assert_array_equal(thoughts, written.thoughts)
    allowed = np.repeat(batch.valid[:, latent_columns(batch.schedule)].sum(1), GROUP)
    if config.learnt_stop:
        assert len(set(thoughts)) > 1
        assert (thoughts <= allowed).all()
    else:
        np.testing.assert_array_equal(thoughts, allowed)


def one_by_one(decoder, sampler, row, key):
    """A sample drawn with nothing but whole passes over ever more columns, for one row."""
    fold = lambda data: jax.random.fold_in(key, data)
    inputs = decoder.embed(jnp.asarray(row.tokens[:5][row.valid[:5]])[None])

    def last_state(inputs):
        T = inputs.shape[1]
        everything = {"positions": jnp.arange(T)[None], "valid": jnp.ones((1, T), bool)}
        return decoder.trunk(inputs, **everything)[0][:, -1]

    counts = row.valid[5:-1].sum()
    thoughts = 0
    for index in range(counts):
        hidden = last_state(inputs)
        if sampler.halt is not None:
            uniform = jax.random.uniform(jax.random.fold_in(fold(2), index))
            if uniform < jax.nn.sigmoid(sampler.halt(decoder, hidden).astype(jnp.float32))[0]:
                break
        thought, _ = sampler.policy.sample(decoder, hidden, jax.random.fold_in(fold(1), index)[None])
        inputs = jnp.concatenate([inputs, thought[:, None]], 1)
        thoughts += 1
    inputs = jnp.concatenate([inputs, decoder.embed(jnp.asarray(row.tokens[-1:])[None])], 1)
    tokens = []
    for index in range(4):
        logits = decoder.unembed(last_state(inputs))[0, :VOCAB] / 1.3
        tokens.append(int(jax.random.categorical(jax.random.fold_in(fold(0), index), logits)))
        if tokens[-1] == EOS:
            break
        inputs = jnp.concatenate([inputs, decoder.embed(jnp.asarray([[tokens[-1]]]))], 1)
    return thoughts, tokens


@pytest.mark.parametrize(("name", "learnt_stop"), [("gumbel", False), ("gated_token", False), ("gaussian", True)])
@pytest.mark.slow
def test_samples_are_those_of_a_slow_loop(decoder, drawn, name, learnt_stop):
    config, parts, batch, keys, samples, written, _ = drawn(name, learnt_stop=learnt_stop)
    sampler = sampler_of(config, decoder, parts)

    for index in range(0, len(keys), 2):
        row = jax.tree.map(lambda x, index=index: x[index // GROUP], batch)
        thoughts, tokens = one_by_one(decoder, sampler, row, keys[index])

        assert thoughts == written.thoughts[index]
        ours = np.asarray(samples.labels)[index]
        assert ours[ours >= 0].tolist() == tokens


def test_masks_are_drawn_once_for_a_row_and_drop_nothing_else(decoder, drawn):
    """The thoughts of two samples of a question differ under masks; without, they are the model's own."""
    config, parts, _, _, samples, _, actions = drawn("dropout")
    sampler = sampler_of(config, decoder, parts)
    plain = sampler_of(POLICY_CONFIGS["deterministic"], decoder, parts)

    masked = actions["tokens"].log_probs
    other_keys = dataclasses.replace(samples, keys=samples.keys[::-1])
    again = sampler.replay(decoder, other_keys)["tokens"].log_probs
    unmasked = plain.replay(decoder, samples)["tokens"].log_probs

    assert np.abs(masked - again).max() > 1e-3
    assert np.abs(masked - unmasked).max() > 1e-3


def test_what_cannot_be_drawn_is_refused(decoder):
    config = POLICY_CONFIGS["gaussian"]
    with pytest.raises(CoconutError, match="makes all thoughts of a block together"):
        sampler_of(config, decoder, parts_for(config, decoder), think=Sweeps(count=2))


@pytest.mark.parametrize("implementation", ["tpu_interpret", "gpu_interpret"])
@pytest.mark.slow
def test_kernels_read_a_prompt_that_a_group_shares_as_plain_attention_does(implementation):
    config, batch = POLICY_CONFIGS["gaussian"], questions()
    keys = jax.random.split(jax.random.key(0), GROUP * len(batch.tokens))

    def run(attention):
        # The kernels of a GPU take heads of at least 16.
        decoder = random_decoder(dataclasses.replace(GPT2_STYLE, embed_dim=32), attention=attention)
        parts = parts_for(config, decoder)
        draw = quick_jit(lambda decoder: sampler_of(config, decoder, parts).sample(decoder, batch, keys, GROUP))
        return draw(decoder)

    (samples, written), (expected, expected_written) = run(implementation), run("dense")

    np.testing.assert_array_equal(written.tokens, expected_written.tokens)
    for kind, log_probs in expected.sampled.items():
        np.testing.assert_allclose(samples.sampled[kind], log_probs, rtol=0, atol=2e-4, err_msg=kind)
