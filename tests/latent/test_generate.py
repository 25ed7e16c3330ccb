"""Decoding against the official generation and against recomputation without a cache, and what sampling promises."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.latent import generate
from coconut.latent.feedback import Identity
from coconut.latent.generate import (
    Generated,
    Prefix,
    SamplingConfig,
    decode,
    prefill,
    prefill_program,
    think_on,
    think_program,
)
from coconut.latent.rollout import rollout
from coconut.latent.thoughts import trunk
from coconut.methods import METHODS
from coconut.model import Model
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.parameters import decoder_of, decoder_parameters
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.types import Language, Latent
from tests.official_cases import CASES, load_case
from tests.tiny_models import (
    EXPERTS_STYLE,
    GPT2_STYLE,
    LATENT_STYLE,
    LLAMA_STYLE,
    LOCAL_STYLE,
    quick_compilation,
    quick_jit,
    random_decoder,
)
from tests.tiny_pages import placing_at

ROOM, NEW = 3, 6
END, EOS = 22, 21
GREEDY = SamplingConfig(max_new_tokens=NEW)
CONFIG = dataclasses.replace(LLAMA_STYLE, num_layers=1)
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13]]


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, seed=3)


def right_aligned(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which of them are valid; a row without tokens reads one, as a row that fills a batch does."""
    tokens, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        row = row or [0]
        tokens[index, width - len(row) :] = row
        valid[index, width - len(row) :] = True
    return tokens, valid


def thought_through(decoder: Decoder, prompts: list[list[int]], counts: list[int], end: list[int]) -> Prefix:
    """What decoding goes on from: prompts, then thoughts, then forced tokens."""
    tokens, valid = right_aligned(prompts, 5)
    prefix = prefill(decoder, jnp.asarray(tokens), jnp.asarray(valid))
    prefix, _ = think_on(decoder, Identity(), prefix, jnp.asarray(counts, jnp.int32), room=ROOM)
    forced = jnp.asarray([end] * len(prompts), jnp.int32)
    return prefill(decoder, forced, jnp.ones(forced.shape, bool), prefix)


def row_keys(seed: int, numbers: list[int]) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers))


def decoded(
    decoder: Decoder,
    prefix: Prefix,
    *,
    sampling: SamplingConfig = GREEDY,
    eos_id: int = EOS,
    keys: jax.Array | None = None,
    active: list[bool] | None = None,
) -> Generated:
    rows = prefix.length.shape[0]
    keys = row_keys(0, list(range(rows))) if keys is None else keys
    rows_active = jnp.asarray([True] * rows if active is None else active)
    return decode(decoder, prefix, rows_active, keys, sampling=sampling, eos_id=eos_id)


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation_equals_the_official_one_token_for_token(name: str) -> None:
    case = load_case(name, "float32")
    markers, wanted = case.content["markers"], case.content["generate"]
    prompts = [row["prompt"][: row["prompt"].index(markers["start_latent"]) + 1] for row in wanted]
    counts = [len(row["prompt"]) - len(prompt) - 1 for row, prompt in zip(wanted, prompts, strict=True)]
    assert all(
        row["prompt"][len(prompt) :] == [markers["latent"]] * count + [markers["end_latent"]]
        for row, prompt, count in zip(wanted, prompts, counts, strict=True)
    )
    # All rows at once, though their prompts and numbers of thoughts differ.
    tokens, valid = right_aligned(prompts, max(map(len, prompts)))
    prefix = prefill(case.decoder, jnp.asarray(tokens), jnp.asarray(valid))
    prefix, _ = think_on(case.decoder, Identity(), prefix, jnp.asarray(counts, jnp.int32), room=max(counts))
    end = jnp.full((len(prompts), 1), markers["end_latent"], jnp.int32)
    prefix = prefill(case.decoder, end, jnp.ones(end.shape, bool), prefix)
    assert prefix.length.tolist() == [len(row["prompt"]) for row in wanted]
    sampling = SamplingConfig(max_new_tokens=case.content["max_new_tokens"])
    generated = decoded(case.decoder, prefix, sampling=sampling, eos_id=markers["eos"])
    for index, row in enumerate(wanted):
        new = np.asarray(generated.tokens)[index, : int(generated.lengths[index])].tolist()
        assert row["prompt"] + new == row["output"]


