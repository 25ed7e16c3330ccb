"""Published test sets in the forms they are published in, and what counts as right on each."""

import json
from pathlib import Path
from typing import Any

import pytest

from coconut.errors import CoconutError
from coconut.tasks import get_task
from coconut.types import Example

CHOICES = [{"label": "A", "text": "ignore"}, {"label": "B", "text": "enforce "}]
BOTH = {"label": ["A", "B"], "text": ["ignore", "enforce"]}
ASKED = "What do they do?\nA: ignore\nB: enforce"
SVAMP = {
    "Body": "Jack has 8 pens and 2 caps. ",
    "Question": "How many  more pens?",
    "Answer": 6.0,
    "Type": "Subtraction",
}


def read(folder: Path, task: str, *records: Any) -> list[Example]:
    (folder / "a.json").write_text("\n".join(map(json.dumps, records)))
    return get_task(task).load(folder / "a.json")


@pytest.mark.parametrize(
    ("task", "record", "question", "answer"),
    [
        ("svamp", SVAMP, "Jack has 8 pens and 2 caps. How many more pens?", "6"),
        (
            "svamp",
            {"question_concat": "Jack has 8 pens. How many?", "Answer": "8.0"},
            "Jack has 8 pens. How many?",
            "8",
        ),
        ("multiarith", {"iIndex": 0, "sQuestion": " Ann  had 3. ", "lSolutions": [1500.0]}, "Ann had 3.", "1500"),
        ("multiarith", {"question": " Ann had 3. ", "final_ans": "7"}, "Ann had 3.", "7"),
        ("gsm_hard", {"input": "How?", "code": "raise", "target": -63.94736842105263}, "How?", "-63.94736842105263"),
        ("gsm_hard", {"instruction": "How?", "response": "So.\n#### 19,618,450.0"}, "How?", "19618450"),
        ("gsm_hard", {"question": "How?", "answer": 2.01e-06}, "How?", "0.00000201"),
        (
            "strategyqa",
            {"question": "Is it?", "answer": False, "facts": ["It is."], "decomposition": []},
            "Is it?",
            "no",
        ),
        ("strategyqa", {"question": "Is it?", "answer": "True"}, "Is it?", "yes"),
        ("commonsenseqa", {"answerKey": "B", "question": {"stem": "What do they do?", "choices": CHOICES}}, ASKED, "B"),
        ("commonsenseqa", {"answerKey": "A", "question": "What do they do?", "choices": BOTH}, ASKED, "A"),
        ("commonsenseqa", {"question": ASKED, "answer": "B"}, ASKED, "B"),
    ],
)
def test_published_forms(tmp_path: Path, task: str, record: dict[str, Any], question: str, answer: str) -> None:
    assert read(tmp_path, task, record) == [Example(question=question, steps=(), answer=answer)]


def test_steps_are_kept_where_there_are_some(tmp_path: Path) -> None:
    record = {"question": "Is it?", "cot": "It was. So it is.", "answer": True}
    assert read(tmp_path, "strategyqa", record)[0].steps == ("It was.", "So it is.")
    assert read(tmp_path, "svamp", {"question": "?", "steps": ["a"], "answer": 3})[0].steps == ("a",)


@pytest.mark.parametrize(
    ("task", "record", "complaint"),
    [
        ("svamp", {"Body": "b", "Answer": 1}, "expected the fields 'Body', 'Question', 'Answer'; or 'question_concat'"),
        ("svamp", {**SVAMP, "Answer": True}, "'Answer' must be a number, got True"),
        ("svamp", {**SVAMP, "Answer": float("nan")}, "'Answer' must be a number, got nan"),
        ("svamp", {**SVAMP, "Body": 3}, "'Body' must be a text that is not blank, got 3"),
        ("multiarith", {"sQuestion": "q", "lSolutions": [1, 2]}, r"'lSolutions' must be a number, got \[1, 2\]"),
        ("gsm_hard", {"input": "q", "target": "many"}, "'target' must be a number, got 'many'"),
        ("strategyqa", {"question": "q"}, "field 'answer' is missing"),
        ("strategyqa", {"question": "q", "answer": 1}, "'answer' must be true, false, 'yes' or 'no', got 1"),
        (
            "commonsenseqa",
            {"question": "q", "choices": BOTH, "answerKey": ""},
            "'answerKey' must be one of A, B, got ''",
        ),
        (
            "commonsenseqa",
            {"question": "q", "choices": {"label": ["A"], "text": []}, "answerKey": "A"},
            "'choices' must",
        ),
        (
            "commonsenseqa",
            {"question": "q", "choices": [3], "answerKey": "A"},
            r"'choices'\[0\]: expected an object, got 3",
        ),
        ("commonsenseqa", {"question": {"choices": CHOICES}, "answerKey": "A"}, "field 'stem' is missing"),
        ("commonsenseqa", {"question": "q", "answer": "yes"}, "'answer' must be one of A, B, .*, got 'yes'"),
    ],
)
def test_a_malformed_record_is_named(tmp_path: Path, task: str, record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CoconutError, match=rf"a\.json: record 0 \(line 1\): .*{complaint}"):
        read(tmp_path, task, record)


@pytest.mark.parametrize(
    ("task", "answer", "right", "wrong"),
    [
        (
            "svamp",
            "6",
            (
                "### 6",
                "6.0",
                "8-2=6",
                "The answer is: 6 pens of 8",
                "Answer: 6, since 3 + 3 = 6, not 8",
                "6 or 7\n### 6.00\n",
            ),
            ("### 8", "", "-6"),
        ),
        ("gsm_hard", "-1200.5", ("### -1,200.50", "so it is $-1200.5", "-1.2005e3"), ("1200.5", "16-1200.5", "###")),
        ("strategyqa", "yes", ("### Yes", "No, wait: yes", "The answer is true, not false."), ("### no", "yesterday")),
        (
            "commonsenseqa",
            "B",
            ("### B", "(B)", "A dog is B.", "The answer is B: not A", "B. I am sure."),
            ("### A", "Bob", "b"),
        ),
    ],
)
def test_what_is_right(task: str, answer: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    example = Example(question="?", steps=(), answer=answer)
    check, find = get_task(task).check, get_task(task).extract_answer
    assert [check(text, example) for text in right] == [True] * len(right)
    assert [check(text, example) for text in wrong] == [False] * len(wrong)
    # What was found is found again in itself.
    assert all(find(find(text)) == find(text) for text in (*right, *wrong))


def test_a_number_of_hundreds_of_digits_is_read(tmp_path: Path) -> None:
    record = {"Body": "How many?", "Question": "So?", "Answer": 10**400}
    [example] = read(tmp_path, "svamp", record)
    assert example.answer == str(10**400)


@pytest.mark.parametrize(
    "text", ["9" * 6000, "0." + "0" * 6000 + "1", "1e999999999999999999999", "-" * 1000, "1" + ",1" * 3000]
)
def test_no_text_is_too_long_a_number(text: str) -> None:
    task = get_task("svamp")
    assert task.check(f"### {text}", Example(question="?", steps=(), answer="6")) is False
