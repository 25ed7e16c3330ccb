"""Question files: round trips, and one readable error for everything malformed."""

import dataclasses
import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.errors import CoconutError
from coconut.tasks import TASKS, BadRecords, Task, content_hash, get_task, load_examples, save_examples
from coconut.tasks.statistics import text_statistics
from coconut.types import Example, Graph, Think

GOOD = {"question": "Is Tom a lempus or impus?", "steps": ["Tom is a lempus."], "answer": "Tom is a lempus."}
WITH_GRAPH = {
    **GOOD,
    "idx_to_symbol": ["Tom", "lempus", "impus"],
    "edges": [[0, 1]],
    "root": 0,
    "target": 1,
    "neg_target": 2,
}

filled = st.text(min_size=1).filter(str.strip)


@st.composite
def graph_fields(draw):
    symbols = draw(st.lists(st.text(), min_size=1, max_size=6))
    node = st.integers(0, len(symbols) - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=8))
    root, target, negative = draw(st.tuples(node, node, node))
    return {"symbols": tuple(symbols), "edges": tuple(edges), "root": root, "target": target, "negative": negative}


# Fields rather than examples: the runtime type checks of a constructor would draw random numbers inside a strategy.
example_fields = st.fixed_dictionaries(
    {
        "question": filled,
        "steps": st.lists(filled, max_size=4).map(tuple),
        "answer": filled,
        "graph": st.none() | graph_fields(),
    }
)


def build(fields):
    graph = fields["graph"]
    return Example(**{**fields, "graph": graph and Graph(**graph)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.mark.parametrize("name", ["questions.json", "questions.jsonl", "questions"])
@given(fields=st.lists(example_fields, min_size=1, max_size=4))
def test_what_was_written_is_read(folder, name, fields):
    written = list(map(build, fields))
    save_examples(folder / name, written)
    assert load_examples(folder / name) == written


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.generator])
def test_generated_examples_survive_the_round_trip(tmp_path, task):
    written = get_task(task).generate(20, seed=0)
    save_examples(tmp_path / "questions.jsonl", written)
    assert get_task(task).load(tmp_path / "questions.jsonl") == written
    assert len((tmp_path / "questions.jsonl").read_text().splitlines()) == 20


def test_lines_are_recognised_without_a_telling_name(tmp_path):
    (tmp_path / "questions.txt").write_text(json.dumps(GOOD) + "\r\n\n" + json.dumps(WITH_GRAPH) + "\n")
    first, second = load_examples(tmp_path / "questions.txt")
    assert first.graph is None and first.steps == ("Tom is a lempus.",)
    assert second.graph is not None and second.graph.edges == ((0, 1),) and second.graph.negative == 2


def test_other_fields_and_a_byte_order_mark_are_ignored(tmp_path):
    (tmp_path / "questions.json").write_text(
        "\ufeff" + json.dumps([{**GOOD, "neighbor_k": {"0": [1]}}]), encoding="utf-8"
    )
    assert load_examples(tmp_path / "questions.json")[0].answer == GOOD["answer"]