@pytest.fixture(scope="module")
def recompute() -> Callable[[Decoder, list[int], int, list[int]], tuple[list[np.ndarray], np.ndarray]]:
    """(decoder, prompt, thoughts, tokens after them) -> the thoughts and the logits of the next token, cache-free."""
    width = len(PROMPTS[0]) + ROOM + 1 + NEW

    def run(decoder: Decoder, inputs: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions, valid = jnp.arange(width)[None], (jnp.arange(width) < used)[None]
        hidden, _ = decoder.trunk(inputs[None], positions=positions, valid=valid)
        last = hidden[0, used - 1]
        return last, decoder.unembed(last)

    run = quick_jit(run)

    def follow(
        decoder: Decoder, prompt: list[int], count: int, tokens: list[int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        table = np.asarray(decoder.tokens.embedding[...])
        columns = [table[token] for token in prompt]
        pad = lambda: jnp.asarray(np.stack(columns + [np.zeros_like(table[0])] * (width - len(columns))))
        thoughts = []
        for _ in range(count):
            last, _ = run(decoder, pad(), jnp.asarray(len(columns)))
            thoughts.append(np.asarray(last))
            columns.append(thoughts[-1])
        columns += [table[token] for token in tokens]
        _, logits = run(decoder, pad(), jnp.asarray(len(columns)))
        return thoughts, np.asarray(logits)

    return follow


def test_decoding_with_a_cache_equals_recomputation(decoder: Decoder, recompute: Callable) -> None:
    counts = [2, 0, 3, 1]
    generated = decoded(decoder, thought_through(decoder, PROMPTS, counts, [END]))
    tokens, lengths = np.asarray(generated.tokens), np.asarray(generated.lengths)
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    for index, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True)):
        written: list[int] = []
        while len(written) < NEW:
            _, logits = recompute(decoder, prompt, count, [END, *written])
            token = int(np.argmax(logits))
            if token == EOS:
                break
            written.append(token)
        assert tokens[index, : lengths[index]].tolist() == written
        assert bool(generated.ended[index]) == (len(written) < NEW)


def test_thoughts_chosen_at_test_time_equal_the_rollout_with_as_many(decoder: Decoder, recompute: Callable) -> None:
    counts = [0, 1, 2, 3]
    prompts = [PROMPTS[0]] * 4
    tokens, valid = right_aligned(prompts, 5)
    prefix = prefill(decoder, jnp.asarray(tokens), jnp.asarray(valid))
    following, thoughts = think_on(decoder, Identity(), prefix, jnp.asarray(counts, jnp.int32), room=ROOM)
    following = prefill(decoder, jnp.full((4, 1), END, jnp.int32), jnp.ones((4, 1), bool), following)

    width = 5 + ROOM + 1
    used = np.concatenate([valid, np.arange(ROOM) < np.asarray(counts)[:, None], np.ones((4, 1), bool)], 1)
    row_tokens = np.concatenate([tokens, np.zeros((4, ROOM), np.int32), np.full((4, 1), END, np.int32)], 1)
    assert used.shape == row_tokens.shape == (4, width)
    output = quick_jit(rollout, static_argnums=1)(
        decoder,
        (Language(5), Latent(ROOM), Language(1)),
        tokens=jnp.asarray(row_tokens),
        positions=jnp.asarray(np.where(used, np.cumsum(used, 1) - 1, 0).astype(np.int32)),
        valid=jnp.asarray(used),
    )
    np.testing.assert_allclose(following.last, output.last, rtol=0, atol=2e-5)
    np.testing.assert_allclose(thoughts, output.thoughts[0], rtol=0, atol=2e-5)
    assert following.length.tolist() == [5 + count + 1 for count in counts]
    for index, count in enumerate(counts):
        expected, _ = recompute(decoder, PROMPTS[0], count, [END])
        np.testing.assert_allclose(
            thoughts[index, :count], np.reshape(expected, (count, CONFIG.embed_dim)), rtol=0, atol=2e-5
        )
        assert not np.asarray(thoughts)[index, count:].any()
    # More than there is room for are not thought, and not counted.
    crowded, _ = think_on(decoder, Identity(), prefix, jnp.full(4, ROOM + 2, jnp.int32), room=ROOM)
    assert crowded.length.tolist() == [5 + ROOM] * 4


def test_a_row_stops_at_eos_whatever_its_neighbours_do(decoder: Decoder) -> None:
    prefix = thought_through(decoder, PROMPTS, [2, 0, 3, 1], [END])
    free = np.asarray(decoded(decoder, prefix, eos_id=EOS).tokens)
    # A token that one row writes in the middle, and another never.
    eos_id = next(int(t) for t in free[:, 1:-1].ravel() if any(t not in row for row in free))
    generated = decoded(decoder, prefix, eos_id=eos_id)
    ends = [row.tolist().index(eos_id) if eos_id in row else NEW for row in free]
    assert min(ends) < NEW == max(ends)
    assert generated.lengths.tolist() == ends
    assert generated.ended.tolist() == [end < NEW for end in ends]
    for row, expected, end in zip(np.asarray(generated.tokens), free, ends, strict=True):
        assert row.tolist() == expected[:end].tolist() + [eos_id] * (NEW - end)


def test_decoding_ends_when_every_active_row_has(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    choose = generate._choose

    def counting(logits, keys, index, sampling):
        jax.debug.callback(lambda index: steps.append(int(index)), index)
        return choose(logits, keys, index, sampling)

    monkeypatch.setattr(generate, "_choose", counting)
    # A limit of its own, so that the program is traced with what counts its steps.
    sampling = SamplingConfig(max_new_tokens=NEW + 5)
    prefix = thought_through(decoder, PROMPTS, [2, 0, 3, 1], [END])
    free = np.asarray(decoded(decoder, prefix, sampling=sampling, eos_id=EOS).tokens)
    jax.effects_barrier()
    steps.clear()
    eos_id = int(free[2, 1])
    first = free[2].tolist().index(eos_id)
    generated = decoded(decoder, prefix, sampling=sampling, eos_id=eos_id, active=[False, False, True, False])
    jax.effects_barrier()
    assert sorted(steps) == list(range(first + 1))
    assert generated.lengths[2] == first
    assert not generated.lengths[0]


def test_draws_depend_on_the_seed_and_not_on_the_neighbours(decoder: Decoder) -> None:
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=1.5)
    draw = lambda prompts, counts, keys: np.asarray(
        decoded(decoder, thought_through(decoder, prompts, counts, [END]), sampling=sampling, keys=keys).tokens
    )
    tokens = draw(PROMPTS, [2, 0, 3, 1], row_keys(0, [0, 1, 2, 3]))
    assert (draw(PROMPTS, [2, 0, 3, 1], row_keys(0, [0, 1, 2, 3])) == tokens).all()
    assert (draw(PROMPTS, [2, 0, 3, 1], row_keys(1, [0, 1, 2, 3])) != tokens).any(1).all()
    # Other neighbours, another place in the batch.
    moved = draw([PROMPTS[3], PROMPTS[0], PROMPTS[1], PROMPTS[1]], [1, 2, 3, 3], row_keys(0, [3, 0, 7, 8]))
    assert (moved[0] == tokens[3]).all()
    assert (moved[1] == tokens[0]).all()
    # The same question drawn twice under two keys is two draws.
    assert (moved[2] != moved[3]).any()


def test_top_1_is_greedy(decoder: Decoder) -> None:
    prefix = thought_through(decoder, PROMPTS, [2, 0, 3, 1], [END])
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=5.0, top_k=1)
    assert (np.asarray(decoded(decoder, prefix, sampling=sampling).tokens) == decoded(decoder, prefix).tokens).all()


