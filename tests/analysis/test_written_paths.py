"""Outputs written by hand, sorted by hand."""

import dataclasses

import pytest

from coconut.analysis.written_paths import OUTPUT_CLASSES, OutputCounts, classify_output, count_outputs
from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer, AnswerConfig
from coconut.evaluation.subject import Subject
from coconut.tasks.prosqa import parse_graph
from coconut.tokenizers import SYMBOLS, TEXT, TextFormat
from coconut.types import Example, Graph
from tests.analysis.tiny_subject import asked_subject

# Alex -> lempus -> scrompus -> yumpus, also Alex -> rompus -> impus -> vumpus -> yumpus (longer) and rompus ->
# scrompus; Bob -> wumpus. yumpus or wumpus?
PROSQA = Example(
    question=(
        "Alex is a lempus. Every lempus is a scrompus. Every scrompus is a yumpus. Alex is a rompus. "
        "Every rompus is a impus. Every impus is a vumpus. Every vumpus is a yumpus. Every rompus is a scrompus. "
        "Bob is a wumpus. Every yimpus is a wumpus. Is Alex a yumpus or wumpus?"
    ),
    steps=(),
    answer="Alex is a yumpus.",
)
PROSQA = dataclasses.replace(PROSQA, graph=parse_graph(PROSQA))

SHORTEST = "Alex is a lempus.\nEvery lempus is a scrompus.\nEvery scrompus is a yumpus.\n### Alex is a yumpus."
LONGER = (
    "Alex is a rompus.\nEvery rompus is a impus.\nEvery impus is a vumpus.\nEvery vumpus is a yumpus.\n"
    "### Alex is a yumpus."
)


@pytest.mark.parametrize(
    ("text", "hidden_steps", "expected"),
    [
        (SHORTEST, 0, "correct_path"),
        (SHORTEST.replace("\n", " "), 0, "correct_path"),  # On one line, as the paper prints them.
        ("Alex is a rompus.\nEvery rompus is a scrompus.\nEvery scrompus is a yumpus.", 0, "correct_path"),  # The other
        (SHORTEST.replace("### Alex is a yumpus", "### Alex is a wumpus"), 0, "correct_path"),  # By its path alone.
        (LONGER, 0, "longer_path"),
        ("Alex is a lempus.\nEvery lempus is a scrompus.\n### Alex is a yumpus.", 0, "wrong_target"),  # Stops early.
        ("Alex is a rompus.\nEvery rompus is a impus.\n### Alex is a impus.", 0, "wrong_target"),
        ("Alex is a lempus.\nEvery lempus is a yumpus.\n### Alex is a yumpus.", 0, "hallucination"),  # No such edge.
        ("Alex is a lempus.\nEvery scrompus is a yumpus.\n### Alex is a yumpus.", 0, "hallucination"),  # Not joined.
        ("Alex is a zumpus.\n### Alex is a yumpus.", 0, "hallucination"),  # No such node.
        ("Bob is a wumpus.\n### Alex is a wumpus.", 0, "hallucination"),  # Another root.
        ("Every scrompus is a lempus.\n### Alex is a yumpus.", 0, "hallucination"),  # Backwards.
        # The rest of a path, behind thoughts.
        ("Every lempus is a scrompus.\nEvery scrompus is a yumpus.\n### Alex is a yumpus.", 1, "correct_path"),
        ("Every scrompus is a yumpus.\n### Alex is a yumpus.", 2, "correct_path"),
        ("Every impus is a vumpus.\nEvery vumpus is a yumpus.\n### Alex is a yumpus.", 2, "longer_path"),
        ("Every scrompus is a yumpus.", 1, "hallucination"),  # One thought is one step; scrompus is two away.
        ("Every scrompus is a yumpus.", None, "correct_path"),  # But some way there completes it.
        ("Every vumpus is a yumpus.", None, "longer_path"),
        ("Every yimpus is a wumpus.", None, "hallucination"),  # No way leads to a yimpus.
        (SHORTEST, 1, "hallucination"),  # Begins again at the root.
        (SHORTEST, None, "correct_path"),
        ("Every impus is a vumpus.\n### Alex is a wumpus.", 2, "wrong_target"),
        # No path.
        ("### Alex is a yumpus.", 3, "correct_label"),
        ("### Alex is a yumpus.", 0, "correct_label"),
        ("### Alex is a wumpus.", 6, "incorrect_label"),
        ("### Alex is a zumpus.", 6, "incorrect_label"),
        ("### Alex is a", 6, "other"),
        ("### Alex is a yumpus", 6, "other"),  # Breaks off: of "yumpus" there might be more.
        ("### ### Alex is a yumpus.", 6, "other"),
        ("###", 6, "other"),
        ("", 0, "other"),
        (" \n", 0, "other"),
        ("Alex is a lempus.\nEvery lempus is a", 0, "other"),  # Breaks off.
        ("Alex is a lempus.\nEvery lempus is a scrompus.\nEvery scrompus is a yumpus", 0, "other"),
        ("Alex is a lempus.\nTherefore Alex is clever.\n### Alex is a yumpus.", 0, "other"),
        ("Bob, Alex and lempus", 0, "other"),
    ],
)
def test_sentences(text, hidden_steps, expected):
    assert classify_output(PROSQA, text, TEXT, hidden_steps=hidden_steps) == expected


