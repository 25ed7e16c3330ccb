"""Packing: rows of several examples hold what the batch held, and compute what rows of one example compute."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.batching import Shape, page_shape
from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout_batch
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.methods import METHODS
from coconut.methods.method import LossContext, imitation_loss
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.packing import fits, pack, packed_shapes, part_widths, share_rows, widest_rows
from coconut.pages import Markers, Page, Text, Thoughts
from coconut.pipeline import BatchSource, PipelineConfig
from coconut.tokenizers import symbol_tokenizer
from coconut.types import IGNORED_LABEL, Batch
from tests.test_batching import TOKENIZER as FEW_SYMBOLS
from tests.test_batching import curricula, data_sets, examples_of, pages_at, shape_at
from tests.test_pipeline import CURRICULUM, EXAMPLES, same
from tests.test_pipeline import TOKENIZER as LETTERS
from tests.tiny_models import EXPERTS_STYLE, GPT2_STYLE, LATENT_STYLE, LOCAL_STYLE, quick_jit, random_decoder
from tests.tiny_pages import aligned, placing_at

TOKENIZER = symbol_tokenizer([str(number) for number in range(19)])


def packed(batch: Batch, shape: Shape, rows: int, *, feeds_back: bool = True) -> Batch:
    widths = part_widths(batch, shape)
    members = share_rows(widths, rows)
    narrow = packed_shapes(shape, len(widths) // rows, widest_rows(widths, members))[0]
    return pack(batch, shape, members, narrow, pad_id=TOKENIZER.eos_id, feeds_back=feeds_back)


# --- What rows hold ---------------------------------------------------------------------------------------------------


@given(
    data=data_sets,
    settings=curricula,
    stage=st.integers(0, 5),
    name=st.sampled_from(
        sorted(name for name, method in METHODS.items() if method.packs and name != "coconut_frontier")
    ),
    rows=st.sampled_from((1, 2, 4)),
)
def test_every_example_can_be_read_back(data, settings, stage, name, rows):
    examples, curriculum = examples_of(data), CurriculumConfig(**settings)
    pages = [*pages_at(examples, name, curriculum, stage), *[None] * (4 - len(data))]
    shape, feeds_back = shape_at(examples, name, curriculum, stage), METHODS[name].feeds_back(METHODS[name].options())
    one = aligned(pages, shape, FEW_SYMBOLS, feeds_back=feeds_back)
    many = packed(one, shape, rows, feeds_back=feeds_back)
    assert sum(span.length for span in many.schedule) == many.tokens.shape[1]
    assert sorted(many.examples.flat) == sorted(one.examples)
    assert many.members is not None and many.valid.sum() == one.valid.sum()
    # In the columns where labels are looked for, as in those of one example.
    assert (
        (many.labels != IGNORED_LABEL).sum()
        == (scored(many) != IGNORED_LABEL).sum()
        == (scored(one) != IGNORED_LABEL).sum()
    )
    for row, number in np.ndindex(many.examples.shape):
        if (example := many.examples[row, number]) < 0:
            continue
        own = many.valid[row] & (many.members[row] == number)
        for field in ("tokens", "positions", "labels", "pieces", "answers"):
            there, here = getattr(one, field)[example, one.valid[example]], getattr(many, field)[row, own]
            np.testing.assert_array_equal(here, there, err_msg=field)
        before = [one.before_answer[example], many.before_answer[row, number]]
        assert (before[0] < 0) == (before[1] < 0)
        assert before[0] < 0 or one.positions[example, before[0]] == many.positions[row, before[1]]
        assert before[1] < 0 or own[before[1]]


def scored(batch: Batch) -> np.ndarray:
    """The labels of the scored columns."""
    ends = np.cumsum([span.length for span in batch.schedule])
    counts = [getattr(span, "scored", 0) for span in batch.schedule]
    return np.concatenate([batch.labels[:, end - count : end] for end, count in zip(ends, counts, strict=True)], 1)


def test_rows_are_about_as_wide():
    rng = np.random.default_rng(0)
    widths = np.stack([rng.lognormal(5, 0.4, 128), rng.integers(3, 40, 128)], 1).astype(np.int64)
    members = share_rows(widths, 32)
    assert sorted(members.flat) == list(range(128))
    np.testing.assert_array_less(widest_rows(widths, members), 1.05 * widths.sum(0) / 32)
    # As they come they are not.
    assert widest_rows(widths, np.arange(128).reshape(32, 4))[0] > 1.3 * widths[:, 0].sum() / 32


def test_the_widest_shape_holds_any_batch_and_a_narrow_one_is_refused():
    one, shape = aligned(PAGES, SHAPE, TOKENIZER), SHAPE
    widths = np.tile([shape.prompt, *shape.texts], (8, 1))
    members = np.arange(8).reshape(4, 2)
    narrow, wide = packed_shapes(shape, 2, widths[:4].sum(0) // 4)
    assert fits(widths, members, wide) and not fits(widths, members, narrow)
    with pytest.raises(CoconutError, match="a row of 8 examples does not fit"):
        pack(one, shape, np.arange(8)[None], wide, pad_id=0, feeds_back=True)


# --- Batches by number ------------------------------------------------------------------------------------------------


def source(rows: slice = slice(None), *, examples_per_row: int = 2) -> BatchSource:
    config = PipelineConfig(batch_size=4, examples_per_row=examples_per_row)
    placing = placing_at(LETTERS, CURRICULUM, 1)
    return BatchSource(EXAMPLES, LETTERS, METHODS["coconut"], placing, config, seed=7, rows=rows)


def test_a_packed_batch_holds_the_examples_of_the_batch_in_at_most_two_shapes():
    one, many, first, second = source(examples_per_row=1), source(), source(slice(0, 1)), source(slice(1, 2))
    numbers = range(3 * many.batches_per_epoch)
    assert one.batches_per_epoch == many.batches_per_epoch
    shapes = set()
    for number in numbers:
        batch, plain = many[number]["main"], one[number]["main"]
        assert sorted(batch.examples.flat) == sorted(plain.examples)
        assert batch.valid.sum() == plain.valid.sum()
        shapes.add(batch.schedule)
        halves = (first[number], second[number])
        joined = jax.tree.map(lambda *both: np.concatenate(both), *halves)
        assert same(joined, many[number])
    assert len(shapes) <= len(many.packed_shapes[0]["main"]) == 2
    padding = [np.mean([1 - batches[n]["main"].valid.mean() for n in numbers]) for batches in (one, many)]
    assert padding[1] < 0.75 * padding[0]


# --- What rows compute ------------------------------------------------------------------------------------------------


def page(question: int, first: int, step: int, second: int | None, answer: int) -> Page:
    """``question <start> thoughts <end> [step <start> thoughts <end>] answer``, of so many tokens and thoughts."""
    rng = np.random.default_rng([question, first, step, answer])
    draw = lambda length: rng.integers(0, 19, length).astype(np.int32)
    markers = Markers.of(TOKENIZER)
    parts = [Text(draw(question)), markers.start_text, Thoughts(first), markers.end_text]
    if second is not None:
        parts += [Text(draw(step), True, 0), markers.start_text, Thoughts(second), markers.end_text]
    return (*parts, Text(draw(answer), True, 1, True))


def without_markers(page: Page) -> Page:
    """What is scored follows the prompt, or thoughts, at once."""
    return tuple(part for part in page if isinstance(part, Thoughts) or part.scored or part is page[0])


# Fewer thoughts than the block has, none, no second block, no block at all, and a row's place that is free.
PAGES = [
    page(3, 3, 2, 2, 2),
    page(7, 1, 0, None, 1),
    page(2, 0, 1, 1, 3),
    without_markers(page(5, 3, 3, 0, 1)),
    without_markers(page(4, 2, 1, 2, 1)),
    None,
    tuple(part for part in page(6, 0, 0, None, 4) if not isinstance(part, Thoughts)),
    page(1, 3, 2, 2, 2),
]
SHAPE = page_shape([page for page in PAGES if page is not None])
IMPLICIT, AUTODIFF, PAUSE = OneByOne(), OneByOne(gradient="autodiff"), Sweeps(count=0)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def learnt(config: DecoderConfig, batch: Batch, think: Thinker, *, dropout: float = 0.0, **execution: Any) -> Any:
    """Loss, metrics and gradients of a batch, in float64."""
    decoder = random_decoder(dataclasses.replace(config, param_dtype="float64", dropout=dropout), **execution)
    model = Model(decoder, {"feedback": Identity()})
    context = LossContext(think=think, key=jax.random.key(0) if dropout else None)

    def loss(model: Model) -> Any:
        made = imitation_loss(model, {"main": jax.tree.map(jnp.asarray, batch)}, context)
        return made.terms["language"].ratio.mean(), {name: value.mean() for name, value in made.metrics.items()}

    return quick_jit(jax.value_and_grad(loss, has_aux=True))(model)


def assert_close(ours: Any, theirs: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=jax.tree_util.keystr(path))


ONE_LAYER = dataclasses.replace(GPT2_STYLE, num_layers=1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("config", "rows", "ways", "execution"),
    [
        (ONE_LAYER, 2, (IMPLICIT,), {}),
        pytest.param(ONE_LAYER, 1, (AUTODIFF,), {}, marks=pytest.mark.slow),
        pytest.param(GPT2_STYLE, 4, (IMPLICIT,), {}, marks=pytest.mark.slow),
        pytest.param(ONE_LAYER, 2, (PAUSE,), {}, marks=pytest.mark.slow),
        # Windows that begin in an earlier segment; columns of other examples lie between.
        pytest.param(LOCAL_STYLE, 2, (IMPLICIT,), {}, marks=pytest.mark.slow),
        pytest.param(LATENT_STYLE, 2, (IMPLICIT,), {"scan_layers": True, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param(EXPERTS_STYLE, 2, (IMPLICIT,), {}, marks=pytest.mark.slow),
    ],
    ids=["gpt2", "autodiff", "two layers", "pause", "local", "latent, scanned", "experts"],
)
def test_values_and_gradients_are_those_of_rows_of_one_example(
    config: DecoderConfig, rows: int, ways: tuple[Thinker, ...], execution: dict[str, Any]
) -> None:
    feeds_back = ways[0] != PAUSE
    one = aligned(PAGES, SHAPE, TOKENIZER, feeds_back=feeds_back)
    many = packed(one, SHAPE, rows, feeds_back=feeds_back)
    assert many.tokens.size < 0.9 * one.tokens.size
    expected = learnt(config, one, ways[0], **execution)
    # What is added to all keys moves no attention, and a router's correction has no gradient.
    for path, leaf in jax.tree_util.tree_flatten_with_path(expected[1].decoder.layers)[0]:
        name = jax.tree_util.keystr(path)
        assert np.linalg.norm(leaf) > 1e-3 or ".key.bias" in name or ".correction" in name, name
    for think in ways:
        assert_close(learnt(config, many, think, **execution), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_dropout_drops_the_same_where_a_thought_is_made_and_made_again() -> None:
    many = packed(aligned(PAGES, SHAPE, TOKENIZER), SHAPE, 2)
    first, second = (learnt(ONE_LAYER, many, think, dropout=0.2) for think in (IMPLICIT, AUTODIFF))
    assert_close(first, second)


def test_an_example_does_not_see_the_others_of_its_row() -> None:
    """Whatever they hold; and its thoughts are its own."""
    one = aligned(PAGES, SHAPE, TOKENIZER)
    many = packed(one, SHAPE, 2)
    assert many.members is not None
    other = many.members != 1
    changed = dataclasses.replace(many, tokens=np.where(other, (many.tokens + 1) % 19, many.tokens).astype(np.int32))
    decoder = random_decoder(ONE_LAYER)
    run = quick_jit(lambda batch: rollout_batch(decoder, Identity(), batch, every_hidden=True))
    (first, _), (second, _) = ((out.hidden, out.last) for out in (run(many), run(changed)))
    own = many.valid & ~other
    np.testing.assert_array_equal(first[own], second[own])
    assert np.abs(first - second)[many.valid & other].max() > 1e-2


# --- What is refused --------------------------------------------------------------------------------------------------


def test_what_rows_of_several_examples_cannot_have_is_refused() -> None:
    many = jax.tree.map(jnp.asarray, packed(aligned(PAGES, SHAPE, TOKENIZER), SHAPE, 2))
    decoder = random_decoder(ONE_LAYER)
    run = lambda decoder=decoder, **changes: rollout_batch(decoder, Identity(), many, **changes)
    with pytest.raises(CoconutError, match=r"Sweeps\(count=2\): the thoughts of rows of several examples are made one"):
        run(think=Sweeps(count=2))
    with pytest.raises(CoconutError, match="neither thoughts nor masks can be drawn"):
        run(keys=jax.random.split(jax.random.key(0), 2))
    with pytest.raises(CoconutError, match="attention = 'xla': kernels do not take rows of several examples"):
        run(random_decoder(ONE_LAYER, attention="xla"))
    for number, message in ((0, "must be at least 1"), (3, "must divide batch_size = 4")):
        with pytest.raises(CoconutError, match=f"PipelineConfig.examples_per_row = {number}: {message}"):
            source(examples_per_row=number)