@pytest.mark.slow
def test_rows_of_the_embedding_that_are_no_token_are_never_written(decoder: Decoder) -> None:
    """Published embeddings are often larger than the tokenizer: an id from there has no text."""
    prefix = thought_through(decoder, PROMPTS[:1], [1], [END])
    parameters, tokens = decoder_parameters(decoder), decoder.config.vocabulary
    liked = jnp.tile(100.0 * prefix.last.T, (1, 3))  # what the hidden state of the prefix points at
    padded = decoder_of(
        dataclasses.replace(decoder.config, vocab_size=tokens + 3),
        decoder.execution,
        parameters
        | {
            "tokens.embedding": jnp.pad(parameters["tokens.embedding"], ((0, 3), (0, 0))),
            "head.kernel": jnp.concatenate([parameters["head.kernel"], liked], 1),
        },
    )
    write = functools.partial(decode, padded, prefix, jnp.ones(1, bool), row_keys(0, [0]), sampling=GREEDY, eos_id=EOS)
    assert write().tokens[0, 0] >= tokens
    np.testing.assert_array_equal(write(vocab_size=tokens).tokens, decoded(decoder, prefix).tokens)


def test_top_k_draws_among_the_most_likely_in_proportion() -> None:
    logits = jnp.log(jnp.asarray([[0.4, 0.1, 0.3, 0.2]] * 2000))
    keys = row_keys(3, list(range(2000)))
    sampling = SamplingConfig(temperature=0.5, top_k=3)
    drawn = np.asarray(generate._choose(logits, keys, jnp.asarray(0), sampling))
    # At temperature 1/2 the shares are those of the squared probabilities.
    shares = np.asarray([0.4**2, 0.0, 0.3**2, 0.2**2])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, shares / shares.sum(), atol=0.04)
    assert 1 not in drawn


