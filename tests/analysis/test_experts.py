"""Which experts columns use: chosen as by the layers themselves, shares and distances as counted by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from coconut.analysis.experts import chosen_experts, column_kinds, expert_use
from coconut.analysis.traces import lay_out, place_thoughts, run_layers
from coconut.errors import CoconutError
from coconut.pages import Text
from coconut.tokenizers import symbol_tokenizer
from tests.tiny_models import EXPERTS_STYLE, GPT2_STYLE, random_decoder
from tests.tiny_pages import thinking_page

TOKENIZER = symbol_tokenizer([str(number) for number in range(20)])
CONFIG = dataclasses.replace(EXPERTS_STYLE, vocab_size=TOKENIZER.vocab_size)
PAGES = [
    thinking_page(TOKENIZER, np.arange(2 + index, dtype=np.int32), 1 + index, np.arange(3, 5, dtype=np.int32))
    for index in range(2)
]


def test_choices_are_those_of_the_layers() -> None:
    """The routers asked with what each layer's MLP reads, as `run_layers` has it."""
    decoder, rng = random_decoder(CONFIG), np.random.default_rng(0)
    thoughts = [rng.normal(size=(1 + row, CONFIG.embed_dim)).astype(np.float32) for row in range(2)]
    rows = lay_out(PAGES, TOKENIZER, thoughts)
    [chosen] = chosen_experts(decoder, rows, batch_size=1)
    tokens, columns, inputs = map(jnp.asarray, (rows.tokens, rows.thoughts, rows.inputs))
    embedded = place_thoughts(decoder.embed(tokens), columns, inputs)
    everywhere = jnp.broadcast_to(jnp.arange(rows.valid.shape[1]), rows.valid.shape)
    found = run_layers(
        decoder, embedded, positions=jnp.asarray(rows.positions), valid=jnp.asarray(rows.valid), wanted=everywhere
    )
    layer = decoder.layers[1]
    made, _ = layer.mlp.router(layer.mlp_norm(found.states[1] + found.attention[1]))
    for ours, theirs in zip(chosen[rows.valid], np.asarray(made)[rows.valid], strict=True):
        assert set(ours) == set(theirs)
    kinds = column_kinds(rows, {"start marker": TOKENIZER.start_latent_id, "end marker": TOKENIZER.end_latent_id})
    assert {name: int(own.sum()) for name, own in kinds.items()} == {
        "thought 1": 2,
        "thought 2": 1,
        "question": 5,
        "start marker": 2,
        "end marker": 2,
        "written text": sum(len(part.ids) for page in PAGES for part in page[-1:] if isinstance(part, Text)),
    }


def test_distances_and_shares_are_what_was_put_in() -> None:
    """Thoughts use expert 0, tokens 1 and 2 in equal parts; by chance tokens are near to tokens."""
    number, width = 40, 21
    chosen = np.zeros((1, number, width, 1), int)
    chosen[0, :, 1:, 0] = 1 + np.arange(width - 1) % 2
    kinds = {
        "question": np.broadcast_to(np.arange(width) > 0, (number, width)),
        "thought 1": np.broadcast_to(np.arange(width) == 0, (number, width)),
    }
    use = expert_use(chosen, kinds, 4, layers=[2])
    assert use.kinds == ("thought 1", "question") and use.columns == (40, 800)
    np.testing.assert_allclose(use.shares[0], [[1, 0, 0, 0], [0, 0.5, 0.5, 0]])
    np.testing.assert_allclose(use.between[0], [[0, 1], [1, 0]])
    np.testing.assert_allclose([use.distance[0], *use.interval[:, 0]], 1)
    assert 0 < use.of_tokens[0] < 0.15 < use.of_tokens_interval[1, 0] + 0.1
    np.testing.assert_allclose([use.evenness["thoughts"][0], use.evenness["tokens"][0]], [0, 0.5])
    # Where thoughts choose as tokens do, they are as near as tokens are.
    chosen[0, :, 0, 0] = 1 + np.arange(number) % 2
    assert expert_use(chosen, kinds, 4, layers=[2]).distance[0] < 0.01
    with pytest.raises(CoconutError, match="need thoughts and tokens"):
        expert_use(chosen, {"question": kinds["question"]}, 4, layers=[2])


def test_a_decoder_without_experts_is_refused() -> None:
    rows = lay_out(PAGES, TOKENIZER, None)
    with pytest.raises(CoconutError, match=r"DecoderConfig.experts = None: there are no experts"):
        chosen_experts(random_decoder(GPT2_STYLE), rows)
