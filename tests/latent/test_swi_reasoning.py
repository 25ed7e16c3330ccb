"""SwiReasoning against an obvious loop over each row alone, without a cache."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.generate import Generated, SamplingConfig, decode
from coconut.latent.halting import Mode
from coconut.latent.swi_reasoning import SwiReasoning, SwiReasoningConfig
from coconut.models.decoder import Decoder
from tests.latent.test_halting import CONFIG, EOS, entropy, read_in, run
from tests.tiny_models import quick_compilation, random_decoder

FIRST, START, END, LEAD = 1, 2, 3, (4, 5)
LIMIT = 16
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13], [7, 0]]
assert run  # A fixture; naming it in a test is what uses it.


@pytest.fixture(autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def generated(decoder: Decoder, config: SwiReasoningConfig, prompts: list[list[int]], **ids: Any) -> Generated:
    settings = {"first_id": FIRST, "start_id": START, "end_id": END, "lead_ids": LEAD, "keep_inputs": True, **ids}
    thinking = SwiReasoning(config=config, **settings)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    sampling = SamplingConfig(max_new_tokens=LIMIT)
    active = jnp.ones(len(prompts), bool)
    return decode(decoder, read_in(decoder, prompts), active, keys, thinking=thinking, sampling=sampling, eos_id=EOS)


def by_loop(run: Callable, decoder: Decoder, config: SwiReasoningConfig, prompt: list[int], seen: set[str]) -> Any:
    """Tokens, modes and thoughts of one row; ``seen`` collects what has happened."""
    table = np.asarray(decoder.tokens.embedding[...])
    inputs, tokens, modes, thoughts, to_read = [table[token] for token in prompt], [], [], [], []
    explicit = closed = False
    stayed, reference, switches, budget = 0, 0.0, 0, None
    for turn in range(LIMIT):
        if budget == 0:
            seen.add("budget")
            break
        _, logits = run(decoder, inputs)
        surprise = entropy(logits)
        reads, token = bool(to_read), int(np.argmax(logits))
        if reads:
            token = to_read.pop(0)
        elif token == END:
            closed = True
            seen.add("closed")
        stayed, switch = stayed + 1, None
        if turn == 0:
            reference, stayed = surprise, 0
        elif closed:
            explicit = True
        elif not explicit and surprise < reference:
            explicit, switch, switches = True, "explicit", switches + 1
        elif explicit and not reads and surprise > reference and stayed >= config.window:
            explicit, switch = False, "soft"
            seen.add("soft")
        explicit = explicit or closed
        if switch:
            stayed, reference = 0, surprise
        shares = np.exp(logits - logits.max())
        soft, share = shares / shares.sum() @ table, turn / LIMIT
        thinks = not explicit and not reads and token != EOS
        if thinks:
            made = soft
            if turn == 0:
                made = (1 - config.first_share) * soft + config.first_share * table[FIRST]
            elif switch == "soft":
                alpha = config.alpha + (1 - config.alpha) * share
                made = alpha * soft + (1 - alpha) * table[START]
            thoughts.append(made)
        elif switch == "explicit":
            beta = config.beta + (1 - config.beta) * share
            made = beta * soft + (1 - beta) * table[END]
        else:
            made = table[token]
        if config.switches is not None and switch == "explicit":
            if switches > 2 * config.switches:
                to_read, budget = [END, *LEAD], config.answer_tokens
                seen.add("lead")
            elif switches >= config.switches:
                to_read = [END]
        budget = budget if budget is None else budget - 1
        if token == EOS and not reads:
            return tokens, modes, thoughts, True
        inputs.append(made)
        tokens.append(token)
        modes.append(Mode.READING if reads else Mode.THINKING if thinks else Mode.WRITING)
    return tokens, modes, thoughts, False


@pytest.mark.parametrize(
    "seed, config, happens",
    [
        (10, SwiReasoningConfig(alpha=0.4, window=2), {"soft", "closed"}),
        (3, SwiReasoningConfig(alpha=0.8, window=1, switches=1, answer_tokens=6), {"soft", "lead", "budget"}),
    ],
)
def test_every_row_equals_a_loop_over_that_row_alone(
    seed: int, config: SwiReasoningConfig, happens: set[str], run: Callable
) -> None:
    decoder, seen = random_decoder(CONFIG, seed=seed), set()
    found = generated(decoder, config, PROMPTS)
    blocks = found.blocks
    assert blocks is not None and blocks.inputs is not None
    for row, prompt in enumerate(PROMPTS):
        tokens, modes, thoughts, ended = by_loop(run, decoder, config, prompt, seen)
        length = int(found.lengths[row])
        assert found.tokens[row].tolist() == tokens + [EOS] * (LIMIT - length)
        assert blocks.modes[row, :length].tolist() == modes
        made = np.asarray(blocks.inputs)[row, np.asarray(blocks.modes)[row] == Mode.THINKING]
        np.testing.assert_allclose(made, np.reshape(thoughts, (-1, CONFIG.embed_dim)), rtol=0, atol=3e-5)
        assert (int(blocks.thoughts[row]), bool(found.ended[row])) == (len(thoughts), ended)
    assert seen >= happens


@pytest.mark.slow
def test_a_model_without_markers_switches_all_the_same() -> None:
    config = SwiReasoningConfig(window=1, switches=1, answer_tokens=6, start="", end="")
    found = generated(random_decoder(CONFIG, seed=3), config, PROMPTS, start_id=None, end_id=None)
    assert found.blocks is not None
    modes = np.asarray(found.blocks.modes)
    assert set(np.unique(modes)) >= {Mode.THINKING, Mode.WRITING, Mode.READING}
    # What is read is the lead alone.
    assert set(np.asarray(found.tokens)[modes == Mode.READING]) == set(LEAD)


@pytest.mark.parametrize(
    "field, value, message",
    [("alpha", 1.5, "must be a share"), ("window", 0, "must be at least 1"), ("switches", 0, "must be at least 1")],
)
def test_a_setting_out_of_range_is_named_with_its_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(CoconutError, match=rf"SwiReasoningConfig\.{field} = {value!r}: {message}"):
        dataclasses.replace(SwiReasoningConfig(), **{field: value})
