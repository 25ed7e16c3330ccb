"""Our decoder against `transformers`, by family: logits, gradients, greedy generation, and the latent forward."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from coconut.latent.generate import SamplingConfig, decode, prefill
from coconut.latent.rollout import rollout
from coconut.models.config import ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_pretrained
from coconut.types import Language, Latent
from tests.tiny_huggingface import CONFIGS, VOCABULARY, corrections, random_model, tensors_of_decoder
from tests.tiny_models import quick_compilation, quick_jit

LOGITS = 2e-5  # Absolute, for logits of a scale of one.
GRADIENTS = 1e-4  # Relative to the norm of each tensor's gradient.


@dataclasses.dataclass(frozen=True)
class Pair:
    theirs: Any
    ours: Decoder


# Every family, and every implementation of attention; heads of 16 are the narrowest that the GPU's kernels take.
PAIRS = [
    *((name, "dense") for name in CONFIGS),
    *(
        pytest.param(("llama_wide_heads", attention), marks=pytest.mark.slow)
        for attention in ("reference", "xla", "tpu_interpret", "gpu_interpret")
    ),
]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, attention = request.param
    model = random_model(name)
    folder: Path = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return Pair(model, load_pretrained(folder, execution=ExecutionConfig(attention=attention)))


def left_padded(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, validity and positions of rows padded on the left."""
    width = max(lengths)
    valid = np.arange(width) >= width - np.asarray(lengths)[:, None]
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, valid.shape).astype(np.int32)
    return tokens, valid, np.where(valid, np.cumsum(valid, 1) - 1, 0).astype(np.int32)


def assert_same_gradients(ours: Decoder, model: Any) -> None:
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    mine = tensors_of_decoder(ours)
    for name, _ in corrections(model):  # They choose experts, and have no gradient.
        assert not mine.pop(name).any()
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        norm = np.linalg.norm(gradient)
        assert norm > 1e-3, name
        assert np.linalg.norm(mine[name] - gradient) <= GRADIENTS * norm, name


def test_logits_and_gradients(pair: Pair) -> None:
    tokens, valid, positions = left_padded((9, 6, 3))
    weights = np.random.default_rng(1).normal(size=(*tokens.shape, VOCABULARY)).astype(np.float32) * valid[..., None]

    def weighed(decoder: Decoder) -> tuple[jax.Array, jax.Array]:
        inputs = decoder.embed(jnp.asarray(tokens))
        hidden, _ = decoder.trunk(inputs, positions=jnp.asarray(positions), valid=jnp.asarray(valid))
        logits = decoder.unembed(hidden)
        return jnp.sum(logits * weights), logits

    (_, logits), gradients = quick_jit(jax.value_and_grad(weighed, has_aux=True))(pair.ours)
    pair.theirs.zero_grad()
    theirs = pair.theirs(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(valid).long(),
        position_ids=torch.tensor(positions).long(),
    ).logits
    torch.sum(theirs * torch.tensor(weights)).backward()
    expected = theirs.detach().numpy()[valid]
    assert 0.5 < expected.std() < 2.0
    np.testing.assert_allclose(np.asarray(logits)[valid], expected, rtol=0, atol=LOGITS)
    assert_same_gradients(gradients, pair.theirs)


@pytest.mark.parametrize("name", ["deepseek_v2_grouped", "deepseek_v3_plain"])
def test_logits_of_other_choices(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 20)).astype(np.int32)

    def logits(decoder: Decoder) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
        hidden, _ = decoder.trunk(
            decoder.embed(jnp.asarray(tokens)), positions=positions, valid=jnp.ones((2, 20), bool)
        )
        return decoder.unembed(hidden)

    theirs = model(torch.tensor(tokens).long()).logits.detach().numpy()
    assert 0.3 < theirs.std() < 3.0
    np.testing.assert_allclose(quick_jit(logits)(load_pretrained(tmp_path)), theirs, rtol=0, atol=1e-5)


