"""iCoT: what is removed and when, and that nothing removed is chain of thought to the bit."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.methods.icot import IcotOptions, drawn_offset, remove_tokens, restarts, scheduled_tokens
from coconut.pages import Placing, Text
from coconut.pipeline import BatchSource, PipelineConfig
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.training.run import Run
from coconut.training.setup import fit_to_positions
from coconut.types import Batch, Think
from tests.tiny_pages import placing_at
from tests.tiny_runs import tiny_run

TOKENIZER = symbol_tokenizer([str(number) for number in range(16)])
EPOCHS = CurriculumConfig(max_latent_stage=3, last_stage=4, epochs_per_stage=4)
PLAIN = IcotOptions(smoothing=None)
ICOT = METHODS["icot"]


def make_examples(count: int) -> list[TokenizedExample]:
    """Examples whose chains have 0 to 9 tokens, in up to three steps."""
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, 15, length).astype(np.int32)
    lengths = [(), (2,), (1, 3), (4, 2, 3)]
    return [
        TokenizedExample(question=draw(2 + index % 3), steps=tuple(map(draw, lengths[index % 4])), answer=draw(2))
        for index in range(count)
    ]


EXAMPLES = make_examples(24)


def at(stage: int, progress: float = 0.0, draw: float | None = None, **options: Any) -> Placing:
    chosen = dataclasses.replace(PLAIN, **options)
    return placing_at(TOKENIZER, EPOCHS, stage, options=chosen, progress=progress, draw=draw)


def source(placing: Placing, method: str = "icot", **settings: Any) -> BatchSource:
    return BatchSource(EXAMPLES, TOKENIZER, METHODS[method], placing, PipelineConfig(batch_size=4), seed=3, **settings)


def same(first: dict[str, Batch], second: dict[str, Batch]) -> bool:
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(np.array_equal(a, b) for a, b in leaves)


# --- The two ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "placing",
    [
        at(0),
        at(1, tokens_per_stage=1, side="right", keep_positions=True),  # Whose token goes at its end.
        at(0, smoothing=0.1, keep_positions=True),  # There is no offset in stage 0.
    ],
)
def test_where_nothing_is_removed_it_is_chain_of_thought_to_the_bit(placing: Placing) -> None:
    icot, cot = source(placing), source(at(0), "cot")
    assert all(same(icot[number], cot[number]) for number in range(6))
    # What is made of a batch is the same function of it.
    method = METHODS["cot"]
    own = {"name": method.name, "pages": method.pages, "options": method.options, "restarts": method.restarts}
    assert dataclasses.replace(ICOT, **own) == method


def test_where_all_is_removed_its_batches_are_those_of_no_cot() -> None:
    for options in ({"remove_all_beyond": 8}, {"tokens_per_stage": 9}):
        icot, no_cot = source(at(2, **options)), source(at(0), "no_cot")
        assert all(same(icot[number], no_cot[number]) for number in range(6))
    assert not same(source(at(2, remove_all_beyond=9))[0], source(at(0), "no_cot")[0])


# --- What goes ----------------------------------------------------------------------------------------------------


steps = st.lists(st.one_of(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 3)), max_size=4)


@given(data=steps, count=st.integers(0, 20), side=st.sampled_from(("left", "right")))
def test_tokens_go_from_one_side_of_the_chain(data: list[Any], count: int, side: Any) -> None:
    parts = [Think(part) if isinstance(part, int) else np.asarray(part, np.int32) for part in data]
    chain = [token for part in data if isinstance(part, list) for token in part]
    kept, removed = remove_tokens(parts, count, side)
    left = [token for part in kept if not isinstance(part, Think) for token in part.tolist()]
    assert removed == min(count, len(chain))
    assert left == (chain[removed:] if side == "left" else chain[: len(chain) - removed])
    # Blocks of the data stay, and no step is left without tokens that had some.
    assert [part for part in kept if isinstance(part, Think)] == [part for part in parts if isinstance(part, Think)]
    if all(data):
        assert all(isinstance(part, Think) or len(part) for part in kept)


@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_the_schedule_is_the_counter_of_the_authors_code(tokens: int) -> None:
    """One token goes every so many updates, from the first stage after the pretraining on."""
    per_stage = 6 * 4  # Batches of an epoch, epochs of a stage.
    counter, scheduled, expected = 0, 0, []
    for number in range(4 * per_stage):
        if counter == per_stage // tokens:
            scheduled, counter = scheduled + 1, 0
        counter += number >= per_stage
        expected.append(scheduled)
    found = []
    for stage in range(4):
        batches = source(at(stage, tokens_per_stage=tokens), stage_start=stage * per_stage)
        assert batches.stage_length == per_stage
        found += [scheduled_tokens(at(stage, step / per_stage, tokens_per_stage=tokens)) for step in range(per_stage)]
        # The batches themselves lack as much.
        for number in range(stage * per_stage, (stage + 1) * per_stage, 5):
            batch = batches[number]["main"]
            for row, index in enumerate(batch.examples):
                chain = [token for step in EXAMPLES[index].written_steps for token in step][expected[number] :]
                whole = [*EXAMPLES[index].question, *chain, *EXAMPLES[index].answer]
                assert batch.tokens[row, batch.valid[row]].tolist() == whole
    assert found == expected


def test_the_schedule_begins_where_it_is_told_to_and_ends_with_all() -> None:
    counts = [scheduled_tokens(at(stage, 0.5, start_from=3, remove_all_beyond=14)) for stage in range(4)]
    assert counts[:2] == [3, 7] and counts[2:] == [counts[2]] * 2 and counts[2] > 10**9


def test_an_example_loses_more_than_is_scheduled_with_a_probability_that_falls() -> None:
    draws = 1000
    for rate in (0.5, 4.0):
        drawn = [drawn_offset(at(1, draw=(i + 0.5) / draws, smoothing=rate)) for i in range(draws)]
        counts = np.bincount(drawn)
        expected = (1 - math.exp(-rate)) * np.exp(-rate * np.arange(len(counts)))
        np.testing.assert_allclose(counts / draws, expected, atol=1.1 / draws)
    # The tail stands on the last one; without a draw, as for the columns of a batch, nothing more is removed.
    assert drawn_offset(at(1, draw=math.nextafter(1.0, 0.0), smoothing=0.01)) == 99
    assert drawn_offset(at(1, smoothing=0.01)) == drawn_offset(at(0, draw=0.9, smoothing=0.01)) == 0
    assert drawn_offset(at(1, draw=0.9)) == 0


def test_smoothing_shortens_some_examples_of_a_batch() -> None:
    plain, smooth = source(at(1)), source(at(1, smoothing=0.5))
    lengths = lambda batches: np.concatenate([batches[number]["main"].valid.sum(1) for number in range(6)])
    assert (lengths(smooth) <= lengths(plain)).all() and (lengths(smooth) < lengths(plain)).any()


# --- Positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_follows_the_gap_keeps_its_positions(side: str) -> None:
    placing = at(1, 0.6, tokens_per_stage=5, side=side, keep_positions=True)
    for example in EXAMPLES[:4]:
        page, length = ICOT.pages["main"](example, placing), len(example.ids)
        method = dataclasses.replace(ICOT, pages={"main": lambda example, placing, page=page: page})
        batch = BatchSource([example], TOKENIZER, method, placing, PipelineConfig(batch_size=1), seed=0)[0]["main"]
        positions = batch.positions[batch.valid].tolist()
        removed = length - len(positions)
        assert removed == min(3, length - len(example.question) - len(example.answer))
        gap = len(example.question) if side == "left" else length - len(example.answer) - removed
        assert positions == [*range(gap), *range(gap + removed, length)]
        # To be answered nothing is skipped: the length of the chain is not known.
        asked = ICOT.write_to_answer(example, placing)
        assert not any(part.skips for part in asked if isinstance(part, Text))


def test_positions_that_are_skipped_count_where_the_models_are_few() -> None:
    """Stage 1 begins with three tokens removed: the columns are 3 fewer than the positions."""
    example = TokenizedExample(
        question=np.zeros(3, np.int32), steps=(np.zeros(5, np.int32),), answer=np.zeros(2, np.int32)
    )

    def fitting(limit: int, **options: Any) -> list[TokenizedExample]:
        config = tiny_run(method="icot", options=dataclasses.replace(PLAIN, start_from=3, **options))
        config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, max_positions=limit))
        return fit_to_positions([example], Run(config, TOKENIZER, data=""))

    assert fitting(7) and fitting(10, keep_positions=True)
    with pytest.raises(CoconutError, match=r"max_positions = 9; the longest needs 10 positions"):
        fitting(9, keep_positions=True)


# --- The optimizer ------------------------------------------------------------------------------------------------


def test_the_optimizer_starts_anew_at_each_removal_while_anything_is_left() -> None:
    numbers = [restarts(at(stage, step / 8, tokens_per_stage=4), 6) for stage in range(4) for step in range(8)]
    changes = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]]
    # Removals at every second step of stages 1 and 2; the sixth removes what is left.
    assert changes == [10, 12, 14, 16, 18, 20]
    assert {restarts(at(stage, 0.5, restart_optimizer=False), 6) for stage in range(3)} == {0}
    # Nor once all is removed by decree.
    assert len({restarts(at(stage, 0.5, remove_all_beyond=3), 60) for stage in range(1, 4)}) == 1


# --- What cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field,value",
    [
        ("tokens_per_stage", 0),
        ("remove_all_beyond", 0),
        ("start_from", -1),
        ("smoothing", 0.0),
        ("smoothing", math.inf),
        ("side", "both"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(CoconutError, match=re.escape(f"IcotOptions.{field} = {value!r}: must be")):
        IcotOptions(**{field: value})