def drawn_shares(shares: list[float], **filters: Any) -> np.ndarray:
    logits = jnp.log(jnp.asarray([shares] * 2000))
    sampling = SamplingConfig(temperature=0.5, **filters)
    drawn = generate._choose(logits, row_keys(3, list(range(2000))), jnp.asarray(0), sampling)
    return np.bincount(np.asarray(drawn), minlength=len(shares)) / 2000


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        # At temperature 1/2 the shares are 16, 1, 9 and 4 of 30: the second one crosses 0.6, and 0.84 is not crossed.
        ({"top_p": 0.6}, [0, 2]),
        ({"top_p": 0.84}, [0, 2, 3]),
        ({"top_p": 0.01}, [0]),
        # A quarter of 16 is 4: what is just as likely stays; of 0.26 it does not.
        ({"min_p": 0.2499}, [0, 2, 3]),
        ({"min_p": 0.26}, [0, 2]),
        ({"min_p": 1.0}, [0]),
        # Of the two that top_k leaves the first one has 16 / 25 = 0.64; of all it would have 0.53.
        ({"top_k": 2, "top_p": 0.6}, [0]),
        ({"top_p": 0.6, "min_p": 0.6}, [0]),
    ],
)
def test_nucleus_and_min_p_draw_among_those_they_keep_in_proportion(filters: dict[str, float], kept: list[int]) -> None:
    squares = np.asarray([16.0, 1, 9, 4])
    expected = np.where(np.isin(np.arange(4), kept), squares, 0)
    found = drawn_shares([0.4, 0.1, 0.3, 0.2], **filters)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.04)
    assert set(np.flatnonzero(found)) == set(kept)


def test_the_nucleus_holds_no_more_than_it_needs_among_equals() -> None:
    assert np.count_nonzero(drawn_shares([0.25] * 4, top_p=0.5)) == 2


# --- Questions in, texts out --------------------------------------------------------------------------------------

TOKENIZER = symbol_tokenizer(("<eos>", *(f"w{number}" for number in range(19))))
EXAMPLES = [
    TokenizedExample(
        question=np.asarray(PROMPTS[index % 4], np.int32),
        steps=(np.asarray([1], np.int32),) * (index % 3),
        answer=np.asarray([2, TOKENIZER.eos_id], np.int32),
    )
    for index in range(7)
]
CURRICULUM = CurriculumConfig(max_latent_stage=2, pad_latent_to_max=False)


def answers(decoder: Decoder, stage: int = 3, method: str = "coconut", **settings):
    assert TOKENIZER.vocab_size == CONFIG.vocab_size
    config = AnswerConfig(**{"batch_size": 3, "sampling": GREEDY, **settings})
    model = Model(decoder, {"feedback": Identity()})
    placing = placing_at(TOKENIZER, CURRICULUM, stage)
    return list(answer_questions(model, TOKENIZER, METHODS[method], placing, EXAMPLES, config))