#   0 -> 1 -> 3 -> 9, 0 -> 2 -> 3, 0 -> 4 -> 5 -> 6 -> 9, 7 -> 8. Symbols are the ids plus ten.
SYMBOL_GRAPH = Graph(
    symbols=tuple(str(10 + node) for node in range(10)),
    edges=((0, 1), (1, 3), (3, 9), (0, 2), (2, 3), (0, 4), (4, 5), (5, 6), (6, 9), (7, 8)),
    root=0,
    target=9,
    negative=8,
)
SYMBOL_EXAMPLE = Example(question="", steps=(), answer="19", graph=SYMBOL_GRAPH)


@pytest.mark.parametrize(
    ("text", "hidden_steps", "expected"),
    [
        ("11 13 19 [A] 19", 0, "correct_path"),
        ("12 13 19", 0, "correct_path"),
        ("11 13 19 [A] 18", 0, "correct_path"),
        ("14 15 16 19 [A] 19", 0, "longer_path"),
        ("11 13 [A] 19", 0, "wrong_target"),
        ("11 19 [A] 19", 0, "hallucination"),
        ("10 11 13 19 [A] 19", 0, "hallucination"),  # The root is no step: no edge leads to it.
        ("10 11 13 19 [A] 19", None, "hallucination"),
        ("18 [A] 18", 0, "hallucination"),
        ("99 19 [A] 19", 0, "hallucination"),
        ("13 19 [A] 19", 1, "correct_path"),
        ("19 [A] 19", 2, "correct_path"),
        ("19 [A] 19", 3, "longer_path"),  # Three thoughts on the longer way.
        ("19 [A] 19", 1, "hallucination"),
        ("19 [A] 19", None, "correct_path"),
        ("15 16 19 [A] 19", 1, "longer_path"),
        ("15 16 19 [A] 19", None, "longer_path"),
        ("15 [A] 19", 1, "wrong_target"),
        ("[A] 19", 3, "correct_label"),
        ("[A] 18", 3, "incorrect_label"),
        ("[A] 18 19", 3, "other"),
        ("[A] [A]", 3, "other"),
        ("[A] |", 3, "other"),
        ("11 | 13 19", 0, "other"),
        ("", 0, "other"),
    ],
)
def test_symbols(text, hidden_steps, expected):
    assert classify_output(SYMBOL_EXAMPLE, text, SYMBOLS, hidden_steps=hidden_steps) == expected


