"""The pipeline: which examples stand in a batch is a function of the seed and the batch's number, of nothing else."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Text, write_on
from coconut.pipeline import BatchSource, PipelineConfig, make_iterator, pipeline_fingerprint
from coconut.tasks import get_task
from coconut.tasks.graph_form import graph_symbols
from coconut.tokenizers import SYMBOLS, TokenizedExample, encode_example, symbol_tokenizer, word_tokenizer
from coconut.types import Batch, Think
from tests.tiny_pages import placing_at

TOKENIZER = symbol_tokenizer(tuple("abcdefgh"))
CURRICULUM = CurriculumConfig(max_latent_stage=2, uniform_prob=0.4)
CONFIG = PipelineConfig(batch_size=4)


def make_examples(count: int) -> list[TokenizedExample]:
    """Examples with questions of nine lengths, of two steps each."""
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, 8, length).astype(np.int32)
    return [
        TokenizedExample(question=draw(2 + index % 9), steps=(draw(1), draw(2)), answer=draw(2))
        for index in range(count)
    ]


EXAMPLES = make_examples(22)


def source(config: PipelineConfig = CONFIG, **changes: Any) -> BatchSource:
    settings = {"method": METHODS["coconut"], "stage": 1, "seed": 7, **changes}
    method, stage = settings.pop("method"), settings.pop("stage")
    return BatchSource(EXAMPLES, TOKENIZER, method, placing_at(TOKENIZER, CURRICULUM, stage), config, **settings)


def same(first: dict[str, Batch], second: dict[str, Batch]) -> bool:
    # The schedule is part of the structure.
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(np.array_equal(a, b) for a, b in leaves)


def test_the_seed_decides_every_batch():
    first, again, other = source(), source(), source(seed=8)
    numbers = [0, 5, 6, 17, 3]
    assert all(same(first[number], again[number]) for number in numbers)
    assert not any(same(first[number], other[number]) for number in numbers)


@pytest.mark.parametrize("buckets", [(), (4, 8)])
def test_an_epoch_covers_every_example_once_in_an_order_of_its_own(buckets):
    batches = source(PipelineConfig(batch_size=4, length_buckets=buckets))
    orders = []
    for epoch in range(3):
        numbers = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
        seen = [int(index) for number in numbers for index in batches[number]["main"].examples]
        assert Counter(index for index in seen if index >= 0) == Counter(range(len(EXAMPLES)))
        # Rows are filled up at most once a bucket.
        assert seen.count(-1) < 4 * (len(buckets) + 1)
        orders.append(tuple(seen))
    assert len(set(orders)) == 3


def test_the_order_of_the_data_does_not_depend_on_the_stage():
    one, two = source(stage=0), source(stage=2)
    members = lambda batches, number: batches[number]["main"].examples.tolist()
    assert all(members(one, number) == members(two, number) for number in range(9))


def test_a_drawn_stage_belongs_to_the_example_and_the_epoch():
    """Every example's stage is drawn anew each epoch, whatever batch the example stands in."""

    def thoughts(batches: BatchSource, epoch: int) -> dict[int, int]:
        per_epoch = batches.batches_per_epoch
        return {
            int(index): int((tokens == TOKENIZER.latent_id).sum())
            for batch in (batches[number]["main"] for number in range(epoch * per_epoch, (epoch + 1) * per_epoch))
            for index, tokens in zip(batch.examples, batch.tokens, strict=True)
            if index >= 0
        }

    small, large = source(), source(PipelineConfig(batch_size=11))
    assert thoughts(small, 0) == thoughts(large, 0) != thoughts(small, 1)
    assert set(thoughts(small, 0).values()) == {0, 1, 2}


def test_threads_and_prefetching_change_nothing():
    plain = make_iterator(source(), CONFIG, start=0)
    config = dataclasses.replace(CONFIG, threads=4, prefetch=16)
    threaded = make_iterator(source(config), config, start=0)
    direct = source()
    for number in range(20):
        batch = next(threaded)
        assert same(batch, next(plain))
        assert same(batch, direct[number])


