"""Parts of a model in a run: what only training needs, what is frozen, and options that do not fit."""

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from safetensors.numpy import save_file

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.latent.feedback import FeedbackConfig, Identity
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.losses import Loss, Term, ratio
from coconut.methods import METHODS
from coconut.methods.interleaved import InterleavedOptions
from coconut.methods.method import LossContext, Method, Views
from coconut.model import Model, parameters_of
from coconut.models.huggingface import EXPORT_FIELD, PARTS_FILE
from coconut.pages import question_alone
from coconut.sharding import make_mesh
from coconut.tokenizers import symbol_tokenizer
from coconut.training.config import RunConfig, from_json, to_json
from coconut.training.loading import load_model
from coconut.training.loop import train
from coconut.training.optimizer import make_optimizer
from coconut.training.setup import _exported_parts, initial_model, initial_state, prepare
from coconut.training.state import fresh_parts, template_of
from tests.tiny_models import quick_compilation, quick_jit, random_decoder
from tests.tiny_pages import placing_at
from tests.tiny_runs import tiny_run
from tests.training.test_step import CONFIG, VIEWS

QUIET = Console(file=io.StringIO())
COCONUT = METHODS["coconut"]


def reader(options: Any, decoder: Any, key: jax.Array) -> Mapping[str, Any]:
    del options
    return {"reader": {"kernel": nnx.Param(jax.random.normal(key, (decoder.embed_dim, 2)), axes=("embed", "mlp"))}}


def loss(model: Model, views: Views, context: LossContext) -> Loss:
    own = COCONUT.loss(model, views, context)
    read = context.rollout(model, views["main"]).last @ model.parts["reader"]["kernel"][...]
    term = ratio(jnp.square(read - 1).sum(1), views["main"].valid.any(1))
    return own._replace(terms={**own.terms, "reading": Term(term, 0.1)})


WITH_READER = Method(name="with_reader", pages=COCONUT.pages, parts=reader, train_only=frozenset({"reader"}), loss=loss)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(METHODS, WITH_READER.name, WITH_READER)
    with quick_compilation():
        yield


@pytest.mark.slow
def test_what_only_training_needs_is_saved_and_left_out(tmp_path: Path) -> None:
    result = train(tiny_run(method="with_reader"), tmp_path / "run", console=QUIET)
    trained = parameters_of(result.model)["reader.kernel"]
    run, model, _ = load_model(tmp_path / "run", "latest")
    assert "reader" not in model.parts
    assert np.abs(trained - parameters_of(initial_model(run))["reader.kernel"]).max() > 1e-4, "it was trained"
    _, with_all, _ = load_model(tmp_path / "run", "latest", train_only=True)
    np.testing.assert_array_equal(parameters_of(with_all)["reader.kernel"], trained)
    # A run that starts from it takes the part; one of a method without it takes the rest.
    for method in ("with_reader", "coconut"):
        following, _, _ = prepare(tiny_run(method=method, seed=3, init_from=str(tmp_path / "run")))
        taken = parameters_of(initial_model(following))
        np.testing.assert_array_equal(taken["decoder.tokens.embedding"], model.decoder.tokens.embedding[...])
        if method == "with_reader":
            np.testing.assert_array_equal(taken["reader.kernel"], trained)
        else:
            assert "reader.kernel" not in taken


@pytest.mark.slow
def test_what_a_run_freezes_stays_to_the_bit(tmp_path: Path) -> None:
    config = tiny_run(freeze=("decoder.tokens.*", "decoder.layers.0.mlp.*"), save_every=None)
    result = train(config, tmp_path / "run", console=QUIET)
    # As the run itself made them: outside of jit the same draws round differently.
    start = initial_state(result.run, make_optimizer(config.optimizer), make_mesh()).parameters
    end = parameters_of(result.model)
    still = {name for name in end if (np.asarray(start[name]) == end[name]).all()}
    assert "decoder.tokens.embedding" in still and "decoder.layers.0.mlp.up.kernel" in still
    assert "decoder.layers.0.attention.query.kernel" not in still


@pytest.mark.parametrize(
    "patterns,why",
    [(("decoder.tokens.*", "decoder.tokns.*"), "the model has no parameter 'decoder.tokns.*'"), (("*",), "nothing is")],
)
def test_patterns_that_freeze_nothing_or_everything_are_errors(patterns: tuple[str, ...], why: str) -> None:
    run, _, _ = prepare(tiny_run(freeze=patterns))
    with pytest.raises(CoconutError) as error:
        template_of(run.config, jax.eval_shape(lambda: initial_model(run)))
    assert str(error.value).startswith(f"RunConfig.freeze = {patterns!r}: ") and why in str(error.value)