def test_what_cannot_be_sorted():
    with pytest.raises(CoconutError, match="no graph to find paths in: 'Who"):
        classify_output(Example(question="Who?", steps=(), answer="I"), "I", TEXT)
    with pytest.raises(CoconutError, match="hidden_steps = -1"):
        classify_output(PROSQA, "", TEXT, hidden_steps=-1)
    with pytest.raises(CoconutError, match="answer_prefix = ' '"):
        classify_output(PROSQA, "", TextFormat(answer_prefix=" "))


def counts_of(outputs, monkeypatch, subject, c_thought=1, **options):
    """Counts of a model that writes ``outputs[thoughts][question]``."""

    blank = {"new_tokens": 0, "thoughts": 0, "ended": True, "cut": False, "turns": (), "soft_text": "", "passes": 0}

    def answer_questions(*arguments):
        for index, text in enumerate(outputs[arguments[-1].thoughts]):
            yield Answer(example=index, text=text, thought_inputs=None, **blank)

    monkeypatch.setattr("coconut.analysis.written_paths.answer_questions", answer_questions)
    asked = asked_subject(subject.model, subject.tokenizer, SYMBOLS, curriculum=CurriculumConfig(c_thought=c_thought))
    monkeypatch.setattr(Subject, "tokenize", lambda self, example: None)
    return count_outputs(asked, [SYMBOL_EXAMPLE] * len(outputs[0]), tuple(outputs), AnswerConfig(), **options)


def test_counts_hold_every_output_once(monkeypatch, subject):
    outputs = {
        0: ["11 13 19 [A] 19", "11 13 19 [A] 18", "11 19 [A] 19", "[A] 18"],
        2: ["19 [A] 19", "[A] 19", "", "13 19 [A] 19"],
    }
    seen = []
    found = counts_of(outputs, monkeypatch, subject, record=lambda *arguments: seen.append(arguments))
    none = dict.fromkeys(OUTPUT_CLASSES, 0)
    assert found[0].counts == {**none, "correct_path": 2, "hallucination": 1, "incorrect_label": 1}
    assert found[0].right == {**none, "correct_path": 1, "hallucination": 1}
    assert found[2].counts == {**none, "correct_path": 1, "correct_label": 1, "other": 1, "hallucination": 1}
    assert [counts.number for counts in found.values()] == [4, 4]
    assert (found[0].share("correct_path"), found[0].interval("longer_path")[0]) == (0.5, 0)
    assert seen[1] == (0, 1, "11 13 19 [A] 18", "correct_path") and len(seen) == 8
    entry = found[0].to_json()["classes"]["correct_path"]
    # Wilson's interval of 2 of 4.
    assert entry["interval_95"] == pytest.approx([0.15004, 0.84996], abs=1e-5) and entry["right_answers"] == 1
    # Where two thoughts stand for one step, two of them lead to a child of the root; or to wherever completes a path.
    assert counts_of(outputs, monkeypatch, subject, c_thought=2)[2].counts["correct_path"] == 1
    assert counts_of(outputs, monkeypatch, subject, exact=False)[2].counts["correct_path"] == 2


def test_counts_refuse(monkeypatch, subject):
    with pytest.raises(CoconutError, match="no questions"):
        counts_of({0: []}, monkeypatch, subject)
    asked = asked_subject(subject.model, subject.tokenizer, SYMBOLS)
    with pytest.raises(CoconutError, match="question 1 has no graph"):
        bare = dataclasses.replace(SYMBOL_EXAMPLE, graph=None)
        count_outputs(asked, [SYMBOL_EXAMPLE, bare], (0,), AnswerConfig())
    with pytest.raises(CoconutError, match=r"forced = '\[A\]'"):
        count_outputs(asked, [SYMBOL_EXAMPLE], (0,), AnswerConfig(forced="[A]"))
    assert OutputCounts(counts={**dict.fromkeys(OUTPUT_CLASSES, 0), "other": 3}, right={}).number == 3