@pytest.mark.slow
def test_each_program_compiles_once_over_batches_stages_and_counts(decoder: Decoder) -> None:
    programs = {"prefill": prefill_program, "think_on": think_program, "decode": decode}
    before = {name: program._cache_size() for name, program in programs.items()}  # pyright: ignore
    by_stage = [answers(decoder, stage) for stage in range(4)]
    by_count = [answers(decoder, thoughts=count) for count in range(3)]
    compiled = {name: program._cache_size() - before[name] for name, program in programs.items()}  # pyright: ignore
    # Prompts are read by one program, end markers by another.
    assert compiled == {"prefill": 2, "think_on": 1, "decode": 1}
    assert [[answer.thoughts for answer in rows] for rows in by_stage] == [
        [0] * 7,
        [1] * 7,
        [2] * 7,
        [index % 3 for index in range(7)],
    ]
    assert [[answer.thoughts for answer in rows] for rows in by_count] == [[count] * 7 for count in range(3)]
    for rows in (*by_stage, *by_count):
        assert [answer.example for answer in rows] == list(range(7))
        for answer in rows:
            assert answer.thought_inputs is not None
            assert answer.thought_inputs.shape == (answer.thoughts, CONFIG.embed_dim)
    # The number of thoughts chosen is the number the stage would have had.
    assert [answer.text for answer in by_count[1]] == [answer.text for answer in by_stage[1]]
    assert [answer.text for answer in by_count[0]] != [answer.text for answer in by_count[2]]


def test_forced_text_appears_and_is_gone_on_from(decoder: Decoder, recompute: Callable) -> None:
    forced = "w4 w9"
    rows = answers(decoder, forced=forced, thoughts=1)
    for index, answer in enumerate(rows):
        assert answer.text.split()[:2] == ["w4", "w9"]
        assert answer.new_tokens == len(answer.text.split())
        prompt = [*PROMPTS[index % 4], TOKENIZER.start_latent_id]
        _, logits = recompute(decoder, prompt, 1, [TOKENIZER.end_latent_id, *TOKENIZER.encode(forced)])
        first = int(np.argmax(logits))
        expected = [] if first == TOKENIZER.eos_id else [TOKENIZER.decode([first])]
        assert answer.text.split()[2:3] == expected


def test_a_question_that_does_not_fit_the_positions_is_an_error(decoder: Decoder) -> None:
    with pytest.raises(CoconutError, match=r"max_positions = 32: a question of 6 tokens, 2 thoughts, 1 forced and 30"):
        answers(decoder, sampling=SamplingConfig(max_new_tokens=30))


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.5),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_a_sampling_value_out_of_range_is_named_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(CoconutError, match=rf"SamplingConfig\.{field} = {value!r}"):
        SamplingConfig(**{field: value})


@pytest.mark.slow
@pytest.mark.parametrize("style", [GPT2_STYLE, LLAMA_STYLE, LOCAL_STYLE, LATENT_STYLE, EXPERTS_STYLE])
def test_rows_read_in_portions_leave_what_they_leave_together(
    style: DecoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_decoder(style)
    tokens = np.random.default_rng(0).integers(0, style.vocabulary, (6, 9))
    valid = np.arange(9) >= np.asarray([0, 3, 8, 1, 0, 9])[:, None]  # The last row has no column.
    expected = prefill(decoder, tokens, valid)
    row = 9 * style.width_of_mlp * 4
    monkeypatch.setattr(generate, "CACHED_BYTES", 2.5 * row)
    passes = []
    count = lambda decoder, inputs, *rest: passes.append(len(inputs)) or trunk(decoder, inputs, *rest)
    monkeypatch.setattr(generate, "trunk", count)
    read = inspect.unwrap(generate.prefill_program)
    found = jax.jit(lambda *given: read(*given, None))(decoder, tokens, valid).behind(())
    assert passes == [2]  # Three portions by one program.
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "portions"), [(64, 160, 8), (8, 160, 1), (61, 160, 1), (4, 9_000, 4), (0, 160, 1), (4, 0, 1)]
)
def test_rows_are_parted_where_they_are_many_or_long(rows: int, columns: int, portions: int) -> None:
    config = dataclasses.replace(CONFIG, embed_dim=256, mlp_dim=1_024)
    assert generate._portions(config, ExecutionConfig(), rows, columns) == portions
