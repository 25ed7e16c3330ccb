"""Patching, of a decoder in which it is known which thought carries the answer, and against the obvious loop."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.analysis.patching import noise_of_questions, patch_thoughts, think_again, with_other_questions
from coconut.analysis.traces import Rows, lay_out
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.pages import Text, Thoughts
from coconut.tokenizers import symbol_tokenizer
from tests.tiny_models import GPT2_STYLE, quick_compilation, quick_jit, random_decoder

TOKENIZER = symbol_tokenizer([str(number) for number in range(19)])
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def quickly_in_float64() -> Iterator[None]:
    with jax.enable_x64(True), quick_compilation():
        yield


def rows_of(
    questions: list[list[int]], thoughts: list[np.ndarray], answers: list[list[int]]
) -> tuple[Rows, np.ndarray]:
    """Rows of one block and an answer behind an end marker, and the columns of their answers."""
    end = Text(np.asarray([TOKENIZER.end_latent_id], np.int32))
    pages = [
        (Text(np.asarray(question, np.int32)), Thoughts(len(own)), end, Text(np.asarray(answer, np.int32)))
        for question, own, answer in zip(questions, thoughts, answers, strict=True)
    ]
    rows = lay_out(pages, TOKENIZER, thoughts)
    first = np.flatnonzero(rows.text[0])[0]
    return rows, rows.text & (np.arange(rows.text.shape[1]) > first)


# --- One thought carries the answer -------------------------------------------------------------------------------

WIDTH = 64
CARRIER = 5
"""The position of the second thought, behind a question of four tokens."""


def carrying_decoder() -> Decoder:
    """Two layers. The first does nothing; in the second, every column looks at position 5 and copies what it holds.

    Positions are written in the second half of the features, contents in the first, where tokens have a feature each.
    """
    size = TOKENIZER.vocab_size
    config = DecoderConfig(
        vocab_size=size, num_layers=2, embed_dim=WIDTH, num_heads=1, max_positions=16, mlp_dim=1, param_dtype="float64",
        normalization="rmsnorm", qkv_bias=False, output_bias=False, mlp_bias=False,
    )  # fmt: skip
    decoder = jax.tree.map(jnp.zeros_like, random_decoder(config))
    half = WIDTH // 2
    decoder.tokens.embedding[...] = jnp.eye(size, WIDTH)
    # The last feature is on at every position, so that every query is the same.
    decoder.positions.embedding[...] = jnp.eye(16, WIDTH, half).at[:, -1].set(1.0)
    reading = decoder.layers[1]
    for norm in (decoder.norm, reading.attention_norm):
        norm.scale[...] = jnp.ones(WIDTH)
    reading.attention.query.kernel[...] = jnp.zeros((WIDTH, WIDTH)).at[-1, 0].set(100.0)
    reading.attention.key.kernel[...] = jnp.zeros((WIDTH, WIDTH)).at[half + CARRIER, 0].set(100.0)
    content = jnp.diag(jnp.where(jnp.arange(WIDTH) < half, 1.0, 0.0))
    reading.attention.value.kernel[...], reading.attention.output.kernel[...] = content, 10 * content
    return decoder


@pytest.mark.slow
def test_the_thought_that_carries_the_answer_is_found():
    decoder, table = carrying_decoder(), np.eye(TOKENIZER.vocab_size, WIDTH)
    # The second thought of each row holds its answer; that of the corrupted row another token.
    answers = [[7], [3], [9]]
    clean_thoughts = [table[[1, *answer, 2]] for answer in answers]
    corrupted_thoughts = [table[[4, 5, 6]] for _ in answers]
    clean_thoughts[2] = corrupted_thoughts[2]  # Nothing is lost here, so that nothing can come back.
    clean, answer = rows_of([[1, 2, 3, 4]] * 3, clean_thoughts, answers)
    corrupted, _ = rows_of([[4, 3, 2, 1]] * 3, corrupted_thoughts, answers)
    assert clean.positions[0, clean.thoughts[0, 1]] == CARRIER
    found = patch_thoughts(decoder, clean, corrupted, answer, batch_size=2)
    assert found.counted.tolist() == [True, True, False] and (found.clean[:2] - found.corrupted[:2] > 2).all()
    # Before the second layer that thought carries all; behind it nobody reads it.
    expected = np.zeros((3, 3))
    expected[:2, 1] = 1
    np.testing.assert_allclose(found.effect.mean, expected, atol=1e-6)
    np.testing.assert_allclose([found.effect.low, found.effect.high], [expected] * 2, atol=1e-6)
    assert (found.effect.number == 2).all()
    strict = patch_thoughts(decoder, clean, corrupted, answer, threshold=100.0)
    assert not strict.counted.any() and not strict.effect.number.any() and np.isnan(strict.effect.mean).all()


# --- Thoughts that are made again ---------------------------------------------------------------------------------

QUESTIONS = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]
ANSWERS = [[3, 1], [4], [0, 7]]
COUNTS = (3, 2, 3)


@pytest.fixture(scope="module")
def thinking() -> tuple[Decoder, Rows, np.ndarray]:
    """A random decoder, and rows with the thoughts that it has."""
    decoder = random_decoder(dataclasses.replace(GPT2_STYLE, param_dtype="float64"))
    rows, answer = rows_of(QUESTIONS, [np.zeros((count, 16)) for count in COUNTS], ANSWERS)
    return decoder, think_again(decoder, Identity(), rows, np.zeros((*rows.tokens.shape, 16))), answer


@quick_jit
def trunk(decoder: Decoder, inputs: jax.Array) -> jax.Array:
    T = len(inputs)
    return decoder.trunk(inputs[None], positions=jnp.arange(T)[None], valid=jnp.ones((1, T), bool))[0][0]


def states_of(decoder: Decoder, inputs: np.ndarray) -> np.ndarray:
    """Of one row alone. What is put behind it, for a single program, is seen by none of its columns."""
    return np.asarray(trunk(decoder, jnp.asarray(np.pad(inputs, ((0, 12 - len(inputs)), (0, 0))))))[: len(inputs)]


def obvious_inputs(decoder: Decoder, question: np.ndarray, given: list[np.ndarray | None]) -> np.ndarray:
    """Inputs of one row, thought by thought; None where the model makes its own."""
    inputs = list(question)
    for thought in given:
        inputs.append(states_of(decoder, np.stack(inputs))[-1] if thought is None else thought)
    return np.stack(inputs)


def log_probability(decoder: Decoder, inputs: np.ndarray, answer: list[int]) -> float:
    behind = np.asarray(decoder.embed(jnp.asarray([TOKENIZER.end_latent_id, *answer])))
    hidden = states_of(decoder, np.concatenate([inputs, behind]))[-len(answer) - 1 : -1]
    logits = hidden @ np.asarray(decoder.output_matrix()).T
    return float((logits[np.arange(len(answer)), answer] - np.log(np.exp(logits).sum(-1))).sum())


@pytest.mark.slow
@pytest.mark.parametrize("made_again", [True, False])
def test_restored_thoughts_equal_the_obvious_loop(thinking, made_again):
    decoder, clean, answer = thinking
    assert clean.inputs is not None
    noise = noise_of_questions(decoder, clean, factor=1.0, seed=3).astype(np.float64)
    corrupted = think_again(decoder, Identity(), clean, noise, batch_size=2)
    assert corrupted.inputs is not None
    feedback = Identity() if made_again else None
    found = patch_thoughts(
        *(decoder, clean, corrupted, answer), feedback=feedback, noise=noise, threshold=1e-9, batch_size=2
    )
    for row, count in enumerate(COUNTS[:2]):
        embedded = np.asarray(decoder.embed(jnp.asarray(QUESTIONS[row])))
        noisy = embedded + noise[row, clean.question[row]]
        of_clean, of_noisy = (obvious_inputs(decoder, own, [None] * count) for own in (embedded, noisy))
        np.testing.assert_allclose(clean.inputs[row, :count], of_clean[-count:], atol=1e-10)
        np.testing.assert_allclose(corrupted.inputs[row, :count], of_noisy[-count:], atol=1e-10)
        assert np.abs(of_clean - of_noisy).max() > 0.1
        for score, inputs in ((found.clean, of_clean), (found.corrupted, of_noisy)):
            assert score[row] == pytest.approx(log_probability(decoder, inputs, ANSWERS[row]), abs=1e-10)
        for thought in range(count):
            thoughts = list(of_noisy[-count:])
            thoughts[thought] = of_clean[-count:][thought]
            given = [
                *thoughts[: thought + 1],
                *([None] * (count - thought - 1) if made_again else thoughts[thought + 1 :]),
            ]
            inputs = obvious_inputs(decoder, noisy, given)
            expected = log_probability(decoder, inputs, ANSWERS[row])
            assert found.patched[row, 0, thought] == pytest.approx(expected, abs=1e-10)
    assert np.isnan(found.patched[1, :, 2]).all() and not np.isnan(found.patched[0]).any()
    if made_again:
        # What the last layer leaves of a thought is what the next one is made of.
        for row, count in enumerate(COUNTS):
            np.testing.assert_allclose(found.patched[row, -1, : count - 1], found.patched[row, 0, 1:count], atol=1e-10)
    else:
        np.testing.assert_allclose(found.patched[0, -1], np.full(3, found.corrupted[0]), atol=1e-10)
    lost = found.clean - found.corrupted
    assert found.counted.tolist() == (lost >= 1e-9).tolist()
    effects = ((found.patched - found.corrupted[:, None, None]) / lost[:, None, None])[found.counted]
    np.testing.assert_allclose(found.effect.mean, np.nanmean(effects, 0))


# --- Corruptions --------------------------------------------------------------------------------------------------


def test_noise_is_as_large_as_the_embeddings_and_only_on_questions():
    decoder = random_decoder(GPT2_STYLE)
    rows, _ = rows_of([list(RNG.integers(19, size=12)) for _ in range(200)], [np.zeros((1, 16))] * 200, [[1]] * 200)
    noise = noise_of_questions(decoder, rows, factor=2.0)
    assert noise[rows.question].std() == pytest.approx(2 * np.asarray(decoder.tokens.embedding[...]).std(), rel=0.02)
    assert not noise[~rows.question].any()
    with pytest.raises(CoconutError, match=r"factor = 0\.0"):
        noise_of_questions(decoder, rows, factor=0.0)


def test_questions_are_swapped_with_others_of_their_columns():
    # The second has no partner of its length, the fifth none with another question.
    questions = [[1, 2, 3], [4, 5], [6, 7, 8], [1, 2, 3]]
    thoughts = [np.full((1, 4), float(row)) for row in range(4)]
    rows, answer = rows_of(questions, thoughts, [[10], [11], [12], [13]])
    taken, corrupted = with_other_questions(rows)
    assert taken.tolist() == [0, 2, 3] and corrupted.inputs is not None
    assert corrupted.tokens[0, corrupted.question[0]].tolist() == [6, 7, 8] and corrupted.inputs[0, 0, 0] == 2.0
    assert corrupted.tokens[1, corrupted.question[1]].tolist() == [1, 2, 3] and corrupted.inputs[1, 0, 0] in (0.0, 3.0)
    assert corrupted.tokens[answer[taken]].tolist() == [10, 12, 13]
    nobody, none = with_other_questions(rows.take([1]))
    assert len(nobody) == len(none) == 0


def test_what_cannot_be_patched_is_refused():
    decoder = random_decoder(GPT2_STYLE)
    rows, answer = rows_of([[1, 2], [3, 4]], [np.zeros((1, 16))] * 2, [[5], [6]])
    longer, _ = rows_of([[1, 2], [3]], [np.zeros((1, 16))] * 2, [[5], [6]])
    with pytest.raises(CoconutError, match=r"corrupted\.valid: differs"):
        patch_thoughts(decoder, rows, longer, answer)
    with pytest.raises(CoconutError, match="the answer differs from that of the clean rows"):
        patch_thoughts(decoder, rows, dataclasses.replace(rows, tokens=rows.tokens[::-1]), answer)
    with pytest.raises(CoconutError, match="answer: must name columns of text"):
        patch_thoughts(decoder, rows, rows, rows.question)
    with pytest.raises(CoconutError, match=r"threshold = 0\.0"):
        patch_thoughts(decoder, rows, rows, answer, threshold=0.0)
    with pytest.raises(CoconutError, match=r"Rows\.inputs = None"):
        patch_thoughts(decoder, dataclasses.replace(rows, inputs=None), rows, answer, feedback=Identity())
