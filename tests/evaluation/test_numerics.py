"""How clearly a token was chosen, and which answers differ where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer
from coconut.evaluation.numerics import Judged, compare, smallest_margin
from coconut.latent.generate import SamplingConfig, decode, prefill
from coconut.models.parameters import decoder_parameters
from coconut.training.loading import Numerics
from tests.tiny_models import LLAMA_STYLE, quick_compilation, random_decoder


def answer(example: int, text: str, chosen: tuple[int, ...], margins: tuple[float, ...] | None = None) -> Answer:
    blank = {"new_tokens": 1, "thoughts": 0, "ended": True, "cut": False, "turns": (), "soft_text": "", "passes": 1}
    return Answer(example=example, text=text, chosen=chosen, margins=margins, thought_inputs=None, **blank)


def test_answers_are_compared_where_they_part() -> None:
    first = [
        answer(0, "a b", (1, 2, 0), (3.0, 4.0, 0.25)),
        answer(1, "a", (1, 0), (3.0, 0.5)),
        answer(2, "c", (3, 0), (1.0, 1.0)),
    ]
    other = [answer(0, "a c", (1, 3, 0)), answer(1, "a b", (1, 2, 0)), answer(2, "c", (4, 3, 0))]
    one = Judged(answers=first, right=[True, False, True])
    found = compare(one, Judged(answers=other, right=[False, True, True]))
    places = [(item["example"], item["column"], item["tokens"], item["margin"]) for item in found["differences"]]
    # The third has another token, but the same text.
    assert places == [(0, 1, (2, 3), 4.0), (1, 1, (0, 2), 0.5)]
    assert (found["other_texts"], found["turned_wrong"], found["turned_right"]) == (2, 1, 1)
    assert (found["first_column"], found["smallest_margin"], found["largest_margin"]) == (1, 0.5, 4.0)
    assert (found["questions"], found["correct"], smallest_margin(one)) == (3, 2, 0.25)
    same = compare(one, one)
    assert (same["other_texts"], same["first_column"], same["smallest_margin"], same["differences"]) == (
        *(0, None, None),
        [],
    )


def test_margins_are_those_of_one_pass_over_what_was_written() -> None:
    decoder, tokens = random_decoder(LLAMA_STYLE), np.random.default_rng(0).integers(1, 20, (3, 5)).astype(np.int32)
    everywhere = np.ones(tokens.shape, bool)
    with quick_compilation():
        made = decode(
            decoder,
            prefill(decoder, tokens, everywhere),
            np.ones(3, bool),
            jax.random.split(jax.random.key(0), 3),
            sampling=SamplingConfig(max_new_tokens=6),
            eos_id=int(tokens[0, 0]),
            vocab_size=21,
            keep_margins=True,
        )
        every = jnp.concatenate([tokens, made.tokens], 1)
        positions, valid = jnp.broadcast_to(jnp.arange(11), every.shape), jnp.ones(every.shape, bool)
        hidden, _ = jax.jit(decoder.trunk)(decoder.embed(every), positions=positions, valid=valid)
        logits = np.sort(np.asarray(decoder.unembed(hidden))[:, 4:10, :21], -1)
    assert made.margins is not None
    chosen = np.arange(6) < np.asarray(made.lengths + made.ended)[:, None]
    expected = np.where(chosen, logits[..., -1] - logits[..., -2], 0.0)
    np.testing.assert_allclose(made.margins, expected, atol=2e-5)
    assert expected.max() > 0.1


def test_rounded_parameters_are_computed_with_exactly() -> None:
    decoder = random_decoder(LLAMA_STYLE)
    own = Numerics(dtype="float32", param_dtype="bfloat16").of(decoder)
    assert {str(x.dtype) for x in decoder_parameters(own).values()} == {"bfloat16"}
    assert (own.config.param_dtype, own.execution.dtype) == ("bfloat16", "float32")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), decoder)
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    positions, valid = jnp.broadcast_to(jnp.arange(4), (2, 4)), jnp.ones((2, 4), bool)

    @jax.jit
    def logits(decoder):
        return decoder.unembed(decoder.trunk(decoder.embed(tokens), positions=positions, valid=valid)[0])

    np.testing.assert_array_equal(logits(own), logits(rounded))
    assert np.abs(logits(own) - logits(decoder)).max() > 1e-4
    assert Numerics().of(decoder).config == decoder.config


def test_products_are_exact_where_float32_is_asked_for() -> None:
    product = lambda: str(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 2)), jnp.ones((2, 2))))
    for dtype, exact in (("float32", True), ("bfloat16", False), (None, False)):
        with Numerics(dtype=dtype).products():
            assert ("HIGHEST" in product()) == exact
    with pytest.raises(CoconutError, match=r"Numerics.dtype = 'fp32': must be one of float32, bfloat16"):
        Numerics(dtype="fp32")
    with pytest.raises(CoconutError, match=r"Numerics.param_dtype = 'float64': JAX needs JAX_ENABLE_X64=1"):
        dataclasses.replace(Numerics(), param_dtype="float64")