@pytest.mark.parametrize("buckets", [(), (5,)])
def test_the_halves_of_two_processes_join_to_the_whole_batch(buckets):
    config = PipelineConfig(batch_size=4, length_buckets=buckets)
    whole = source(config)
    halves = [source(config, rows=rows) for rows in (slice(0, 2), slice(2, 4))]
    for number in range(2 * whole.batches_per_epoch):
        first, second = (half[number] for half in halves)
        # One compiled shape for both.
        assert jax.tree.structure(first) == jax.tree.structure(second) == jax.tree.structure(whole[number])
        assert same(jax.tree.map(lambda *parts: np.concatenate(parts), first, second), whole[number])


@pytest.mark.parametrize("stopped_at", [2, 6, 9])
def test_a_restored_iterator_goes_on_in_the_middle_of_an_epoch(stopped_at):
    iterator = make_iterator(source(), CONFIG, start=0)
    for _ in range(stopped_at):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(8)]
    restored = make_iterator(source(), CONFIG, start=0)
    restored.set_state(state)
    assert all(same(batch, next(restored)) for batch in expected)
    # The loop itself starts by number.
    by_number = make_iterator(source(), CONFIG, start=stopped_at)
    assert all(same(batch, next(by_number)) for batch in expected)


# --- What a method may make of a draw, and of how far the stage is ------------------------------------------------


def record(seen: list[Placing]) -> Method:
    """A method of two views, which writes the steps or not, and remembers by what."""

    def write(example: TokenizedExample, placing: Placing) -> Page:
        seen.append(placing)
        return (Text(example.question), *write_on(example.steps, example, placing.markers))

    short = lambda example, placing: (Text(example.question), *write_on((), example, placing.markers))
    return Method(name="recorded", pages={"main": write, "short": short})


def test_views_are_batches_of_the_same_examples_with_their_own_columns():
    batches = source(method=record([]))
    for number in (0, 3, batches.batches_per_epoch - 1):
        views = batches[number]
        assert list(views) == ["main", "short"]
        main, short = views.values()
        assert main.examples.tolist() == short.examples.tolist()
        for row, index in enumerate(main.examples):
            own = EXAMPLES[index].ids.tolist() if index >= 0 else []
            assert main.tokens[row, main.valid[row]].tolist() == own
            expected = [*EXAMPLES[index].question, *EXAMPLES[index].answer] if index >= 0 else []
            assert short.tokens[row, short.valid[row]].tolist() == expected
    shapes = batches.shapes[0]
    assert shapes["main"].texts == (5,) and shapes["short"].texts == (2,)
    iterator = make_iterator(source(method=record([])), CONFIG, start=0)
    assert same(next(iterator), batches[0])


def test_a_draw_belongs_to_the_example_and_the_epoch():
    def draws(epoch: int, **changes: Any) -> dict[int, float]:
        seen: list[Placing] = []
        batches = source(method=record(seen), **changes)
        assert {placing.draw for placing in seen} == {None}  # The shape is that of the longest page.
        seen.clear()
        numbers = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
        order = [int(index) for number in numbers for index in batches[number]["main"].examples if index >= 0]
        return dict(zip(order, [float(placing.draw or 0) for placing in seen], strict=True))

    first = draws(1)
    assert first == draws(1, stage=2) == draws(1, config=PipelineConfig(batch_size=11))
    assert first != draws(2) and first != draws(1, seed=8)
    assert len(set(first.values())) == len(EXAMPLES) and all(0 <= value < 1 for value in first.values())
    # They are no draws of the stage: those have another generator.
    uniform = np.random.Generator(np.random.Philox(np.random.SeedSequence([7, 1])))
    uniform.permutation(len(EXAMPLES))
    assert not set(uniform.random((len(EXAMPLES), 2)).ravel()) & set(first.values())