def test_options_belong_to_their_method() -> None:
    assert tiny_run(method="interleaved").options == InterleavedOptions()
    base = tiny_run(method="interleaved")
    assert dataclasses.replace(base, options={"blocks": 3}).options == InterleavedOptions(blocks=3)
    for options, why in (
        (InterleavedOptions(), "method = 'coconut' takes a NoOptions"),
        ({"blocks": 3}, r"RunConfig\.options: NoOptions has no field 'blocks'"),
    ):
        with pytest.raises(CoconutError, match=why):
            dataclasses.replace(tiny_run(), options=options)
    with pytest.raises(CoconutError, match=r"InterleavedOptions\.blocks = 0: must be at least 1"):
        dataclasses.replace(base, options={"blocks": 0})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noisy:
    """A feedback that draws."""

    draws = True

    def __call__(self, decoder: Any, hidden: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        if keys is None:
            return hidden
        noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, hidden.shape[2:], hidden.dtype)))(keys)
        return hidden + noise


@pytest.mark.slow
def test_a_feedback_that_draws_has_other_keys_in_every_step_and_the_same_in_every_batch() -> None:
    noisy = Model(random_decoder(CONFIG, seed=2), {"feedback": Noisy()})
    quiet = noisy._replace(parts={"feedback": Identity()})
    value = quick_jit(
        lambda model, key: COCONUT.loss(model, VIEWS, LossContext(key=key)).terms["language"].ratio.mean()
    )
    first, second = (float(value(noisy, jax.random.key(seed))) for seed in (0, 1))
    assert first != second and first == float(value(noisy, jax.random.key(0)))
    assert float(value(quiet, jax.random.key(0))) not in (first, second)
    # In answering a row's draws depend on its example and the seed, not on who stands beside it.
    tokenizer = symbol_tokenizer([str(number) for number in range(CONFIG.vocabulary - 4)])
    question = np.random.default_rng(0).integers(0, 19, (5, 4)).astype(np.int32)
    examples = [question_alone(row, CurriculumConfig(max_latent_stage=2)) for row in question]
    placing = placing_at(tokenizer, CurriculumConfig(max_latent_stage=2), 2)

    def thoughts(model: Model, **settings: Any) -> np.ndarray:
        config = AnswerConfig(sampling=SamplingConfig(max_new_tokens=2), **settings)
        answers = answer_questions(model, tokenizer, COCONUT, placing, examples, config)
        return np.asarray([answer.thought_inputs for answer in answers])

    together, apart = thoughts(noisy, batch_size=5), thoughts(noisy, batch_size=2)
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    for other in (thoughts(quiet, batch_size=5), thoughts(noisy, batch_size=5, seed=1)):
        assert np.abs(together - other).max() > 0.1


def test_a_stop_head_that_is_missing_is_found_before_training() -> None:
    config = tiny_run(halting=HaltingConfig(stop="head", threshold=0.5))
    assert from_json(RunConfig, to_json(config), "run.json") == config
    with pytest.raises(
        CoconutError, match=r"RunConfig\.halting: HaltingConfig\.stop = 'head' needs a part named 'halt'"
    ):
        prepare(config)


def test_an_export_gives_back_the_parts_that_mean_the_same(tmp_path: Path) -> None:
    feedback = {"kind": "norm", "factor": 0.5}
    config = tiny_run(
        pretrained=str(tmp_path), data={"tokenizer": "gpt2"}, feedback=feedback, decoder={"vocab_size": 9}
    )
    (tmp_path / "config.json").write_text(json.dumps({EXPORT_FIELD: {"feedback": to_json(config.feedback)}}))
    stored = np.arange(16, dtype=np.float32)
    save_file({"feedback.scale": stored}, tmp_path / PARTS_FILE)
    fresh = fresh_parts(config)
    np.testing.assert_array_equal(_exported_parts(config, fresh)["feedback"].scale[...], stored)
    # Another feedback, or another shape, is not what was exported.
    other = dataclasses.replace(config, feedback=FeedbackConfig(kind="norm", factor=2.0))
    np.testing.assert_array_equal(_exported_parts(other, fresh)["feedback"].scale[...], fresh["feedback"].scale[...])
    save_file({"feedback.scale": stored[:8]}, tmp_path / PARTS_FILE)
    np.testing.assert_array_equal(_exported_parts(config, fresh)["feedback"].scale[...], fresh["feedback"].scale[...])
