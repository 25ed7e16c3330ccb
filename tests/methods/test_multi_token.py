"""Prediction of the token after the next: an obvious loop's term, `transformers`' module, runs and exports."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.commands.export import export
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout_batch
from coconut.methods.method import LossContext, imitation_loss
from coconut.methods.multi_token import MultiTokenConfig, second_token_loss
from coconut.model import Model, parameters_of
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_multi_token, load_pretrained, save_pretrained
from coconut.models.multi_token import MultiToken
from coconut.models.parameters import parameters_by_name
from coconut.tokenizers import symbol_tokenizer
from coconut.training.loading import load_model
from coconut.training.loop import train
from coconut.training.setup import initial_model
from coconut.types import IGNORED_LABEL, Batch, Latent
from tests.latent.slow_rollout import assert_close, columns_of, slow_loop
from tests.tiny_models import EXPERTS_STYLE, GPT2_STYLE, LOCAL_STYLE, quick_jit, random_decoder
from tests.tiny_pages import aligned, one_block, thinking_page
from tests.tiny_runs import tiny_run


def random_module(config: DecoderConfig, at_thoughts: Any = "masked") -> MultiToken:
    execution = ExecutionConfig(dtype=config.param_dtype)
    abstract = jax.eval_shape(lambda: MultiToken(config, execution, at_thoughts=at_thoughts, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(7)
    draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + (x.ndim == 1), x.dtype)
    return jax.tree.map(draw, abstract)


def make_batch() -> Batch:
    """Ragged prompts, zero to three thoughts, answers of one token and more, and a row that only fills the batch."""
    tokenizer = symbol_tokenizer([str(number) for number in range(19)])
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, 19, length).astype(np.int32)
    pages = [thinking_page(tokenizer, draw(4 - index), index, draw(1 + index)) for index in range(4)]
    return aligned([*pages, None], one_block(6, 3, 6), tokenizer)


HOST = make_batch()
BATCH = jax.tree.map(jnp.asarray, HOST)


def slow_loss(decoder: Decoder, module: MultiToken) -> jax.Array:
    """Row by row, of the columns that a row has."""
    seen, latent = slow_loop(decoder, Identity(), BATCH, BATCH.schedule), columns_of(BATCH.schedule, Latent)  # type: ignore[arg-type]
    inputs = decoder.embed(BATCH.tokens).at[:, np.flatnonzero(latent)].set(seen.thoughts)
    total, count = jnp.zeros(()), 0
    for row in range(len(BATCH.tokens)):
        columns = np.flatnonzero(HOST.valid[row])
        pairs = list(itertools.pairwise(columns))
        if module.at_thoughts == "masked":
            pairs = [(first, second) for first, second in pairs if not latent[second]]
        if not pairs:
            continue
        firsts, seconds = np.asarray(pairs).T
        states = module(
            seen.hidden[row, firsts][None],
            inputs[row, seconds][None],
            positions=jnp.asarray(HOST.positions)[row, firsts][None],
            valid=jnp.ones((1, len(firsts)), bool),
        )
        logits = jax.nn.log_softmax(decoder.unembed(states)[0])
        for place, second in enumerate(seconds):
            after = columns[columns > second]
            if len(after) and HOST.labels[row, after[0]] != IGNORED_LABEL:
                total, count = total - logits[place, HOST.labels[row, after[0]]], count + 1
    assert count > 4
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("at_thoughts", ["masked", "thought"])
@pytest.mark.parametrize("config", [EXPERTS_STYLE, LOCAL_STYLE], ids=["experts", "local"])
def test_the_term_is_that_of_a_loop(config: DecoderConfig, at_thoughts: str) -> None:
    config = dataclasses.replace(config, param_dtype="float64")

    def loss(decoder: Decoder, module: MultiToken) -> jax.Array:
        output = rollout_batch(decoder, Identity(), BATCH, every_hidden=True)
        return second_token_loss(decoder, module, BATCH, output)[0].mean()

    with jax.enable_x64(True):
        decoder, module = random_decoder(config), random_module(config, at_thoughts)
        expected, slow = quick_jit(jax.value_and_grad(slow_loss, argnums=(0, 1)))(decoder, module)
        value, gradients = quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(decoder, module)
    assert_close(value, expected)
    for own, other in zip(gradients, slow, strict=True):
        assert_close(parameters_by_name(own), parameters_by_name(other))


def test_the_term_beside_the_loss() -> None:
    decoder = random_decoder(GPT2_STYLE)
    weights, totals = {}, {}
    for at_thoughts in ("masked", "thought"):
        model = Model(decoder, {"feedback": Identity(), "multi_token": random_module(GPT2_STYLE, at_thoughts)})
        loss = quick_jit(lambda model: imitation_loss(model, {"main": BATCH}, LossContext()))(model)
        assert set(loss.terms) == {"language", "multi_token"} and loss.terms["multi_token"].factor == 0.3
        totals[at_thoughts], weights[at_thoughts] = map(float, loss.terms["multi_token"].ratio)
    labelled = np.asarray(BATCH.labels) != IGNORED_LABEL
    # The end marker stands before a row's first label: what is read of the column before that is no thought, and both
    # predict all labels. But what they look back on is not the same.
    assert weights == {"masked": labelled.sum(), "thought": labelled.sum()}
    assert totals["masked"] != pytest.approx(totals["thought"], rel=1e-3)
    plain = quick_jit(lambda model: imitation_loss(model, {"main": BATCH}, LossContext()))
    without = plain(Model(decoder, {"feedback": Identity()}))
    assert set(without.terms) == {"language"}


@pytest.mark.slow
def test_the_module_of_transformers(tmp_path: Path) -> None:
    """What we write `transformers` reads, and computes the same of it; and we read it again, bit for bit."""
    torch = pytest.importorskip("torch")
    layers = pytest.importorskip("transformers.modeling_layers")
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import MtpCache

    decoder, module = random_decoder(EXPERTS_STYLE), random_module(EXPERTS_STYLE)
    save_pretrained(decoder, tmp_path / "whole", multi_token=module)
    main = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    # By this it finds the module's tensors, and knows of published numbers of layers alone.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{EXPERTS_STYLE.num_layers}.*"]
    theirs = layers.MtpModel.from_pretrained(main)
    T, D = 7, EXPERTS_STYLE.embed_dim
    rng = np.random.default_rng(0)
    hidden, following = (rng.normal(size=(2, T, D)).astype(np.float32) for _ in range(2))
    positions = np.broadcast_to(np.arange(T), (2, T))
    with torch.no_grad():
        expected = theirs.forward_layer(
            0,
            torch.tensor(hidden),
            torch.tensor(positions.copy()),
            MtpCache(config=main.config.get_mtp_config()),
            inputs_embeds=torch.tensor(following),
        )
    own = module(
        jnp.asarray(hidden),
        jnp.asarray(following),
        positions=jnp.asarray(positions, jnp.int32),
        valid=jnp.ones((2, T), bool),
    )
    np.testing.assert_allclose(own, expected.numpy(), rtol=0, atol=1e-5)
    again = load_multi_token(tmp_path / "whole", module)
    assert again is not None
    for name, value in parameters_by_name(module).items():
        np.testing.assert_array_equal(parameters_by_name(again)[name], value, name)
    plain = load_pretrained(tmp_path / "whole")
    save_pretrained(plain, tmp_path / "plain")
    assert load_multi_token(tmp_path / "plain", module) is None


def test_another_family_keeps_the_module_too(tmp_path: Path) -> None:
    decoder, module = random_decoder(GPT2_STYLE), random_module(GPT2_STYLE)
    save_pretrained(decoder, tmp_path / "whole", multi_token=module)
    again = load_multi_token(tmp_path / "whole", module)
    assert again is not None
    for name, value in parameters_by_name(module).items():
        np.testing.assert_array_equal(parameters_by_name(again)[name], value, name)
    assert load_pretrained(tmp_path / "whole").config.num_layers == GPT2_STYLE.num_layers
    wider = random_module(dataclasses.replace(GPT2_STYLE, mlp_dim=20))
    with pytest.raises(CoconutError, match=r"tensor transformer.h.2.mlp.c_fc.weight has shape \(16, 64\), the config"):
        load_multi_token(tmp_path / "whole", wider)


@pytest.mark.slow
def test_runs_and_exports(tmp_path: Path) -> None:
    """Weight 0 is the run without, to the bit; another trains the module, which exports and later runs keep."""
    run = tiny_run(curriculum={"steps_per_stage": 2})
    plain = train(run, tmp_path / "plain")
    nothing = train(dataclasses.replace(run, multi_token=MultiTokenConfig(weight=0.0)), tmp_path / "nothing")
    for name, value in parameters_of(plain.model).items():
        assert np.asarray(value).tobytes() == np.asarray(parameters_of(nothing.model)[name]).tobytes()
    further = dataclasses.replace(run, multi_token=MultiTokenConfig(weight=0.3, at_thoughts="thought"))
    trained = train(further, tmp_path / "further")
    assert '"multi_token"' in (tmp_path / "further" / "metrics.jsonl").read_text()
    module = {name: value for name, value in parameters_of(trained.model).items() if name.startswith("multi_token.")}
    assert module and not np.array_equal(module["multi_token.joined.kernel"], 0)
    other = parameters_of(trained.model)["decoder.layers.0.mlp.up.kernel"]
    assert not np.array_equal(other, parameters_of(plain.model)["decoder.layers.0.mlp.up.kernel"])

    loaded, _, _ = load_model(tmp_path / "further", "latest")
    other_weight = MultiTokenConfig(weight=0.1)
    again = dataclasses.replace(loaded.config, multi_token=other_weight, init_from=str(tmp_path / "further"))
    started = initial_model(dataclasses.replace(loaded, config=again))
    for name, value in module.items():
        np.testing.assert_array_equal(parameters_of(started)[name], value, name)
    assert started.parts["multi_token"].weight == 0.1
    export(tmp_path / "further", tmp_path / "exported", "latest")
    kept = load_multi_token(tmp_path / "exported", trained.model.parts["multi_token"])
    assert kept is not None
    for name, value in parameters_by_name(kept).items():
        np.testing.assert_array_equal(value, module[f"multi_token.{name}"], name)


def test_what_does_not_fit() -> None:
    with pytest.raises(CoconutError, match=r"MultiTokenConfig.weight = -1.0: must be at least 0 and finite"):
        MultiTokenConfig(weight=-1.0)
    with pytest.raises(CoconutError, match=r"MultiTokenConfig.at_thoughts = 'skipped'"):
        MultiTokenConfig(at_thoughts="skipped")  # type: ignore[arg-type]
    with pytest.raises(
        CoconutError, match=r"RunConfig.multi_token = .*: predicts tokens of rows .* 'colar' has others"
    ):
        tiny_run(method="colar", multi_token=MultiTokenConfig())