def test_greedy_generation(pair: Pair) -> None:
    tokens, valid, _ = left_padded((7, 5, 2))
    new = 8
    with quick_compilation():
        prefix = prefill(pair.ours, jnp.asarray(tokens), jnp.asarray(valid))
        rows = len(tokens)
        # No logit belongs to the id of EOS: all rows write all tokens.
        generated = decode(
            pair.ours,
            prefix,
            jnp.ones(rows, bool),
            jax.random.split(jax.random.key(0), rows),
            sampling=SamplingConfig(max_new_tokens=new),
            eos_id=VOCABULARY,
        )
    theirs = pair.theirs.generate(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(valid).long(),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(generated.tokens, theirs[:, tokens.shape[1] :].numpy())


PROMPTS, THOUGHTS, SUFFIXES = (4, 2, 3), (3, 1, 2), (2, 3, 3)


def think_slowly(model: Any, prompt: torch.Tensor, thoughts: int, suffix: torch.Tensor) -> tuple[Any, Any]:
    """Thoughts and suffix logits of one row: for each thought the whole sequence again."""
    embed = model.get_input_embeddings()
    inputs = embed(prompt)[None]
    for _ in range(thoughts):
        # The base model's last hidden state is the one after the final norm.
        hidden = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        inputs = torch.cat([inputs, hidden[:, -1:]], 1)
    made = inputs[0, len(prompt) :]
    inputs = torch.cat([inputs, embed(suffix)[None]], 1)
    return made, model(inputs_embeds=inputs, use_cache=False).logits[0, -len(suffix) :]


def test_latent_forward_and_gradients(pair: Pair) -> None:
    schedule = (Language(max(PROMPTS)), Latent(max(THOUGHTS)), Language(max(SUFFIXES)))
    P, K, S = (span.length for span in schedule)
    valid = np.concatenate(
        [
            np.arange(P) >= P - np.asarray(PROMPTS)[:, None],
            np.arange(K) < np.asarray(THOUGHTS)[:, None],
            np.arange(S) < np.asarray(SUFFIXES)[:, None],
        ],
        axis=1,
    )
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCABULARY, valid.shape).astype(np.int32)
    positions = np.where(valid, np.cumsum(valid, 1) - 1, 0).astype(np.int32)
    D = pair.ours.config.embed_dim
    of_thoughts = rng.normal(size=(len(valid), K, D)).astype(np.float32) * valid[:, P : P + K, None]
    of_logits = rng.normal(size=(len(valid), S, VOCABULARY)).astype(np.float32) * valid[:, P + K :, None]

    def weighed(decoder: Decoder) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        output = rollout(
            decoder,
            schedule,
            tokens=jnp.asarray(tokens),
            positions=jnp.asarray(positions),
            valid=jnp.asarray(valid),
            every_hidden=True,
        )
        assert output.hidden is not None
        (thoughts,), logits = output.thoughts, decoder.unembed(output.hidden[:, P + K :])
        return jnp.sum(thoughts * of_thoughts) + jnp.sum(logits * of_logits), (thoughts, logits)

    (_, (thoughts, logits)), gradients = quick_jit(jax.value_and_grad(weighed, has_aux=True))(pair.ours)
    pair.theirs.zero_grad()
    total = torch.zeros(())
    for row, (prompt, count, suffix) in enumerate(zip(PROMPTS, THOUGHTS, SUFFIXES, strict=True)):
        ids = torch.tensor(tokens[row]).long()
        made, theirs = think_slowly(pair.theirs, ids[P - prompt : P], count, ids[P + K :][:suffix])
        np.testing.assert_allclose(np.asarray(thoughts)[row, :count], made.detach(), rtol=0, atol=LOGITS)
        np.testing.assert_allclose(np.asarray(logits)[row, :suffix], theirs.detach(), rtol=0, atol=LOGITS)
        total = total + torch.sum(made * torch.tensor(of_thoughts[row, :count]))
        total = total + torch.sum(theirs * torch.tensor(of_logits[row, :suffix]))
    total.backward()
    assert_same_gradients(gradients, pair.theirs)