def test_progress_is_the_share_of_the_stage_that_is_over():
    seen: list[Placing] = []
    batches = source(method=record(seen), stage_start=9)
    assert batches.stage_length == 5 * batches.batches_per_epoch  # Five epochs.

    def progress(number: int) -> float:
        seen.clear()
        assert batches[number]
        [value] = {placing.progress for placing in seen}
        return value

    assert progress(9) == 0.0 and progress(9 + 6) == 6 / batches.stage_length
    assert progress(9 + batches.stage_length - 1) < 1.0 == progress(9 + 2 * batches.stage_length)
    assert progress(3) == 0.0


def test_length_buckets_save_padding():
    def mean_padding(config: PipelineConfig) -> float:
        batches = source(config)
        shares = [1 - batches[number]["main"].valid.mean() for number in range(batches.batches_per_epoch)]
        return float(np.mean(shares))

    bucketed = PipelineConfig(batch_size=2, length_buckets=(4, 7))
    assert mean_padding(bucketed) < 0.8 * mean_padding(PipelineConfig(batch_size=2))
    shapes = source(bucketed).shapes
    assert [shape["main"].prompt - 1 for shape in shapes] == [4, 7, 10]
    assert len(source(PipelineConfig(batch_size=2, length_buckets=(4, 7, 50))).shapes) == 3


def test_rows_are_padded_to_the_multiple():
    batches = source(PipelineConfig(batch_size=4, multiple_of=8))
    assert (batches.shapes[0]["main"].prompt, batches.shapes[0]["main"].texts) == (16, (0, 8))


def test_the_fingerprint_changes_with_all_that_decides_the_batches():
    def fingerprint(examples=EXAMPLES, tokenizer=TOKENIZER, config=CONFIG, seed=7) -> str:
        return pipeline_fingerprint(examples, tokenizer, config, seed=seed)

    changed = dataclasses.replace(EXAMPLES[3], answer=EXAMPLES[3].answer[::-1].copy() + 1)
    # The same ids, cut at other places.
    one, *steps = EXAMPLES[0].written_steps
    moved = dataclasses.replace(EXAMPLES[0], question=np.append(EXAMPLES[0].question, one), steps=tuple(steps))
    thinking = lambda count: dataclasses.replace(EXAMPLES[0], steps=(Think(count), *EXAMPLES[0].steps))
    prints = [
        fingerprint(),
        fingerprint(seed=8),
        fingerprint(examples=EXAMPLES[:-1]),
        fingerprint(examples=EXAMPLES[::-1]),
        fingerprint(examples=[*EXAMPLES[:3], changed, *EXAMPLES[4:]]),
        fingerprint(examples=[moved, *EXAMPLES[1:]]),
        fingerprint(examples=[thinking(1), *EXAMPLES[1:]]),
        fingerprint(examples=[thinking(2), *EXAMPLES[1:]]),
        fingerprint(config=dataclasses.replace(CONFIG, batch_size=8)),
        fingerprint(config=dataclasses.replace(CONFIG, length_buckets=(4,))),
        fingerprint(config=dataclasses.replace(CONFIG, shuffle_edges=True)),
        fingerprint(tokenizer=symbol_tokenizer(tuple("abcdefghi"))),
    ]
    assert len(set(prints)) == len(prints)
    # Threads never change a batch.
    assert fingerprint(config=dataclasses.replace(CONFIG, threads=3, prefetch=2)) == prints[0]


@pytest.mark.parametrize(
    "field,value",
    [("batch_size", 0), ("multiple_of", 0), ("threads", 0), ("prefetch", -1)],
)
def test_a_value_out_of_range_is_named_with_its_field(field: str, value: Any):
    with pytest.raises(CoconutError) as error:
        PipelineConfig(**{"batch_size": 4, field: value})
    assert f"PipelineConfig.{field} = {value!r}" in str(error.value)


# --- Edges in another order every epoch ---------------------------------------------------------------------------

GRAPHS = get_task("small_graphs").generate(10, 0, config="e8")
GRAPH_TOKENIZER = symbol_tokenizer(graph_symbols(12))


