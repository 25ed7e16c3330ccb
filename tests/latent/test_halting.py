"""Rows that think on their own: against an obvious loop without a cache, and where the answer is known beforehand."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from coconut.errors import CoconutError
from coconut.latent.generate import Generated, Prefix, SamplingConfig, decode, prefill, think_on
from coconut.latent.halting import HaltingConfig, Mode, Thinking
from coconut.latent.thinkers import Sweeps
from coconut.models.decoder import Decoder
from tests.tiny_models import LLAMA_STYLE, quick_compilation, quick_jit, random_decoder

CONFIG = dataclasses.replace(LLAMA_STYLE, num_layers=1)
START, LATENT, EOS, END = 0, 20, 21, 22
NEVER = CONFIG.vocab_size  # no token
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
class Shift:
    """A feedback whose thoughts differ much: the components of the state, each moved by one."""

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Array | None = None
    ) -> Float[Array, "*B D"]:
        del decoder, keys
        return jnp.roll(hidden, 1, -1)


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
    ids: dict[str, Any] = {"start_id": START, "latent_id": LATENT, "end_id": END}
    return Thinking(**{"feedback": Shift(), "config": config, "keep_inputs": True, **ids, **parts})


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
    """One row on its own, column by column: tokens, modes, thoughts, blocks, those its rule stopped, how it ended.

    The rule sees the state and the logits of each of the block's columns so far; of its thoughts alone, where it must
    have one.
    """
    table = np.asarray(decoder.tokens.embedding[...])
    inputs, tokens, modes, thoughts, block = [table[token] for token in prompt], [], [], [], []
    written, blocks, stopped, made, how = 0, 0, 0, None, "limit"
    if prompt[-1] == START:
        made, blocks = 0, 1
    while made is not None or written < LIMIT:
        hidden, logits = run(decoder, inputs)
        if made is not None:
            full = made == most or len(thoughts) == ROOM
            if made >= min(least, 1):
                block.append((hidden, logits))
            if made < least or not (full or is_over(block)):
                thoughts.append(np.roll(hidden, 1))
                inputs.append(thoughts[-1])
                tokens.append(LATENT)
                modes.append(Mode.THINKING)
                made += 1
                continue
            token, mode, made, stopped, block = END, Mode.READING, None, stopped + (not full), []
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
    return tokens, modes, thoughts, blocks, stopped, how


def entropy(logits: np.ndarray) -> float:
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return float(-(shares * np.log(shares)).sum())


def probability(hidden: np.ndarray) -> float:
    return float(1 / (1 + np.exp(-hidden @ DIRECTION)))


DIRECTION = np.random.default_rng(4).normal(size=CONFIG.embed_dim).astype(np.float32)
HEAD, SUM, BOUND, PATIENT, TEXT = 0.4, 0.5, 2.3, 1.3, 14
PROBE = {"halt": Probe(jnp.asarray(DIRECTION))}
STOPS: dict[str, tuple[HaltingConfig, dict[str, Any], Callable]] = {
    "count": (HaltingConfig(most=3, room=ROOM), {}, lambda block: False),
    "head": (
        HaltingConfig(stop="head", threshold=HEAD, most=4, room=ROOM),
        PROBE,
        lambda block: probability(block[-1][0]) >= HEAD,
    ),
    "cumulative": (
        HaltingConfig(stop="cumulative", threshold=SUM, most=5, room=ROOM),
        PROBE,
        lambda block: 1 - np.prod([1 - probability(hidden) for hidden, _ in block]) > SUM,
    ),
    "token": (
        HaltingConfig(stop="token", tokens=("end", "eos"), least=0, most=4, room=ROOM),
        {},
        lambda block: np.argmax(block[-1][1]) in (END, EOS),
    ),
    "entropy": (
        HaltingConfig(stop="entropy", threshold=BOUND, least=2, most=5, room=ROOM),
        {},
        lambda block: entropy(block[-1][1]) < BOUND,
    ),
    "patience": (  # or a token, whichever comes first
        HaltingConfig(
            stop="entropy", threshold=PATIENT, patience=2, temperature=0.5, texts=("x",), least=0, most=5, room=ROOM
        ),
        {"text_ids": (TEXT,)},
        lambda block: (
            np.argmax(block[-1][1]) == TEXT
            or all(len(block) > 1 and entropy(logits / 0.5) < PATIENT for _, logits in block[-2:])
        ),
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
    least, stopped, numbers = config.most if stop == "count" else config.least, 0, set()
    for row, prompt in enumerate(PROMPTS):
        tokens, modes, thoughts, number, by_rule, how = by_loop(run, decoder, prompt, is_over, least, config.most)
        length = int(seen.lengths[row])
        stopped, numbers = stopped + by_rule, numbers | {number}
        assert seen.tokens[row].tolist() == tokens + [EOS] * (LIMIT + ROOM - length)
        assert blocks.modes[row, :length].tolist() == modes
        assert (np.asarray(blocks.modes)[row, length + (how == "eos") :] == Mode.DONE).all()
        made = np.asarray(blocks.inputs)[row, np.asarray(blocks.modes)[row] == Mode.THINKING]
        np.testing.assert_allclose(made, np.reshape(thoughts, (-1, CONFIG.embed_dim)), rtol=0, atol=3e-5)
        assert (int(blocks.thoughts[row]), int(blocks.number[row])) == (len(thoughts), number)
        assert int(blocks.written[row]) == len(tokens) - len(thoughts) + (how == "eos")
        assert (bool(seen.ended[row]), bool(blocks.cut[row])) == (how == "eos", how == "cut")
    # Rows without a block, with one and with two; blocks that the rule stopped, and others.
    assert numbers == {0, 1, 2} and bool(stopped) == (stop != "count")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A feedback that adds noise. It has no parameters."""

    def __call__(self, decoder: Decoder, hidden: Array, *, keys: Array | None = None) -> Array:
        assert keys is not None
        draw = lambda key: jax.random.normal(key, hidden.shape[-1:], hidden.dtype)
        return jnp.roll(hidden, 1, -1) + jax.vmap(draw)(keys.reshape(-1)).reshape(hidden.shape)


