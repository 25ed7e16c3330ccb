"""Log-probabilities of texts: against one unpadded rollout a row, with thoughts and without."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.evaluation.likelihood import log_likelihoods
from coconut.latent.generate import SamplingConfig
from coconut.latent.rollout import rollout
from coconut.methods import get_method
from coconut.model import Model
from coconut.pages import Ids, question_alone
from coconut.tokenizers import Tokenizer, symbol_tokenizer
from coconut.types import Language, Latent
from tests.tiny_models import quick_compilation, quick_jit
from tests.tiny_runs import untrained_run

TOKENIZER = symbol_tokenizer([*"abcdefgh", "<eos>"])


@pytest.fixture(autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def alone(model: Model, tokenizer: Tokenizer, context: Ids, own: Ids, thoughts: int | None) -> tuple[float, bool]:
    """One row, unpadded: ``context <start> thoughts <end> own``, or ``context own`` where ``thoughts`` is None."""
    start, latent, end = tokenizer.start_latent_id, tokenizer.latent_id, tokenizer.end_latent_id
    between = [] if thoughts is None else [start, *[latent] * thoughts, end]
    tokens = np.concatenate([context, between, own]).astype(np.int32)[None]
    n, m = tokens.shape[1], len(own)
    schedule = (Language(n, m),)
    if thoughts:
        schedule = (Language(len(context) + 1), Latent(thoughts), Language(1 + m, m))

    def log_probs(model: Model) -> jax.Array:
        positions, valid = jnp.arange(n)[None], jnp.ones((1, n), bool)
        output = rollout(model.decoder, schedule, tokens=jnp.asarray(tokens), positions=positions, valid=valid)
        return jax.nn.log_softmax(model.decoder.unembed(output.predictors))[0]

    scores = np.asarray(quick_jit(log_probs)(model), np.float64)
    return float(scores[np.arange(m), own].sum()), bool((scores.argmax(-1) == own).all())


@pytest.mark.slow
@pytest.mark.parametrize("method, thoughts, between", [("coconut", None, 4), ("coconut", 0, 0), ("cot", None, None)])
def test_rows_of_a_ragged_batch_are_those_alone(method: str, thoughts: int | None, between: int | None) -> None:
    run, model, progress = untrained_run(TOKENIZER, method=method)
    whom = (model, run.tokenizer, get_method(method), run.placing(progress.stage))
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, TOKENIZER.vocab_size, length).astype(np.int32)
    contexts, continuations = [draw(n) for n in (5, 7, 1, 12, 6)], [draw(m) for m in (2, 3, 1, 3, 0)]
    # What it writes itself, and the same with another last token.
    config = AnswerConfig(batch_size=1, sampling=SamplingConfig(max_new_tokens=3), thoughts=thoughts)
    question = question_alone(contexts[1], run.config.curriculum)
    [answer] = answer_questions(*whom, [question], config)
    names = {token: number for number, token in enumerate(map(TOKENIZER.token, range(TOKENIZER.vocab_size)))}
    written = np.asarray([names[symbol] for symbol in answer.text.split()], np.int32)
    assert len(written) == 3
    other = np.where(np.arange(3) == 2, (written + 1) % 8, written).astype(np.int32)
    contexts += [contexts[1]] * 2
    continuations += [written, other]
    scores, greedy = log_likelihoods(*whom, contexts, continuations, thoughts=thoughts, batch_size=2)
    expected = [
        alone(model, TOKENIZER, context, own, between) if len(own) else (0.0, True)
        for context, own in zip(contexts, continuations, strict=True)
    ]
    np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=1e-5, atol=1e-5)
    assert greedy.tolist() == [own for _, own in expected]
    assert greedy[-2:].tolist() == [True, False]


def test_thoughts_that_the_model_begins_or_ends_itself_have_no_place() -> None:
    ids = np.arange(3, dtype=np.int32)
    cases = (("interleaved", 0, 2, "begins to think where"), ("ponder", 2, None, "--thoughts K"))
    for method, stage, thoughts, why in cases:
        run, model, _ = untrained_run(TOKENIZER, method=method)
        placing = run.placing(stage)
        with pytest.raises(CoconutError, match=why):
            log_likelihoods(model, TOKENIZER, get_method(method), placing, [ids], [ids], thoughts=thoughts)
