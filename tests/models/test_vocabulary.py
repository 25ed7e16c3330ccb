"""New tokens start as copies, in our decoder as in `transformers`."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import AutoModelForCausalLM

from coconut.errors import CoconutError
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_pretrained, save_pretrained
from coconut.models.parameters import decoder_parameters
from coconut.models.vocabulary import copy_token, resize_vocabulary
from tests.tiny_huggingface import CONFIGS, VOCABULARY, random_model
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder

SOURCE = 5
MARKERS = (VOCABULARY, VOCABULARY + 1, VOCABULARY + 2)
RESERVED = (2, 17, 20)


def logits(decoder: Decoder, *rows: list[list[int]]) -> list[np.ndarray]:
    """Logits of several batches of one shape."""

    def forward(decoder: Decoder, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = decoder.trunk(decoder.embed(tokens), positions=positions, valid=jnp.ones(tokens.shape, bool))
        return decoder.unembed(hidden)

    forward = quick_jit(forward)
    return [np.asarray(forward(decoder, jnp.asarray(tokens))) for tokens in rows]


@pytest.mark.parametrize("way", ["resize", "reserved"])
@pytest.mark.parametrize("name", CONFIGS)
def test_markers_are_copies_and_transformers_agrees(name: str, way: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    old = load_pretrained(tmp_path / "theirs")
    if way == "resize":
        new, markers = resize_vocabulary(old, VOCABULARY + 3, copy_from=SOURCE), MARKERS
        model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    else:
        new, markers = copy_token(old, RESERVED, copy_from=SOURCE), RESERVED
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[list(markers)] = table[SOURCE].clone()
    assert new.config == dataclasses.replace(old.config, vocab_size=VOCABULARY + (3 if way == "resize" else 0))
    save_pretrained(new, tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tensors = theirs.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensors[key], tensor), key
    for key, value in decoder_parameters(again).items():
        np.testing.assert_array_equal(value, decoder_parameters(new)[key], key)
    tokens = [[1, markers[0], 3], [markers[2], 4, markers[1]]]
    ours, as_source = logits(again, tokens, [[1, SOURCE, 3], [SOURCE, 4, SOURCE]])
    np.testing.assert_allclose(ours, theirs(torch.tensor(tokens)).logits.detach(), rtol=0, atol=2e-5)
    # A marker is read and predicted as the token it was copied from.
    np.testing.assert_array_equal(ours, as_source)
    np.testing.assert_allclose(ours[..., list(markers)], ours[..., [SOURCE] * 3], rtol=0, atol=1e-6)
    # The decoder given is as it was, and so are the other tokens.
    before, after = np.asarray(old.tokens.embedding[...]), np.asarray(new.tokens.embedding[...])
    np.testing.assert_array_equal(before, load_pretrained(tmp_path / "theirs").tokens.embedding[...])
    others = [token for token in range(VOCABULARY) if token not in markers]
    np.testing.assert_array_equal(after[others], before[others])


def test_what_is_no_token_or_no_growth_is_named() -> None:
    decoder = random_decoder(GPT2_STYLE)
    with pytest.raises(CoconutError, match="vocab_size = 22: the decoder has 23 tokens"):
        resize_vocabulary(decoder, 22, copy_from=0)
    for token in (-1, 23):
        with pytest.raises(CoconutError, match=f"copy_from: {token} is no token"):
            resize_vocabulary(decoder, 26, copy_from=token)
        with pytest.raises(CoconutError, match=f"ids: {token} is no token"):
            copy_token(decoder, [1, token], copy_from=0)
