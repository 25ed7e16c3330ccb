"""Batches: every row can be read back from its columns, and a shape is as small as its rows allow."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.batching import Shape, page_shape, stage_shape
from coconut.curriculum import CurriculumConfig, drawable_stages
from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.pages import Page, Text, Thoughts
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.types import IGNORED_LABEL, Language, Latent, Think
from tests.tiny_pages import aligned, one_block, placing_at, thinking_page

SYMBOLS = tuple("abcdefgh")
TOKENIZER = symbol_tokenizer(SYMBOLS)
START, LATENT, END, EOS = TOKENIZER.start_latent_id, TOKENIZER.latent_id, TOKENIZER.end_latent_id, TOKENIZER.eos_id

token_ids = st.integers(0, len(SYMBOLS) - 1)
# Plain lists: the examples are built in the test, where type checks may use `random` without disturbing hypothesis.
# A step that is a number is a block of as many thoughts.
data_sets = st.lists(
    st.tuples(
        st.lists(token_ids, min_size=1, max_size=6),
        st.lists(st.one_of(st.lists(token_ids, min_size=1, max_size=3), st.integers(1, 3)), max_size=4),
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
methods = st.sampled_from(sorted(METHODS))


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def examples_of(data: list[Any]) -> list[TokenizedExample]:
    return [
        TokenizedExample(
            question=ids(*question),
            steps=tuple(Think(step) if isinstance(step, int) else ids(*step) for step in steps),
            answer=ids(*answer, EOS),
        )
        for question, steps, answer in data
    ]


def pages_at(examples: list[TokenizedExample], name: str, curriculum: CurriculumConfig, stage: int) -> list[Page]:
    placing = placing_at(TOKENIZER, curriculum, stage, options=METHODS[name].options())
    write = METHODS[name].pages["main"]
    return [write(example, placing) for example in examples]


def shape_at(
    examples: list[TokenizedExample], name: str, curriculum: CurriculumConfig, stage: int, multiple_of: int = 1
) -> Shape:
    placing = placing_at(TOKENIZER, curriculum, stage, options=METHODS[name].options())
    return stage_shape(examples, METHODS[name].pages["main"], placing, multiple_of=multiple_of)


@given(data=data_sets, settings=curricula, stage=st.integers(0, 5), name=methods, multiple_of=st.integers(1, 5))
def test_every_row_can_be_read_back(data, settings, stage, name, multiple_of):
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    shape = shape_at(examples, name, curriculum, stage, multiple_of)
    assert all(width % multiple_of == 0 for width in (shape.prompt, *shape.texts))
    pages = pages_at(examples, name, curriculum, stage)
    batch = aligned(pages, shape, TOKENIZER, feeds_back=METHODS[name].feeds_back(METHODS[name].options()))
    assert sum(span.length for span in batch.schedule) == batch.tokens.shape[1] == shape.columns
    text_starts, block_starts = shape.starts
    for index, page in enumerate(pages):
        tokens, labels, pieces, answers = [], [], [], []
        for part in page:
            own = [LATENT] * part.count if isinstance(part, Thoughts) else part.ids.tolist()
            text = part if isinstance(part, Text) and part.scored else None
            tokens += own
            labels += own if text else [IGNORED_LABEL] * len(own)
            pieces += [text.piece if text else -1] * len(own)
            answers += [text is not None and text.answer] * len(own)
        valid = batch.valid[index]
        # What the page holds, in order, and nothing else.
        assert batch.tokens[index, valid].tolist() == tokens
        assert batch.labels[index, valid].tolist() == labels
        assert batch.pieces[index, valid].tolist() == pieces
        assert batch.answers[index, valid].tolist() == answers
        assert batch.positions[index, valid].tolist() == list(range(len(tokens)))
        # Padding says nothing.
        assert (batch.tokens[index, ~valid] == EOS).all()
        assert (batch.labels[index, ~valid] == IGNORED_LABEL).all()
        assert not batch.positions[index, ~valid].any()
        assert not batch.answers[index, ~valid].any()
        assert (batch.pieces[index, ~valid] == -1).all()
        # The prompt ends where that of every row ends; every other part is written from the left of its own columns.
        assert valid[shape.prompt - 1]
        columns = zip((*text_starts, *block_starts), (*shape.texts, *shape.thoughts), strict=True)
        for start, width in columns:
            here = valid[start : start + width]
            assert here.tolist() == sorted(here.tolist(), reverse=True)
        blocks = [part.count for part in page if isinstance(part, Thoughts)]
        for count, start, width in zip(blocks, block_starts, shape.thoughts, strict=False):
            assert valid[start : start + width].sum() == count
    assert batch.examples.tolist() == list(range(len(examples)))


@given(data=data_sets, settings=curricula, stage=st.integers(0, 5), name=methods)
def test_labels_stand_in_scored_columns_and_thoughts_in_latent_spans(data, settings, stage, name):
    """Logits are made for scored columns alone: a label elsewhere would be lost in silence."""
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    feeds_back = METHODS[name].feeds_back(METHODS[name].options())
    shape = shape_at(examples, name, curriculum, stage)
    batch = aligned(pages_at(examples, name, curriculum, stage), shape, TOKENIZER, feeds_back=feeds_back)
    scored, latent = [], []
    for span in batch.schedule:
        first = span.length - (span.scored if isinstance(span, Language) else 0)
        scored += [isinstance(span, Language) and column >= first for column in range(span.length)]
        latent += [isinstance(span, Latent)] * span.length
    labelled = (batch.labels != IGNORED_LABEL).any(0)
    assert not (labelled & ~np.asarray(scored)).any()
    thoughts = (batch.tokens == LATENT).any(0)
    assert (thoughts & np.asarray(latent)).tolist() == (thoughts & feeds_back).tolist()
    if curriculum.uniform_prob == 0:
        # The shape is tight: no latent column is empty in every row, and each span's first scored column has a label.
        assert (batch.valid.any(0) | ~np.asarray(latent)).all()
        if name != "marked_cot":  # What it scores may begin with the end marker.
            firsts = [c for c in np.flatnonzero(scored) if c == 0 or not scored[c - 1]]
            assert labelled[firsts].all()


@given(data=data_sets, settings=curricula, stage=st.integers(0, 5), name=methods, draws=st.lists(st.integers(0, 99)))
def test_the_shape_holds_every_row_and_no_less_would_do(data, settings, stage, name, draws):
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    possible = [
        [
            page
            for at in sorted({stage, *drawable_stages(curriculum, stage, example.num_steps)})
            for page in pages_at([example], name, curriculum, at)
        ]
        for example in examples
    ]
    shape = shape_at(examples, name, curriculum, stage)
    draw = itertools.chain(draws, itertools.repeat(0))
    aligned([options[next(draw) % len(options)] for options in possible], shape, TOKENIZER)
    alone = [page_shape([page]) for options in possible for page in options]
    assert shape.prompt == max(own.prompt for own in alone)
    for widths, own in ((shape.texts, [s.texts for s in alone]), (shape.thoughts, [s.thoughts for s in alone])):
        assert list(widths) == [max(parts) for parts in itertools.zip_longest(*own, fillvalue=0)]


@given(data=data_sets, settings=curricula, name=methods, stages=st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_a_shape_for_several_stages_of_a_run_is_the_widest_of_theirs(data, settings, name, stages):
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    method = METHODS[name]
    first, write = placing_at(TOKENIZER, curriculum, stages[0], options=method.options()), method.pages["main"]
    shape = stage_shape(examples, write, first, stages=stages[1:])
    each = [shape_at(examples, name, curriculum, stage) for stage in stages]
    assert shape.prompt == max(one.prompt for one in each)
    for widths, own in ((shape.texts, [s.texts for s in each]), (shape.thoughts, [s.thoughts for s in each])):
        assert list(widths) == [max(parts) for parts in itertools.zip_longest(*own, fillvalue=0)]


@given(data=data_sets, settings=curricula)
def test_stage_0_of_coconut_has_adjacent_markers_and_cot_none(data, settings):
    data = [(question, [step for step in steps if isinstance(step, list)], answer) for question, steps, answer in data]
    examples, curriculum = examples_of(data), CurriculumConfig(**settings | {"uniform_prob": 0.0})
    batches = {
        name: aligned(pages_at(examples, name, curriculum, 0), shape_at(examples, name, curriculum, 0), TOKENIZER)
        for name in ("coconut", "cot")
    }
    assert len(batches["coconut"].schedule) == 1
    for index in range(len(examples)):
        marked, plain = (batch.tokens[index, batch.valid[index]].tolist() for batch in batches.values())
        start = marked.index(START)
        assert marked[start : start + 2] == [START, END]
        assert plain == marked[:start] + marked[start + 2 :]


# --- Pages of several blocks --------------------------------------------------------------------------------------


def test_blocks_of_every_row_stand_in_the_same_columns():
    """Two blocks; one, which leaves the second's columns empty; none, with everything before the first block's."""
    end, first, second = Text(ids(END)), Text(ids(2, 3), True, 0), Text(ids(4), True, 1)
    pages = [
        (Text(ids(1)), Thoughts(2), end, first, Thoughts(1), end, second),
        (Text(ids(1, 2)), Thoughts(1), end, Text(ids(5), True, 0, True)),
        (Text(ids(1)), Text(ids(6, 7, 0), True, 0, True)),
    ]
    batch = aligned(pages, page_shape(pages), TOKENIZER)
    assert batch.schedule == (Language(5, 3), Latent(2), Language(3, 2), Latent(1), Language(2, 1))
    used = ("01000 11 111 1 11", "11000 10 110 0 00", "01111 00 000 0 00")
    assert batch.valid.astype(int).tolist() == [[int(column) for column in row.replace(" ", "")] for row in used]
    # Where the thoughts are pauses, known beforehand, the same columns are one pass.
    paused = aligned(pages, page_shape(pages), TOKENIZER, feeds_back=False)
    assert paused.schedule == (Language(13, 11),)
    assert np.array_equal(paused.tokens, batch.tokens) and np.array_equal(paused.labels, batch.labels)


def test_a_block_that_is_empty_in_every_row_divides_no_span():
    for thoughts, schedule in ((0, (Language(3, 1),)), (1, (Language(1), Latent(1), Language(2, 1)))):
        pages = [(Text(ids(1)), Thoughts(count), Text(ids(END)), Text(ids(2), True, 0)) for count in (0, thoughts)]
        assert aligned(pages, page_shape(pages), TOKENIZER).schedule == schedule


@pytest.mark.parametrize("shape", [one_block(2, 2, 4), one_block(3, 1, 4), one_block(3, 2, 3)])
def test_a_row_that_does_not_fit_is_an_error(shape: Shape):
    page = thinking_page(TOKENIZER, ids(1, 2), 2, ids(3, 4, EOS))
    assert aligned([page], one_block(3, 2, 4), TOKENIZER).valid.all()
    with pytest.raises(CoconutError, match=r"row 1 needs Shape\(prompt=3, texts=\(0, 4\), thoughts=\(2,\)"):
        aligned([None, page], shape, TOKENIZER)
    # A block more, or a label in a column that is not scored, fits no wider batch, either.
    with pytest.raises(CoconutError, match="row 0 needs"):
        aligned([(*page, Thoughts(1))], one_block(9, 9, 9), TOKENIZER)
    with pytest.raises(CoconutError, match="row 0 needs"):
        aligned([(Text(ids(1)), Thoughts(1), Text(ids(2), True, 0))], one_block(9, 9, 9), TOKENIZER)


@pytest.mark.parametrize(
    "page,what",
    [
        ((Thoughts(1), Text(ids(1)), Text(ids(2), True, 0)), "begins with thoughts"),
        ((Text(ids()), Thoughts(1), Text(ids(2), True, 0)), "begins with thoughts"),
        ((Text(ids(1), True, 0),), "begins with text that is scored"),
        ((), "begins with nothing"),
        ((Text(ids(1)), Thoughts(1), Text(ids(2))), "must have text that is scored"),
    ],
)
def test_a_page_that_nothing_can_be_learnt_from_is_an_error(page: Page, what: str):
    placing, [example] = placing_at(TOKENIZER, CurriculumConfig(), 0), examples_of([([1], [], [2])])
    with pytest.raises(CoconutError, match=what):
        stage_shape([example], lambda example, placing: page, placing)


def test_a_row_that_only_fills_the_batch_holds_nothing():
    page = thinking_page(TOKENIZER, ids(1), 1, ids(2))
    batch = aligned([page, None], one_block(2, 1, 2), TOKENIZER)
    assert batch.examples.tolist() == [0, -1]
    assert batch.valid.tolist() == [[True] * 5, [False] * 5]
    assert (batch.labels[1] == IGNORED_LABEL).all()