def graph_source(
    seed: int = 7, stage: int = 0, batch_size: int = 4, shuffle_edges: bool = True, **settings: Any
) -> BatchSource:
    examples = [encode_example(GRAPH_TOKENIZER, example, SYMBOLS) for example in GRAPHS]
    config = PipelineConfig(batch_size=batch_size, shuffle_edges=shuffle_edges)
    placing = placing_at(GRAPH_TOKENIZER, CURRICULUM, stage)
    return BatchSource(examples, GRAPH_TOKENIZER, METHODS["coconut"], placing, config, seed=seed, **settings)


def questions(batches: BatchSource, epoch: int) -> dict[int, str]:
    """The question of every example as an epoch shows it."""
    per_epoch, shape = batches.batches_per_epoch, batches.shapes[0]["main"]
    return {
        int(index): GRAPH_TOKENIZER.decode(tokens[: shape.prompt - 1][valid[: shape.prompt - 1]].tolist())
        for batch in (batches[number]["main"] for number in range(epoch * per_epoch, (epoch + 1) * per_epoch))
        for index, tokens, valid in zip(batch.examples, batch.tokens, batch.valid, strict=True)
        if index >= 0
    }


def parts(question: str) -> tuple[Counter[str], frozenset[str], str]:
    """Edges, candidates and the root: all that a question says, without its order."""
    edges, rest = question.removeprefix("<eos> ").split(" [Q] ")
    candidates, root = rest.split(" [R] ")
    return Counter(edge.strip() for edge in edges.split("|")), frozenset(candidates.split()), root


def test_each_epoch_shows_the_same_graph_in_another_order():
    plain = [example.question for example in GRAPHS]
    epochs = [questions(graph_source(), epoch) for epoch in range(6)]
    for index, question in enumerate(plain):
        shown = [epoch[index] for epoch in epochs]
        assert len(set(shown)) == 6
        assert all(parts(text) == parts(question) for text in shown)
        assert len({text.split("[Q]")[1] for text in shown}) <= 2
    swapped = sum(epoch[i].split("[Q]")[1] != plain[i].split("[Q]")[1] for epoch in epochs for i in range(10))
    assert 15 <= swapped <= 45
    assert questions(graph_source(shuffle_edges=False), 3) == dict(enumerate(plain))


def test_the_order_of_edges_is_decided_by_seed_epoch_and_example_alone():
    first = questions(graph_source(), 1)
    assert first == questions(graph_source(), 1) == questions(graph_source(stage=2), 1)
    # Whatever batch the example stands in.
    assert first == questions(graph_source(batch_size=5), 1)
    assert first != questions(graph_source(seed=8), 1)
    halves = [graph_source(rows=rows) for rows in (slice(0, 2), slice(2, 4))]
    whole = graph_source()
    for number in range(2 * whole.batches_per_epoch):
        joined = jax.tree.map(lambda *both: np.concatenate(both), *(half[number] for half in halves))
        assert same(joined, whole[number])


def test_edges_are_shuffled_where_there_are_edges_only():
    config = dataclasses.replace(CONFIG, shuffle_edges=True)
    words = word_tokenizer(["a b"])
    with pytest.raises(CoconutError, match="shuffle_edges = True: needs questions in symbols, not 'word' ids"):
        BatchSource(EXAMPLES, words, METHODS["cot"], placing_at(words, CURRICULUM, 0), config, seed=0)
    bars = symbol_tokenizer(("|", *"abcdefg"))
    with pytest.raises(CoconutError, match="training example 0 is no graph question"):
        BatchSource(EXAMPLES, bars, METHODS["cot"], placing_at(bars, CURRICULUM, 0), config, seed=0)


def test_bad_input_is_refused():
    with pytest.raises(CoconutError, match=r"length_buckets = \(8, 4\)"):
        PipelineConfig(batch_size=4, length_buckets=(8, 4))
    with pytest.raises(CoconutError, match="empty"):
        BatchSource([], TOKENIZER, METHODS["cot"], placing_at(TOKENIZER, CURRICULUM, 0), CONFIG, seed=0)
