"""The contract of tasks: names, options, answers, and splits that do not overlap."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.errors import CoconutError
from coconut.tasks import TASKS, Task, assert_disjoint, content_hash, extract_answer, get_task, prosqa
from coconut.types import Example


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(CoconutError, match=r"unknown task: 'prosaq'; did you mean 'prosqa'\? \(known: .*small_graphs"):
        get_task("prosaq")
    with pytest.raises(CoconutError, match=r"unknown option of task 'prosqa': 'negative'; did you mean 'negatives'\?"):
        get_task("prosqa").generate(1, seed=0, negative="official")
    with pytest.raises(CoconutError, match="'gsm' cannot be generated"):
        Task(name="gsm").generate(1, seed=0)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.generator])
def test_every_task_generates_what_it_accepts(name):
    task = get_task(name)
    assert task.name == name
    for example in task.generate(20, seed=0):
        assert task.check(example.answer, example)
        assert task.check(f"### {example.answer}", example)
        assert not task.check(f"{example.answer}0", example)
        assert not task.check("", example)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<<2+3=5>>\n### 1,234 ", "1234"),
        ("#### 7", "7"),
        ("# 1 # 2", "2"),
        ("Tom is a lempus.", "Tom is a lempus."),
        ("5 6 7 [A] 7", "7"),
        ("[A] 3 [A] 4 ", "4"),
        ("", ""),
        ("### C#", "C#"),
        ("It is C#", "It is C#"),
        ("C####", ""),
    ],
)
def test_answers_are_what_follows_the_last_mark(text, answer):
    assert extract_answer(text) == answer


@given(st.text(alphabet="#[A], 1x\n"))
def test_an_extracted_answer_is_its_own(text):
    assert extract_answer(extract_answer(text)) == extract_answer(text)


def test_a_reference_is_not_cut():
    example, task = Example(question="Which language?", steps=(), answer="C#"), get_task("gsm8k")
    assert task.check("### C#", example)
    for wrong in ("####", "### ", "", "C", "### C", "C####"):
        assert not task.check(wrong, example)
    # Nor where it holds a mark (`Task.load` refuses it).
    assert not task.check("### b", dataclasses.replace(example, answer="a #b"))


NEAR = [
    "Is Tom a cafe\u0301?",
    "is tom a CAF\xc9?",
    "Is  Tom a caf\xe9?",
    "Is T\u200bom a caf\xe9\ufeff?",
    "Is \uff34om a caf\xe9?",
]


def test_near_duplicates_are_the_same_question():
    def of(question):
        return Example(question=question, steps=(), answer="yes")

    assert len({content_hash(of(question)) for question in NEAR}) == 1
    assert content_hash(of("Tom is here. Go.")) == content_hash(of("Tom is here. go"))
    assert content_hash(of("Tom is here?")) != content_hash(of("Tom is here!"))
    test = [of("is tom a CAF\xc9?"), of(NEAR[2]), of("Another.")]
    with pytest.raises(CoconutError, match=r"^2 question\(s\) of test are also in train, 1 of them but for case"):
        assert_disjoint([of("Is Tom a caf\xe9?")], test, "train", "test")


def test_graph_answers_are_compared_whole():
    [example] = prosqa.generate(1, seed=0, form="graph")
    target = example.answer
    task = get_task("prosqa")
    assert task.check(f"{' '.join(example.written_steps)} [A] {target}", example)
    assert not task.check(f"[A] {target} 1", example)
    assert not task.check(f"[A] 1{target}", example)


def shuffled(example: Example, rng: random.Random) -> Example:
    if "[Q]" in example.question:
        edges, asked = example.question.removeprefix("<eos> ").split(" | [Q] ")
        parts = edges.split(" | ")
        rng.shuffle(parts)
        first, second, mark, root = asked.split()
        return dataclasses.replace(example, question=f"<eos> {' | '.join(parts)} | [Q] {second} {first} {mark} {root}")
    *sentences, last = example.question.split(". ")
    rng.shuffle(sentences)
    is_, root, a, first, or_, second = last.removesuffix("?").split()
    return dataclasses.replace(example, question=". ".join([*sentences, f"{is_} {root} {a} {second} {or_} {first}?"]))


@pytest.mark.parametrize("form", ["text", "graph"])
def test_the_hash_knows_content_not_order(form):
    rng = random.Random(0)
    examples = prosqa.generate(50, seed=0, form=form)
    for example in examples:
        other = shuffled(example, rng)
        assert other.question != example.question
        assert content_hash(other) == content_hash(example)
        assert content_hash(dataclasses.replace(other, steps=(), answer="x", graph=None)) == content_hash(example)
    assert len(set(map(content_hash, examples))) == 50


def test_the_hash_tells_questions_apart():
    def digest(question):
        return content_hash(Example(question=question, steps=(), answer="1"))

    base = "<eos> 1 2 | 3 4 | [Q] 2 4 [R] 1"
    assert digest(base) == digest("<eos> 3 4 | 1 2 | [Q] 4 2 [R] 1")
    assert digest(base) != digest("<eos> 1 2 | 3 4 | [Q] 2 4 [R] 3")  # another root
    assert digest(base) != digest("<eos> 2 1 | 3 4 | [Q] 2 4 [R] 1")  # an edge turned round
    assert digest("Tom is a x. Is Tom a x or y?") != digest("Tom is a y. Is Tom a x or y?")
    assert digest("What is 2 + 3?") == digest("What  is 2 + 3?\n") != digest("What is 3 + 2?")


def test_overlapping_splits_are_refused():
    train = prosqa.generate(30, seed=0)
    assert_disjoint(train, prosqa.generate(30, seed=1))
    overlapping = [*prosqa.generate(3, seed=1), *(shuffled(example, random.Random(1)) for example in train[5:7])]
    message = (
        r"2 question\(s\) of valid are also in prosqa train; the first is record 3 of valid, record 5 of prosqa train"
    )
    with pytest.raises(CoconutError, match=message):
        assert_disjoint(train, overlapping, "prosqa train", "valid")
    known = frozenset(map(content_hash, train))
    assert_disjoint(train, prosqa.generate(30, seed=0, exclude=known))
