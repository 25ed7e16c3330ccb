"""GSM8K: the released file by its figures, three formats, and one readable error for everything malformed."""

import json
import re
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.errors import CoconutError
from coconut.tasks import content_hash, get_task, load_examples, save_examples, without_overlap
from coconut.tasks.gsm8k import is_number, load
from coconut.tasks.icot import write_line
from coconut.types import Example

TASK = get_task("gsm8k")
RECORD = {
    "question": "Ann had 1,000 nuts and ate half. How many are left?",
    "answer": "She ate 1000/2 = <<1000 / 2=500>>500.\nShe has <<1000-500=500>>500 left.\n#### 1,500",
}
EXAMPLE = Example(question=RECORD["question"], steps=("<<1000/2=500>>", "<<1000-500=500>>"), answer="1500")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gsm8k")


@pytest.fixture(scope="module")
def released(shared_data):
    return load(shared_data / "gsm8k_train.jsonl")


def exact(expression: str) -> Fraction:
    """The value of an expression of numbers, ``+-*/`` and brackets."""
    assert re.fullmatch(r"[\d.+\-*/()]+", expression), expression
    fractions = re.sub(r"\d+\.?\d*|\.\d+", r"Fraction('\g<0>')", expression)
    return eval(fractions, {"Fraction": Fraction})


@pytest.mark.slow
def test_the_released_file_has_its_known_figures(released):
    assert len(released) == 7473 == len(set(map(content_hash, released)))
    steps = Counter(len(example.steps) for example in released)
    assert [steps[number] for number in range(11)] == [95, 404, 2175, 2137, 1424, 785, 287, 123, 40, 3, 0]
    assert sum(count for number, count in steps.items() if number) == 7378
    assert all(is_number(example.answer) and "," not in example.answer for example in released)
    results = [
        (example.answer, example.written_steps[-1].strip("<>").rpartition("=")[2])
        for example in released
        if example.steps
    ]
    assert sum(exact(answer) == exact(result) for answer, result in results) == 7001


@pytest.mark.slow
def test_every_released_step_evaluates(released):
    for example in released:
        for step in example.written_steps:
            found = re.fullmatch(r"<<([^=\s]+)=([^=\s]+)>>", step)
            assert found, step
            # Released results are rounded.
            assert abs(exact(found[1]) - exact(found[2])) <= max(Fraction(1, 100), abs(exact(found[2])) / 200), step


def test_the_released_lines_are_read_and_written(shared_data):
    for name, figures in (
        ("icot_gsm8k_valid.txt", [6, 26, 155, 140, 91, 53, 18, 8, 3]),
        ("icot_gsm8k_aug_train_3000.txt", [1, 503, 1122, 791, 373, 140, 46, 17, 5, 1, 1]),
    ):
        examples = load(shared_data / name)
        steps = Counter(len(example.steps) for example in examples)
        assert [steps[number] for number in range(len(figures))] == figures and len(examples) == sum(figures)
        lines = (shared_data / name).read_text().strip("\n").split("\n")
        for example, line in zip(examples, lines, strict=True):
            written = write_line(example.question, example.written_steps, example.answer)
            assert written.replace(" ", "") == line.replace(" ", "").rpartition("####")[0] + "####" + example.answer
            assert TASK.check(line.rpartition("||")[2], example)


def test_answers_that_are_no_numbers_are_told(shared_data):
    examples = load(shared_data / "icot_gsm8k_aug_train_3000.txt")
    assert [example.answer for example in examples if not is_number(example.answer)] == ["2/5"]


def test_known_overlaps_are_removed(released, shared_data):
    validation = load(shared_data / "icot_gsm8k_valid.txt")
    augmented = load(shared_data / "icot_gsm8k_aug_train_3000.txt")
    kept = without_overlap(released, validation)
    assert len(kept) == 7473 - 500 and len(without_overlap(kept, validation)) == len(kept)
    assert without_overlap(augmented, validation) == augmented
    assert len(without_overlap(augmented, validation, released)) == 3000 - 58


@pytest.mark.parametrize("text", ["72", "-3", "1,234,567", "0.5", ".45", "36.", "2.01e-06", "1E3"])
def test_numbers(text):
    assert is_number(text)


@pytest.mark.parametrize("text", ["", ".", "-", "2/5", "$3", "10%", "two", "e3", "1e", "3 4", "\u0663"])
def test_no_numbers(text):
    assert not is_number(text)


def test_numbers_compare_as_texts():
    assert TASK.check("<<1+1=2>>\n### 1,500", EXAMPLE) and TASK.check("#### 1500", EXAMPLE)
    for wrong in ("### 1500.0", "### 11500", "### 1500 nuts", "1500 #"):
        assert not TASK.check(wrong, EXAMPLE)


number = st.decimals(min_value=0, max_value=10**6, places=2).map(str)
step = st.builds("<<{}{}{}={}>>".format, number, st.sampled_from("+-*/"), number, number)
words = st.text(alphabet="ab 1,.?$%'", min_size=1).map(str.strip).filter(bool)
rows = st.lists(
    st.fixed_dictionaries({"question": words, "steps": st.lists(step, max_size=5).map(tuple), "answer": number}),
    min_size=1,
    max_size=4,
)