def test_the_released_split_is_read(shared_data):
    released = load_examples(shared_data / "prosqa_valid.json")
    assert len(released) == 300
    assert all(example.graph is not None and example.steps for example in released)


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([1], r"expected an object, got \[1\]"),
        (without(GOOD, "steps"), "field 'steps' is missing"),
        ({**GOOD, "question": 3}, "'question' must be a text that is not blank, got 3"),
        ({**GOOD, "answer": " "}, "'answer' must be a text that is not blank, got ' '"),
        ({**GOOD, "steps": "Tom is a lempus."}, "'steps' must be a list of texts, got 'Tom is"),
        *(
            ({**GOOD, "steps": ["a", step]}, r"'steps'\[1\] must be a text, or .*; got " + re.escape(repr(step)))
            for step in (None, {"think": 0}, {"think": -1}, {"think": True}, {"think": 2.0}, {"think": "2"})
        ),
        ({**GOOD, "steps": [{"think": 2, "x": 1}]}, r"'steps'\[0\] must be .*; got {'think': 2, 'x': 1}"),
        ({**GOOD, "steps": [{"thoughts": 2}, "a"]}, r"'steps'\[0\] must be .*; got {'thoughts': 2}"),
        ({**GOOD, "steps": ["a", {}]}, r"'steps'\[1\] must be .*; got {}"),
        (without(WITH_GRAPH, "edges"), "'edges' is missing"),
        ({**WITH_GRAPH, "idx_to_symbol": ["Tom", 1, "impus"]}, r"'idx_to_symbol'\[1\] must be a text, got 1"),
        ({**WITH_GRAPH, "edges": {}}, "'edges' must be a list, got {}"),
        ({**WITH_GRAPH, "edges": [[0, 1, 2]]}, r"'edges'\[0\] must be a pair of node ids, got \[0, 1, 2\]"),
        ({**WITH_GRAPH, "edges": [[0, 1], [0, 3]]}, r"'edges'\[1\]: node id 3 is outside 0..2"),
        ({**WITH_GRAPH, "root": -1}, "'root': node id -1 is outside 0..2"),
        ({**WITH_GRAPH, "target": True}, "'target': a node id must be an integer, got True"),
        ({**WITH_GRAPH, "neg_target": 1.0}, "'neg_target': a node id must be an integer, got 1.0"),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_a_malformed_record_is_named(tmp_path, record, complaint, lines):
    path = tmp_path / ("bad.jsonl" if lines else "bad.json")
    records = [GOOD, record]
    path.write_text("\n\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    place = "record 1 (line 3)" if lines else "record 1"
    with pytest.raises(CoconutError, match=re.escape(f"{path}: {place}: ") + ".*" + complaint):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", "", "holds no records"),
        ("a.json", json.dumps(GOOD, indent=1), "expected a list of records, one record a line, or columns"),
        ("a.json", '{"question": ["a", "b"], "answer": ["c"]}', "columns of the same length, got {'question'"),
        ("a.json", '[\n{"question": }]', "line 2, column 14: not JSON"),
        ("a.jsonl", json.dumps(GOOD) + "\n\n{'question'}", "line 3, column 2: not JSON"),
        ("a.json", "{}", "record 0 (line 1): field 'question' is missing; there are none"),
        ("a.jsonl", "3", "record 0 (line 1): expected an object, got 3"),
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a", " ", "holds no records"),
        ("a.json", "[" * 100_000, "not usable JSON"),
        ("a.json", f"[{'9' * 5000}]", "not usable JSON"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(CoconutError, match=re.escape(str(tmp_path / name)) + ".*" + re.escape(complaint)):
        load_examples(tmp_path / name)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(CoconutError, match=r"missing\.json: cannot be read: No such file"):
        load_examples(tmp_path / "missing.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(CoconutError, match="not UTF-8: byte 2 is 0xe9"):
        load_examples(tmp_path / "latin.json")


@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*WITH_GRAPH, "x"]), inner),
    )
)
def test_no_content_ends_in_another_error(folder, content):
    path = folder / "any.json"
    path.write_text(json.dumps([content]))
    try:
        load_examples(path)
    except CoconutError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_step_may_be_a_block_of_thoughts(tmp_path, name):
    steps = ("Tom is a lempus.", Think(2), "Tom is an impus.", Think(1))
    example = Example(question="Is Tom an impus?", steps=steps, answer="yes")
    save_examples(tmp_path / name, [example])
    assert load_examples(tmp_path / name) == [example]
    assert (
        '"steps": ["Tom is a lempus.", {"think": 2}, "Tom is an impus.", {"think": 1}]' in (tmp_path / name).read_text()
    )
    assert example.written_steps == steps[::2]
    # It is the same question as without them.
    assert content_hash(example) == content_hash(dataclasses.replace(example, steps=()))
    counts = text_statistics([example])
    assert (counts["steps"].counts, counts["words of the steps"].counts) == ({2: 1}, {8: 1})
    with pytest.raises(CoconutError, match=r"Think\.count = 0"):
        Think(0)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "questions.json"
    old = [Example(question="a", steps=(), answer="b")]
    save_examples(path, old)

    def broken():
        yield from old
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        save_examples(path, broken())
    assert load_examples(path) == old
    assert os.listdir(tmp_path) == ["questions.json"]
    with pytest.raises(CoconutError, match="cannot be written"):
        save_examples(tmp_path / "nowhere" / "questions.json", old)