jax.tree_util.register_static(Drawing)


@pytest.mark.slow
def test_a_row_knows_nothing_of_its_neighbours() -> None:
    decoder, config = random_decoder(CONFIG, seed=3), HaltingConfig(least=0, most=4, room=ROOM)

    def see(rows: list[int]) -> Generated:
        seeds = [7 + row for row in rows]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.asarray(seeds))
        counts = jnp.asarray([2, 1, 4, 3, 3])[jnp.asarray(rows)]
        opened = jnp.asarray(rows) == 4
        thinking = thinking_of(config, feedback=Drawing(), keys=keys, counts=counts, opened=opened)
        return generated(decoder, [PROMPTS[row] for row in rows], thinking, seeds=seeds, temperature=1.5, top_k=6)

    seen, moved = see([0, 1, 2, 3, 4]), see([3, 0, 0, 0, 1])
    assert int(jnp.count_nonzero(seen.blocks.thoughts)) > 2  # pyright: ignore[reportOptionalMemberAccess]
    for ours, theirs in zip(jax.tree.leaves(moved), jax.tree.leaves(seen), strict=True):
        np.testing.assert_allclose(ours[jnp.asarray([0, 1, 4])], theirs[jnp.asarray([3, 0, 1])], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_block_that_the_prefix_opens_equals_a_block_of_a_known_number() -> None:
    """The machine against `think_on` and `decode`, also where the feedback draws."""
    decoder, prompts, counts = random_decoder(CONFIG, seed=3), PROMPTS[:3], jnp.asarray([2, 0, 3])
    keys = jax.random.split(jax.random.key(2), 3)
    config = HaltingConfig(least=0, most=3, room=3)
    opened = jnp.ones(3, bool)
    thinking = thinking_of(config, feedback=Drawing(), keys=keys, counts=counts, opened=opened, start_id=NEVER)
    seen = generated(decoder, prompts, thinking)
    prefix, thoughts = think_on(decoder, Drawing(), read_in(decoder, prompts), counts, room=3, keys=keys)
    end = jnp.full((3, 1), END)
    settings = SamplingConfig(max_new_tokens=LIMIT - 1)
    known = decode(decoder, prefix, jnp.ones(3, bool), keys, forced=end, sampling=settings, eos_id=EOS)
    assert seen.blocks is not None and seen.blocks.inputs is not None
    for row, count in enumerate(counts.tolist()):
        written = int(known.lengths[row])
        assert seen.tokens[row, : count + 1].tolist() == [LATENT] * count + [END]
        assert seen.tokens[row, count + 1 : count + 1 + written].tolist() == known.tokens[row, :written].tolist()
        np.testing.assert_allclose(seen.blocks.inputs[row, :count], thoughts[row, :count], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_without_a_start_marker_tokens_are_those_of_a_row_that_cannot_think() -> None:
    decoder = random_decoder(CONFIG, seed=3)
    plain = generated(decoder, PROMPTS, None)
    never = thinking_of(HaltingConfig(room=ROOM), start_id=NEVER)
    seen = generated(decoder, PROMPTS, never)
    assert plain.blocks is None and seen.blocks is not None
    assert seen.tokens[:, :LIMIT].tolist() == plain.tokens.tolist() and (seen.tokens[:, LIMIT:] == EOS).all()
    assert seen.lengths.tolist() == plain.lengths.tolist() and seen.ended.tolist() == plain.ended.tolist()
    assert not seen.blocks.number.any() and not seen.blocks.thoughts.any()


@pytest.mark.slow
def test_what_is_read_behind_the_block_that_the_prefix_opened() -> None:
    """More than an end marker is as if it had been forced."""
    decoder, prompts, counts, behind = random_decoder(CONFIG, seed=3), PROMPTS[:2], jnp.asarray([2, 3]), (END, 5, 6)
    config, opened = HaltingConfig(most=3, room=3), jnp.ones(2, bool)
    thinking = thinking_of(config, counts=counts, opened=opened, start_id=None, latent_id=None, behind=behind)
    seen = generated(decoder, prompts, thinking)
    prefix, _ = think_on(decoder, Shift(), read_in(decoder, prompts), counts, room=3)
    settings = SamplingConfig(max_new_tokens=LIMIT - len(behind))
    forced = jnp.asarray([behind] * 2, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    known = decode(decoder, prefix, jnp.ones(2, bool), keys, forced=forced, sampling=settings, eos_id=EOS)
    assert seen.blocks is not None and seen.blocks.inputs is not None
    head = np.asarray(decoder.head.kernel[...])
    for row, count in enumerate(counts.tolist()):
        written = known.tokens[row, : int(known.lengths[row])].tolist()
        assert seen.tokens[row, count : int(seen.lengths[row])].tolist() == [*behind, *written]
        assert (seen.blocks.modes[row, count : count + len(behind)] == Mode.READING).all()
        # Without an id for thoughts the record is what is most likely where each was made.
        states = np.roll(seen.blocks.inputs[row, :count], -1, -1)
        assert seen.tokens[row, :count].tolist() == (states @ head).argmax(-1).tolist()


# --- Where the answer is known ------------------------------------------------------------------------------------


def scripted(following: dict[int, int]) -> Decoder:
    """A decoder without layers to speak of: what it writes behind a token depends on the token alone."""
    config = dataclasses.replace(CONFIG, vocab_size=24, embed_dim=24)
    decoder, table = jax.tree.map(jnp.zeros_like, random_decoder(config)), np.zeros((24, 24), np.float32)
    for token, behind in following.items():
        table[token, behind] = 1.0
    decoder.norm.scale[...] = jnp.ones(24)
    decoder.tokens.embedding[...] = jnp.eye(24)
    decoder.head.kernel[...] = jnp.asarray(table)
    return decoder


@pytest.mark.slow
def test_a_row_that_opens_a_block_without_room_for_it_is_cut() -> None:
    # Behind every block the next one is opened at once; token 3 is followed by 4 for ever.
    decoder = scripted({START: 5, END: START, 1: START, 3: 4, 4: 4, 2: EOS})
    config = HaltingConfig(least=1, most=3, room=5)
    counts = jnp.asarray([1, 2, 3, 9, 1, 1])
    seen = generated(decoder, [[1]] * 4 + [[3], [2]], thinking_of(config, counts=counts), max_new_tokens=20)
    blocks = seen.blocks
    assert blocks is not None
    assert blocks.number.tolist() == [5, 2, 1, 1, 0, 0]
    assert blocks.thoughts.tolist() == [5, 4, 3, 3, 0, 0]  # 9 is above the most
    assert blocks.cut.tolist() == [True] * 4 + [False] * 2
    assert blocks.written.tolist() == [11, 5, 3, 3, 20, 1]
    assert seen.lengths.tolist() == [16, 9, 6, 6, 20, 0]
    assert seen.ended.tolist() == [False] * 5 + [True]
    assert seen.tokens[1].tolist() == [START, LATENT, LATENT, END] * 2 + [START] + [EOS] * 16
    # Nor may the end marker be one token too many; with two more there is room for it.
    for limit, cut in ((5, True), (6, False)):
        seen = generated(decoder, [[1]], thinking_of(config, counts=counts[:1]), max_new_tokens=limit)
        assert seen.blocks is not None and bool(seen.blocks.cut[0]) == cut
        assert seen.tokens[0, : int(seen.lengths[0])].tolist() == ([START, LATENT, END] * 3)[: 7 if cut else 9]


@pytest.mark.parametrize(
    "config, expected",
    [
        (HaltingConfig(), [False, False, False]),
        (HaltingConfig(stop="head", threshold=0.5), [False, True, True]),
        (HaltingConfig(stop="head", threshold=0.8), [False, False, True]),
        (HaltingConfig(stop="token", tokens=("end",)), [False, True, False]),
        (HaltingConfig(stop="token", tokens=("eos",)), [True, False, False]),
        (HaltingConfig(stop="token", tokens=("eos", "end")), [True, True, False]),
        (HaltingConfig(stop="entropy", threshold=0.6), [True, False, False]),
        (HaltingConfig(stop="entropy", threshold=1.0), [True, True, False]),
        (HaltingConfig(stop="cumulative", threshold=0.59), [False, True, True]),
        (HaltingConfig(stop="head", threshold=0.8, tokens=("eos",)), [True, False, True]),
    ],
)
def test_what_a_state_says_of_its_block(config: HaltingConfig, expected: list[bool]) -> None:
    """Probabilities of a stop of 0.1, 0.6 and 0.9; tokens EOS for sure, the end marker out of two, and all alike."""
    shares = np.zeros((3, 23))
    shares[0, EOS], shares[1, [END, 5]], shares[2] = 1.0, [0.6, 0.4], 1 / 23
    hidden = np.log([[0.1 / 0.9], [0.6 / 0.4], [0.9 / 0.1]])
    halt = Probe(jnp.ones(1)) if config.has_head else None
    thinking = thinking_of(config, halt=halt)
    logits = jnp.log(jnp.asarray(shares) + 1e-12)
    blocks = thinking.begin(jnp.zeros(3, bool), 1, 1, jnp.dtype("float32"))._replace(made=jnp.ones(3, jnp.int32))
    _, seen = thinking.look(blocks, scripted({}), jnp.asarray(hidden, jnp.float32), logits, EOS)
    assert seen.tolist() == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"least": -1}, r"least = -1: must be at least 0"),
        ({"least": 7}, r"most = 6: must be at least 1, and least = 7"),
        ({"least": 0, "most": 0}, r"most = 0: must be at least 1"),
        ({"most": 9, "room": 8}, r"room = 8: must be at least most = 9"),
        ({"stop": "head"}, r"threshold = None: stop = 'head' needs one"),
        ({"threshold": 0.5}, r"threshold = 0\.5: stop = 'count' takes none"),
        ({"stop": "head", "threshold": 1.5}, r"threshold = 1\.5: must be between 0 and 1"),
        ({"stop": "entropy", "threshold": -1.0}, r"threshold = -1\.0: must be above 0"),
        ({"stop": "token"}, r"tokens = \(\): stop = 'token' needs at least one"),
        ({"tokens": ("end",)}, r"tokens = \('end',\): stop = 'count' takes none"),
        ({"stop": "token", "tokens": ("start",)}, r"tokens = \('start',\): must be tuple"),
        ({"texts": ("9",)}, r"texts = \('9',\): stop = 'count' takes none"),
        ({"patience": 2}, r"patience = 2: stop = 'count' takes none"),
        ({"stop": "entropy", "threshold": 1.0, "patience": 0}, r"patience = 0: must be positive"),
        ({"stop": "head", "threshold": 0.5, "temperature": 0.5}, r"temperature = 0\.5: stop = 'head' takes none"),
        ({"stop": "cumulative"}, r"threshold = None: stop = 'cumulative' needs one"),
        ({"stop": "never"}, r"stop = 'never': must be typing\.Literal"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=rf"HaltingConfig\.{message}"):
        HaltingConfig(**fields)


@pytest.mark.parametrize(
    "config, parts, message",
    [
        (HaltingConfig(stop="head", threshold=0.5), {}, "stop = 'head': needs a stop head"),
        (HaltingConfig(), {"halt": Probe(jnp.ones(16))}, "stop = 'count': takes no stop head"),
        (
            HaltingConfig(stop="entropy", threshold=0.5),
            {"counts": jnp.ones(1, jnp.int32)},
            "stop = 'entropy': takes no number",
        ),
        (HaltingConfig(stop="token", tokens=("end",)), {"end_id": None}, "'end' is none of this generation's tokens"),
        (HaltingConfig(stop="token", texts=("9",)), {}, r"texts = \('9',\): their ids are missing"),
        (HaltingConfig(most=4), {"think": Sweeps(count=3)}, r"Sweeps\.count = 3: a block that the model opens itself"),
    ],
)
def test_parts_that_do_not_fit_are_an_error(config: HaltingConfig, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        generated(random_decoder(CONFIG), [[1]], thinking_of(config, **parts))


def test_sweeps_of_as_many_as_the_thoughts_may_be_made_one_by_one() -> None:
    thinking_of(HaltingConfig(most=3), think=Sweeps(count=3)).check()
