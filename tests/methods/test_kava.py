"""KaVa's compression against obvious loops, and its terms against PCCoT's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.methods import METHODS
from coconut.methods.kava import KavaOptions, compress, token_scores
from coconut.methods.method import LossContext
from coconut.methods.pccot import PccotOptions
from coconut.model import Model
from coconut.models.cache import KeyValue
from coconut.pages import Markers, Placing
from coconut.tokenizers import TokenizedExample
from tests.official_methods import aligned
from tests.tiny_models import LLAMA_STYLE, quick_jit, random_decoder

RNG = np.random.default_rng(0)
CHAIN = np.asarray([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_scores_equal_an_obvious_loop() -> None:
    B, N, M, asked, C, H = 3, 4, 2, 3, 6, 5
    queries, keys = RNG.normal(size=(B, N, asked, H)), RNG.normal(size=(B, M, C, H))
    asking = np.asarray([[0, 1, 1], [1, 1, 1], [1, 0, 0]], bool)
    with jax.enable_x64(True):
        found = np.asarray(token_scores(*[jnp.asarray(x) for x in (queries, asking, keys, CHAIN)], importance=0.3))
    for row in range(B):
        chain = np.flatnonzero(CHAIN[row])
        for head in range(M):
            expected = np.zeros(C)
            if len(chain):
                own = keys[row, head, chain]
                paid = [
                    softmax(own @ queries[row, n, o] / np.sqrt(H))
                    for n in range(head * 2, head * 2 + 2)
                    for o in np.flatnonzero(asking[row])
                ]
                unit = own / np.linalg.norm(own, axis=1, keepdims=True)
                alike = [sum(unit[i] @ unit[j] for j in range(len(own)) if j != i) / len(own) for i in range(len(own))]
                expected[chain] = 0.3 * np.mean(paid, 0) + 0.7 * softmax(-np.asarray(alike))
            np.testing.assert_allclose(found[row, head], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("slots", [2, 8])
def test_the_best_tokens_stay_in_their_order(slots) -> None:
    keys = RNG.normal(size=(3, 2, 6, 5)).astype(np.float32)
    scores = RNG.uniform(size=(3, 2, 6)).astype(np.float32)
    kept, filled = compress(
        KeyValue(jnp.asarray(keys), jnp.asarray(-keys)), jnp.asarray(scores), jnp.asarray(CHAIN), slots
    )
    assert kept.keys.shape == (3, 2, slots, 5)
    assert np.asarray(filled).sum(1).tolist() == [min(slots, 3), 1, 0]
    for row in range(3):
        for head in range(2):
            chain = np.flatnonzero(CHAIN[row])
            best = sorted(sorted(chain, key=lambda c, row=row, head=head: -scores[row, head, c])[:slots])
            np.testing.assert_array_equal(kept.keys[row, head, : len(best)], keys[row, head, best])
            np.testing.assert_array_equal(kept.values[row, head, : len(best)], -keys[row, head, best])


def example(*steps: list[int]) -> TokenizedExample:
    ids = lambda *numbers: np.asarray(numbers, np.int32)
    return TokenizedExample(
        question=ids(1, 2), steps=tuple(ids(*step) for step in steps), answer=ids(3, 4, 0), answer_prefix=1
    )


def views_of(method: str, options) -> dict:
    curriculum = CurriculumConfig(c_thought=1, max_latent_stage=3)
    placing = Placing(curriculum=curriculum, stage=4, options=options, markers=Markers(start=9, latent=10, end=11))
    examples = [example([5], [6, 7], [8]), example([5, 6]), example([8, 5, 6, 7, 5], [7])]
    return {
        name: aligned([write(one, placing) for one in examples], pad_id=0, latent_id=10)
        for name, write in METHODS[method].pages.items()
    }


def terms_of(model, views, options, method="kava"):
    context = LossContext(options=options, think=METHODS[method].think(options))
    loss = METHODS[method].loss(model, views, context)
    terms = {name: term.ratio.mean() for name, term in loss.terms.items()}
    return sum(loss.terms[name].factor * mean for name, mean in terms.items()), terms


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(random_decoder(dataclasses.replace(LLAMA_STYLE, num_layers=1)), {"feedback": Identity()})


def test_without_its_term_it_is_pccot_to_the_bit(model) -> None:
    kava, pccot = KavaOptions(cache=0.0, distill=1.0, sweeps=2), PccotOptions(sweeps=2)
    views = views_of("kava", kava)
    derive = lambda options, method: quick_jit(jax.grad(lambda model: terms_of(model, views, options, method)[0]))(
        model
    )
    jax.tree.map(np.testing.assert_array_equal, derive(kava, "kava"), derive(pccot, "pccot"))


@pytest.mark.slow
def test_the_teacher_is_no_part_of_the_gradient_and_rows_without_a_chain_count_nothing(model) -> None:
    options = KavaOptions(distill=0.0, teacher=0.0, sweeps=2)
    views = views_of("kava", options)
    of_cache = lambda model, views: sum(
        value for name, value in terms_of(model, views, options)[1].items() if "cache" in name
    )
    value, gradient = quick_jit(jax.value_and_grad(of_cache))(model, views)
    assert 0 < float(value) < np.inf
    # What only the teacher reads has no gradient: the token 8 of the first and third chain.
    table = np.asarray(gradient.decoder.tokens.embedding[...])
    assert not table[8].any() and table[1].any()
    # The second example's only step is its last, and is dropped.
    one = {name: jax.tree.map(lambda x: x[np.asarray([0, 2])], view) for name, view in views.items()}
    np.testing.assert_allclose(float(of_cache(model, one)), float(value), rtol=1e-5)


def test_bad_options() -> None:
    for name, value in {"importance": 2.0, "cache": -1.0, "distill": -0.5}.items():
        with pytest.raises(CoconutError, match=f"KavaOptions.{name} = {value}"):
            dataclasses.replace(KavaOptions(), **{name: value})
    with pytest.raises(CoconutError, match=r"Sweeps\.count = -1"):
        KavaOptions(sweeps=-1)