@pytest.mark.parametrize("steps", [[""], [" ", "\n"], []])
def test_blank_steps_are_no_steps(tmp_path, steps):
    (tmp_path / "a.json").write_text(json.dumps([{**GOOD, "steps": steps}]))
    assert load_examples(tmp_path / "a.json")[0].steps == ()


@pytest.mark.parametrize("extra", [{"target": "lempus"}, {"edges": 3}, {"root": None, "target": 1, "edges": []}])
def test_fields_of_other_tasks_are_no_graph(tmp_path, extra):
    (tmp_path / "a.json").write_text(json.dumps([{**GOOD, **extra}]))
    assert load_examples(tmp_path / "a.json")[0].graph is None


def test_a_graph_beside_cot_is_kept(tmp_path):
    graph = {"edges": [[0, 1], [0, 2]], "root": 0, "target": 1, "neg_target": 2, "idx_to_symbol": ["a", "b", "c"]}
    record = {**GOOD, **graph}
    (tmp_path / "steps.json").write_text(json.dumps([record]))
    (tmp_path / "cot.json").write_text(json.dumps([{**record, "cot": record.pop("steps")}]))
    [example] = load_examples(tmp_path / "cot.json")
    assert [example] == load_examples(tmp_path / "steps.json") and example.graph is not None


@pytest.mark.parametrize("answer", [",", " , ,"])
def test_an_empty_reference_is_named(tmp_path, answer):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {**GOOD, "answer": answer}]))
    with pytest.raises(
        CoconutError, match=r"a\.json: record 1: field 'answer' must be .* not blank without its commas"
    ):
        get_task("prosqa").load(tmp_path / "a.json")


@pytest.mark.parametrize("answer", ["#### 5", "a #b", "[A] 7", "C ###"])
def test_a_reference_that_no_text_can_give_is_named(tmp_path, answer):
    (tmp_path / "a.json").write_text(json.dumps([{**GOOD, "answer": answer}]))
    with pytest.raises(CoconutError, match=r"a\.json: record 0: field 'answer' holds a mark"):
        get_task("gsm8k").load(tmp_path / "a.json")


OFFICIAL = {"question": "Max is a x.", "query": "True or false: Max is a x.", "chain_of_thought": [], "answer": "True"}
FILES = {
    "field.json": ("prosqa", json.dumps([3, GOOD, {**GOOD, "answer": 3}]), ["record 0: ", "record 2: "]),
    "field.jsonl": ("prosqa", f"{{\n{json.dumps(GOOD)}\n\n[]\n", [": line 1, column ", "record 2 (line 4): "]),
    "released.jsonl": ("gsm8k", '{"question": "a", "answer": "#### 1"}\n{}\nnull', ["(line 2): ", "(line 3): "]),
    "icot.txt": ("gsm8k", "a||#### 1\na|#### 1\n||#### 1", ["record 1 (line 2): ", "record 2 (line 3): "]),
    "products.txt": (
        "multiplication",
        "2 * 3||6 0 #### 6 0\n2 * 3||6 0 #### 7 0\nx||#### 1",
        ["record 1 (line 2): ", "record 2 (line 3): "],
    ),
    "official.json": (
        "prontoqa",
        json.dumps({"example1": {"test_example": OFFICIAL}, "example2": 3, "example3": {}}),
        ["'example2'", "'example3'"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_records_are_left_out_and_listed(tmp_path, name, caplog):
    task, content, places = FILES[name]
    path = tmp_path / name
    path.write_text(content)
    bad = BadRecords(most=2)
    assert len(get_task(task).load(path, bad)) == 1
    assert len(bad.reasons) == 2 and len(caplog.records) == 2
    for reason, place in zip(bad.reasons, places, strict=True):
        assert str(path) in reason and place in reason and f"left out: {reason}" in caplog.text
    with pytest.raises(CoconutError, match=re.escape(places[1]) + r".*\(1 malformed records were left out already\)"):
        get_task(task).load(path, BadRecords(most=1))
    with pytest.raises(CoconutError, match=re.escape(places[0])):
        get_task(task).load(path)


def test_a_loader_that_cannot_leave_out_says_so(tmp_path):
    task = Task(name="own", loader=lambda path: [Example(question="a", steps=(), answer="b")])
    assert len(task.load("x")) == 1
    with pytest.raises(CoconutError, match="loader of task 'own' has no parameter 'bad'"):
        task.load("x", BadRecords(most=1))