@given(rows=rows, between=words)
def test_what_is_written_is_read_in_every_format(folder, rows, between):
    examples = [Example(**row) for row in rows]
    (folder / "icot.txt").write_text("\n".join(write_line(**row) for row in rows))
    assert load(folder / "icot.txt") == examples
    save_examples(folder / "field.jsonl", examples)
    assert load(folder / "field.jsonl") == examples
    with (folder / "released.jsonl").open("w") as file:
        for row in rows:
            solution = "".join(f"{between} {step}\n" for step in row["steps"]) + f"#### {row['answer']}"
            file.write(json.dumps({"question": row["question"], "answer": solution}) + "\n")
    assert load(folder / "released.jsonl") == examples


def test_released_records_become_examples(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(RECORD) + "\n")
    assert load(tmp_path / "train.jsonl") == [EXAMPLE]
    save_examples(tmp_path / "train.json", [EXAMPLE])
    assert load(tmp_path / "train.json") == load_examples(tmp_path / "train.json") == [EXAMPLE]


EQUATIONS, SENTENCES = ("<<48/2=24>>", "<<48+24=72>>"), ("Half of 48 is 24.", "So she sold 3.5 times 2.", "It is 72.")


@pytest.mark.parametrize(
    ("cot", "steps"),
    [
        ("<<48/2=24>> <<48+24=72>>", EQUATIONS),
        (" <<48 / 2 = 24>><<48+24=72>>. ", EQUATIONS),
        (["<<48/2=24>>", "", " << 48+24 = 72 >>"], EQUATIONS),
        # Where CODI cuts, at a full stop and a blank; and at the ends of lines.
        ("Half of 48 is 24. So she sold 3.5 times 2. It is 72.", SENTENCES),
        ("Half of 48 is 24.\n\nSo she sold 3.5 times 2.  It is 72.\n", SENTENCES),
        (list(SENTENCES), SENTENCES),
        ("Half is 48/2=<<48/2=24>>24. Done", ("Half is 48/2=<<48/2=24>>24.", "Done")),
        ("<<48/2=24>>24 clips", ("<<48/2=24>>24 clips",)),
        ("", ()),
        ([], ()),
    ],
)
@pytest.mark.parametrize("answer", ["1072", "#### 1,072"])
def test_a_chain_of_thought_is_cut_into_steps(tmp_path, cot, steps, answer):
    record = {"question": "How many?", "cot": cot, "answer": answer}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert load(tmp_path / "a.json") == [Example(question="How many?", steps=steps, answer="1072")]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (3, "expected an object, got 3"),
        ({"question": "a"}, "field 'answer' is missing"),
        ({**RECORD, "question": " "}, "field 'question' must be a text that is not blank, got ' '"),
        ({**RECORD, "answer": 72}, "field 'answer' must be a text that is not blank, got 72"),
        ({**RECORD, "answer": "It is 72."}, "must end in '#### ' and a number, got 'It is 72.'"),
        ({**RECORD, "answer": "#### many"}, "must end in '#### ' and a number, got '#### many'"),
        ({**RECORD, "answer": "#### "}, "must end in '#### ' and a number"),
        ({**RECORD, "answer": "<<1+1=2 #### 2"}, "a step must be such as '<<48/2=24>>', got '<<1+1=2"),
        ({**RECORD, "answer": "<<1+1>>2 #### 2"}, "a step must be such as '<<48/2=24>>', got '<<1+1>>2"),
        ({**RECORD, "steps": "<<1+1=2>>"}, "field 'steps' must be a list of texts"),
        ({**RECORD, "cot": 3}, "field 'cot' must be a text or a list of texts, got 3"),
        ({**RECORD, "cot": ["a", None]}, "field 'cot'[1] must be a text, got None"),
        ({**RECORD, "cot": "<<1+1=2> <<2+2=4>>"}, "a step must be such as '<<48/2=24>>', got '<<1+1=2>"),
        ({**RECORD, "cot": "a", "answer": None}, "field 'answer' must be a text that is not blank, got None"),
        ({**RECORD, "cot": "a", "answer": "#### "}, "field 'answer' must be a text that is not blank, got ''"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, record, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(RECORD)}\n\n{json.dumps(record)}\n")
    with pytest.raises(CoconutError, match=re.escape(f"{path}: record 1 (line 3): ") + ".*" + re.escape(complaint)):
        load(path)


GOOD = "How many?||<<1+1=2>> <<2*3=6>> #### 6"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("How many? <<1+1=2>> #### 2", "expected one '||', got 0"),
        ("How many?||<<1+1=2>> 2", "expected one '####', got 0"),
        ("||<<1+1=2>> #### 2", "the question is blank"),
        ("How many?||<<1+1=2>> #### ", "the answer is blank"),
        ("How many?||<<1+1=2> #### 2", "a step must be such as '<<48/2=24>>', got '<<1+1=2>'"),
        ("How many?||<<1+1=2>> so 2 #### 2", "expected steps such as '<<48/2=24>>' and blanks, got 'so 2'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "bad.txt"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(CoconutError, match=re.escape(f"{path}: record 1 (line 3): ") + ".*" + re.escape(complaint)):
        load(path)


@given(text=st.text(alphabet='<>=|#1+ \n{}[]"', max_size=60), name=st.sampled_from(["a.txt", "a.json", "a.jsonl"]))
def test_no_text_ends_in_another_error(folder, text, name):
    (folder / name).write_text(text)
    try:
        load(folder / name)
    except CoconutError as error:
        assert name in str(error)
