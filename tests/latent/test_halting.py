"""Rows that think on their own: against an obvious loop without a cache, and where the answer is known beforehand."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from coconut.latent.feedback import Identity
from coconut.latent.generate import Generated, Prefix, SamplingConfig, decode, prefill
from coconut.latent.halting import HaltingConfig, Mode, Thinking
from coconut.models.decoder import Decoder
from tests.tiny_models import LLAMA_STYLE, quick_compilation, quick_jit, random_decoder

CONFIG = dataclasses.replace(LLAMA_STYLE, num_layers=1)
START, LATENT, EOS, END = 0, 20, 21, 22
LIMIT, ROOM = 10, 7
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13], [7, START]]


@pytest.fixture(autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """A stop head that reads one direction."""

    direction: Array

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        del decoder
        return hidden @ self.direction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Next:
    """A feedback that counts: the thought behind the state of token ``t`` looks like token ``t + 1``."""

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return jnp.roll(hidden, 1, -1) / decoder.config.embed_dim**0.5


def read_in(decoder: Decoder, prompts: list[list[int]]) -> Prefix:
    """The prompts, aligned to the right."""
    width = max(map(len, prompts))
    tokens, valid = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for index, prompt in enumerate(prompts):
        tokens[index, width - len(prompt) :], valid[index, width - len(prompt) :] = prompt, True
    return prefill(decoder, tokens, valid)


def generated(
    decoder: Decoder, prompts: list[list[int]], thinking: Thinking | None, *, seeds: list[int] | None = None, **sampling
) -> Generated:
    rows = len(prompts)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.asarray(seeds or range(rows)))
    settings = SamplingConfig(**{"max_new_tokens": LIMIT} | sampling)
    prefix = read_in(decoder, prompts)
    return decode(decoder, prefix, jnp.ones(rows, bool), keys, thinking=thinking, sampling=settings, eos_id=EOS)


def thinking_of(config: HaltingConfig, **parts: Any) -> Thinking:
    ids = {"start_id": START, "latent_id": LATENT, "end_id": END}
    return Thinking(**{"feedback": Identity(), "config": config, "keep_inputs": True} | ids | parts)


# --- Against a loop -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> Callable[[Decoder, list[np.ndarray]], tuple[np.ndarray, np.ndarray]]:
    """The last state and the logits behind some inputs, without a cache."""
    width = max(map(len, PROMPTS)) + LIMIT + ROOM

    @quick_jit
    def padded(decoder: Decoder, inputs: Array, used: Array) -> tuple[Array, Array]:
        columns = jnp.arange(width)
        hidden, _ = decoder.trunk(inputs[None], positions=columns[None], valid=(columns < used)[None])
        return hidden[0, used - 1], decoder.unembed(hidden[0, used - 1])

    def run(decoder: Decoder, inputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        filled = np.zeros((width, CONFIG.embed_dim), np.float32)
        filled[: len(inputs)] = inputs
        hidden, logits = padded(decoder, jnp.asarray(filled), jnp.asarray(len(inputs)))
        return np.asarray(hidden), np.asarray(logits)

    return run


def by_loop(run: Callable, decoder: Decoder, prompt: list[int], is_over: Callable, least: int, most: int) -> Any:
    """One row on its own, column by column: its tokens, modes, thoughts, number of blocks, and how it ended."""
    table = np.asarray(decoder.tokens.embedding[...])
    inputs, tokens, modes, thoughts = [table[token] for token in prompt], [], [], []
    written, blocks, made, how = 0, 0, None, "limit"
    if prompt[-1] == START:
        made, blocks = 0, 1
    while made is not None or written < LIMIT:
        hidden, logits = run(decoder, inputs)
        if made is not None:
            full = made == most or len(thoughts) == ROOM
            if made < least or not (full or is_over(hidden, logits)):
                thoughts.append(hidden)
                inputs.append(hidden)
                tokens.append(LATENT)
                modes.append(Mode.THINKING)
                made += 1
                continue
            token, mode, made = END, Mode.READING, None
        else:
            token, mode = int(np.argmax(logits)), Mode.WRITING
        written += 1
        if token == EOS and mode == Mode.WRITING:
            how = "eos"
            break
        inputs.append(table[token])
        tokens.append(token)
        modes.append(mode)
        if token == START:
            if ROOM - len(thoughts) < least or written == LIMIT:
                how = "cut"
                break
            made, blocks = 0, blocks + 1
    return tokens, modes, thoughts, blocks, how


def entropy(logits: np.ndarray) -> float:
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return float(-(shares * np.log(shares)).sum())


DIRECTION = np.random.default_rng(4).normal(size=CONFIG.embed_dim).astype(np.float32)
HEAD, BOUND = 0.4, 2.0
STOPS: dict[str, tuple[HaltingConfig, dict[str, Any], Callable]] = {
    "count": (HaltingConfig(most=3, room=ROOM), {}, lambda hidden, logits: False),
    "head": (
        HaltingConfig(stop="head", threshold=HEAD, most=4, room=ROOM),
        {"halt": Probe(jnp.asarray(DIRECTION))},
        lambda hidden, logits: 1 / (1 + np.exp(-hidden @ DIRECTION)) >= HEAD,
    ),
    "token": (
        HaltingConfig(stop="token", tokens=("end", "eos"), least=0, most=4, room=ROOM),
        {},
        lambda hidden, logits: np.argmax(logits) in (END, EOS),
    ),
    "entropy": (
        HaltingConfig(stop="entropy", threshold=BOUND, least=2, most=5, room=ROOM),
        {},
        lambda hidden, logits: entropy(logits) < BOUND,
    ),
}


@pytest.mark.parametrize("stop", STOPS)
def test_every_row_equals_a_loop_over_that_row_alone(stop: str, run: Callable) -> None:
    config, parts, is_over = STOPS[stop]
    decoder = random_decoder(CONFIG, seed=3)
    opened = jnp.asarray([prompt[-1] == START for prompt in PROMPTS])
    seen = generated(decoder, PROMPTS, thinking_of(config, opened=opened, **parts))
    blocks = seen.blocks
    assert blocks is not None and blocks.inputs is not None
    least = config.most if stop == "count" else config.least
    for row, prompt in enumerate(PROMPTS):
        tokens, modes, thoughts, number, how = by_loop(run, decoder, prompt, is_over, least, config.most)
        length = int(seen.lengths[row])
        print(stop, row, tokens, [m.name[0] for m in modes], number, how)
        assert seen.tokens[row].tolist() == tokens + [EOS] * (LIMIT + ROOM - length)
        assert blocks.modes[row, :length].tolist() == modes
        assert (np.asarray(blocks.modes)[row, length + (how == "eos") :] == Mode.DONE).all()
        made = np.asarray(blocks.inputs)[row, np.asarray(blocks.modes)[row] == Mode.THINKING]
        np.testing.assert_allclose(made, np.reshape(thoughts, (-1, CONFIG.embed_dim)), rtol=0, atol=3e-5)
        assert (int(blocks.thoughts[row]), int(blocks.number[row])) == (len(thoughts), number)
        assert int(blocks.written[row]) == len(tokens) - len(thoughts) + (how == "eos")
        assert (bool(seen.ended[row]), bool(blocks.cut[row])) == (how == "eos", how == "cut")
