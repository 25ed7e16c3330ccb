"""Batches: every row can be read back from its columns, and a shape is as small as its rows allow."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coconut.batching import Row, Shape, align, schedule_of, stage_shape, write_row
from coconut.curriculum import CurriculumConfig, StagePlan, drawable_stages
from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.types import IGNORED_LABEL, Batch, Language, Latent

SYMBOLS = tuple("abcdefgh")
TOKENIZER = symbol_tokenizer(SYMBOLS)
MARKERS = {TOKENIZER.start_latent_id, TOKENIZER.latent_id, TOKENIZER.end_latent_id}


token_ids = st.integers(0, len(SYMBOLS) - 1)
# Plain lists: the examples are built in the test, where type checks may use `random` without disturbing hypothesis.
data_sets = st.lists(
    st.tuples(
        st.lists(token_ids, min_size=1, max_size=6),
        st.lists(st.lists(token_ids, min_size=1, max_size=3), max_size=4),
        st.lists(token_ids, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=4,
)
curricula = st.fixed_dictionaries(
    {
        "c_thought": st.integers(0, 2),
        "max_latent_stage": st.integers(0, 3),
        "pad_latent_to_max": st.booleans(),
        "uniform_prob": st.sampled_from((0.0, 0.5)),
        "uniform_stages": st.sampled_from(("all", "reached")),
    }
)
# The steps of marked_cot stand between the markers: it has a test of its own.
methods = st.sampled_from(sorted(set(METHODS) - {"marked_cot"}))


def examples_of(data) -> list[TokenizedExample]:
    array = lambda values: np.asarray(values, np.int32)
    return [
        TokenizedExample(
            question=array(question), steps=tuple(map(array, steps)), answer=array([*answer, TOKENIZER.eos_id])
        )
        for question, steps, answer in data
    ]


def rows_at(examples, rule, curriculum, stage: int) -> list[Row]:
    return [
        write_row(example, rule.plan(curriculum, stage, len(example.steps)), rule, TOKENIZER) for example in examples
    ]


def aligned(rows, shape: Shape, rule) -> Batch:
    return align(rows, shape, rule, pad_id=TOKENIZER.eos_id, latent_id=TOKENIZER.latent_id)


@given(data=data_sets, settings=curricula, stage=st.integers(0, 5), name=methods, multiple_of=st.integers(1, 5))
def test_every_row_can_be_read_back(data, settings, stage, name, multiple_of):
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    rule = METHODS[name].rule
    shape = stage_shape(examples, rule, curriculum, stage, multiple_of=multiple_of)
    assert shape.prompt % multiple_of == shape.suffix % multiple_of == 0
    batch = aligned(rows_at(examples, rule, curriculum, stage), shape, rule)
    assert sum(span.length for span in batch.schedule) == batch.tokens.shape[1] == shape.columns
    for index, example in enumerate(examples):
        plan = rule.plan(curriculum, stage, len(example.steps))
        kept = [*example.steps[plan.skipped :], example.answer]
        labelled = np.concatenate(kept)
        start = [TOKENIZER.start_latent_id] if rule.markers else []
        end = [TOKENIZER.end_latent_id] if rule.markers else []
        unlabelled = [*example.question, *start, *[TOKENIZER.latent_id] * plan.thoughts, *end]
        valid = batch.valid[index]
        # What the row holds, in order, and nothing else.
        assert batch.tokens[index, valid].tolist() == [*unlabelled, *labelled]
        assert batch.labels[index, valid].tolist() == [IGNORED_LABEL] * len(unlabelled) + labelled.tolist()
        assert batch.positions[index, valid].tolist() == list(range(valid.sum()))
        pieces = [number for number, piece in enumerate(kept) for _ in piece]
        assert batch.pieces[index, valid].tolist() == [-1] * len(unlabelled) + pieces
        assert batch.answers[index, valid].tolist() == [False] * (valid.sum() - len(example.answer)) + [True] * len(
            example.answer
        )
        # Padding says nothing.
        assert (batch.tokens[index, ~valid] == TOKENIZER.eos_id).all()
        assert (batch.labels[index, ~valid] == IGNORED_LABEL).all()
        assert not batch.positions[index, ~valid].any()
        assert not batch.answers[index, ~valid].any()
        assert (batch.pieces[index, ~valid] == -1).all()
        # The prompt ends where the latent columns of every row begin, and those are filled from the left.
        prompt = len(example.question) + rule.markers
        columns = np.flatnonzero(valid)
        assert columns[prompt - 1] == shape.prompt - 1
        latent = np.flatnonzero(batch.tokens[index] == TOKENIZER.latent_id)
        assert latent.tolist() == list(range(shape.prompt, shape.prompt + plan.thoughts))
        assert columns[prompt + plan.thoughts] == shape.prompt + shape.latent
        if not rule.markers:
            assert not MARKERS & set(batch.tokens[index].tolist())
    assert batch.examples.tolist() == list(range(len(examples)))


@given(data=data_sets, settings=curricula, stage=st.integers(0, 5), name=methods)
def test_labels_stand_in_scored_columns_and_thoughts_in_latent_spans(data, settings, stage, name):
    """Logits are made for scored columns alone: a label elsewhere would be lost in silence."""
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    rule = METHODS[name].rule
    shape = stage_shape(examples, rule, curriculum, stage)
    batch = aligned(rows_at(examples, rule, curriculum, stage), shape, rule)
    scored, latent = [], []
    for span in batch.schedule:
        first = span.length - (span.scored if isinstance(span, Language) else 0)
        scored += [column >= first for column in range(span.length)]
        latent += [isinstance(span, Latent)] * span.length
    labelled = (batch.labels != IGNORED_LABEL).any(0)
    assert not (labelled & ~np.asarray(scored)).any()
    # No column is scored in vain: the shape is tight, so each has a label in some row, where nothing is drawn.
    if curriculum.uniform_prob == 0:
        assert labelled.tolist() == scored
    fed_back = (batch.tokens == TOKENIZER.latent_id).any(0) & (rule.filler == "thought")
    assert not (fed_back & ~np.asarray(latent)).any()
    assert batch.schedule == schedule_of(shape, rule)


@given(data=data_sets, settings=curricula, stage=st.integers(0, 5), name=methods, draws=st.lists(st.integers(0, 99)))
def test_the_shape_holds_every_row_and_no_less_would_do(data, settings, stage, name, draws):
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    rule = METHODS[name].rule
    shape = stage_shape(examples, rule, curriculum, stage)
    possible = [
        [
            write_row(example, rule.plan(curriculum, at, len(example.steps)), rule, TOKENIZER)
            for at in sorted({stage, *drawable_stages(curriculum, stage, len(example.steps))})
        ]
        for example in examples
    ]
    draw = itertools.chain(draws, itertools.repeat(0))
    aligned([options[next(draw) % len(options)] for options in possible], shape, rule)
    every = [row for options in possible for row in options]
    assert shape == Shape(
        max(len(row.prompt) for row in every), max(row.latent for row in every), max(row.suffix for row in every)
    )


@given(data=data_sets, settings=curricula)
def test_stage_0_of_coconut_has_adjacent_markers_and_cot_none(data, settings):
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    assume(curriculum.uniform_prob == 0)
    coconut, cot = METHODS["coconut"].rule, METHODS["cot"].rule
    with_markers = rows_at(examples, coconut, curriculum, 0)
    batch = aligned(with_markers, stage_shape(examples, coconut, curriculum, 0), coconut)
    assert len(batch.schedule) == 1
    for tokens, valid in zip(batch.tokens, batch.valid, strict=True):
        tokens = tokens[valid].tolist()
        start = tokens.index(TOKENIZER.start_latent_id)
        assert tokens[start : start + 2] == [TOKENIZER.start_latent_id, TOKENIZER.end_latent_id]
    plain = aligned(rows_at(examples, cot, curriculum, 0), stage_shape(examples, cot, curriculum, 0), cot)
    for index, valid in enumerate(plain.valid):
        without = [token for token in batch.tokens[index, batch.valid[index]] if token not in MARKERS]
        assert plain.tokens[index, valid].tolist() == without


@pytest.mark.parametrize("shape", [Shape(2, 2, 4), Shape(3, 1, 4), Shape(3, 2, 3)])
def test_a_row_that_does_not_fit_is_an_error(shape: Shape):
    rule = METHODS["coconut"].rule
    example = TokenizedExample(
        question=np.array([1, 2], np.int32), steps=(), answer=np.array([3, 4, TOKENIZER.eos_id], np.int32)
    )
    row = write_row(example, StagePlan(0, 2), rule, TOKENIZER)
    assert aligned([row], Shape(3, 2, 4), rule).valid.all()
    with pytest.raises(CoconutError, match=r"row 1 has 3 prompt, 2 latent and 4 suffix columns"):
        aligned([None, row], shape, rule)


def test_a_row_that_only_fills_the_batch_holds_nothing():
    rule = METHODS["coconut"].rule
    example = TokenizedExample(question=np.array([1], np.int32), steps=(), answer=np.array([2], np.int32))
    row = write_row(example, StagePlan(0, 1), rule, TOKENIZER)
    batch = aligned([row, None], Shape(2, 1, 2), rule)
    assert batch.examples.tolist() == [0, -1]
    assert batch.valid.tolist() == [[True] * 5, [False] * 5]
    assert (batch.labels[1] == IGNORED_LABEL).all()


def test_marked_cot_writes_every_step_around_the_markers():
    rule = METHODS["marked_cot"].rule
    [example] = examples_of([([1, 2], [[3], [4, 5], [6]], [7])])
    curriculum = CurriculumConfig(max_latent_stage=3, last_stage=0, uniform_prob=1.0)
    start, end, eos = TOKENIZER.start_latent_id, TOKENIZER.end_latent_id, TOKENIZER.eos_id
    written = [3, 4, 5, 6, 7, eos]
    shape = stage_shape([example], rule, curriculum, 0)
    for stage, before in enumerate((0, 1, 3, 4)):
        [row] = rows_at([example], rule, curriculum, stage)
        batch = aligned([row], shape, rule)
        assert batch.tokens[0].tolist() == [1, 2, start, *written[:before], end, *written[before:]]
        labels = [label for label in batch.labels[0].tolist() if label != IGNORED_LABEL]
        assert labels == written
        assert batch.schedule == (Language(shape.columns, 7),)
