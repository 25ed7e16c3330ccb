"""The lenses, against the same numbers computed the obvious way."""

import jax
import numpy as np
import pytest

from coconut.analysis.lens import TunedLens, decode_thoughts, divergences, top_tokens, train_tuned_lens
from coconut.errors import CoconutError
from tests.tiny_models import GPT2_STYLE, quick_compilation, random_decoder


def test_decoded_thoughts_are_the_softmax_of_the_unembedding(subject):
    model, tokenizer, *_ = subject
    thoughts = np.asarray(jax.random.normal(jax.random.key(1), (3, 16)))
    logits = thoughts @ np.asarray(model.decoder.tokens.embedding[...]).T
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    decoded = decode_thoughts(model, tokenizer, thoughts, top=4)
    assert [len(row) for row in decoded] == [4, 4, 4]
    for row, expected in zip(decoded, probabilities, strict=True):
        order = np.argsort(-expected)[:4]
        assert [token for token, _ in row] == [tokenizer.token(index) for index in order]
        np.testing.assert_allclose([value for _, value in row], expected[order], rtol=1e-5)
    for top in (0, tokenizer.vocab_size + 1):
        with pytest.raises(CoconutError, match=f"top = {top}"):
            decode_thoughts(model, tokenizer, thoughts, top)


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def read_obviously(decoder, states: np.ndarray, size: int) -> np.ndarray:
    """Through the final norm and the unembedding, in numpy."""
    centred = states - states.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + decoder.config.norm_epsilon)
    hidden = normed * np.asarray(decoder.norm.scale[...]) + np.asarray(decoder.norm.bias[...])
    return softmax((hidden @ np.asarray(decoder.output_matrix()).T)[..., :size])


def test_the_logit_lens_reads_every_layer_through_the_final_norm():
    decoder = random_decoder(GPT2_STYLE)
    states = np.random.default_rng(0).normal(size=(3, 2, 300, 16)).astype(np.float32)  # More than are read together.
    found = top_tokens(decoder, states, 3, vocab_size=21)
    probabilities = read_obviously(decoder, states, 21)
    order = np.argsort(-probabilities, -1)[..., :3]
    assert found.ids.shape == (3, 2, 300, 3) and found.ids.max() <= 20
    assert (found.ids == order).mean() > 0.999
    np.testing.assert_allclose(found.probabilities, np.take_along_axis(probabilities, order, -1), atol=1e-5)
    assert top_tokens(decoder, states[:, :, :0], 2).ids.shape == (3, 2, 0, 2)


def states_behind_a_map(decoder, questions: int, seed: int) -> np.ndarray:
    """The state before layer 1 is the last one turned and shifted; that before layer 0 knows nothing of it."""
    rng = np.random.default_rng(seed)
    last = rng.normal(size=(questions, 2, 16))
    turn, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))
    return np.stack([rng.normal(size=last.shape), last @ turn + 0.5, last]).astype(np.float32)


def test_the_tuned_lens_finds_what_a_layer_has_turned_away():
    decoder = random_decoder(GPT2_STYLE)
    seen, others = (states_behind_a_map(decoder, questions, seed) for questions, seed in ((400, 1), (50, 2)))
    with quick_compilation():
        lens = train_tuned_lens(decoder, seen.reshape(3, -1, 16), steps=600, learning_rate=3e-3)
    present = np.ones((50, 2), bool)
    present[7:, 1] = False
    before, after = (divergences(decoder, others, present, one) for one in (None, lens))
    assert before.shape == (50, 2, 2) and (np.isnan(before) == ~present[:, None]).all()
    final, early = (read_obviously(decoder, states, 23) for states in (others[2], others[1]))
    expected = (final * np.log(final / early)).sum(-1)
    np.testing.assert_allclose(before[:, 1][present], expected[present], rtol=1e-3, atol=1e-5)
    before, after = np.nanmean(before, (0, 2)), np.nanmean(after, (0, 2))
    # The right map is a matrix and an offset: nearly nothing is left. Of the layer that knows nothing much is left.
    assert after[1] < 0.05 * before[1]
    assert 0.3 * before[0] < after[0] < before[0]
    start = divergences(decoder, others, present, TunedLens.identity(2, 16))
    np.testing.assert_array_equal(start, divergences(decoder, others, present))


def test_states_of_another_decoder_are_refused():
    decoder = random_decoder(GPT2_STYLE)
    with pytest.raises(CoconutError, match="states: 2 of width 16 for each column; a decoder of 2 layers has 3"):
        train_tuned_lens(decoder, np.zeros((2, 5, 16), np.float32))
    with pytest.raises(CoconutError, match="no columns to train"):
        train_tuned_lens(decoder, np.zeros((3, 0, 16), np.float32))
    with pytest.raises(CoconutError, match="steps = 0"):
        train_tuned_lens(decoder, np.zeros((3, 5, 16), np.float32), steps=0)
    with pytest.raises(CoconutError, match="width 8"):
        divergences(decoder, np.zeros((3, 1, 1, 8), np.float32), np.ones((1, 1), bool))
