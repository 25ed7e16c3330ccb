"""Multiplication: the form of the released file, to the letter, and every question once."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coconut.datasets import DataConfig, load_dataset, make_tokenizer
from coconut.errors import CoconutError
from coconut.tasks import content_hash, get_task, multiplication
from coconut.tasks.icot import write_line
from coconut.tasks.multiplication import load, read_digits, write_digits, write_example
from coconut.types import Example

TASK = get_task("multiplication")


def line_of(example: Example) -> str:
    return write_line(example.question, example.written_steps, example.answer)


def numbers(example: Example) -> tuple[int, int]:
    first, second = example.question.split(" * ")
    return read_digits(first), read_digits(second)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multiplication")


def test_a_product_by_hand():
    # 123 x 45: 615, 4920 and 5535 in all.
    assert write_example(3, 2, 123, 45) == Example(
        question="3 2 1 * 5 4", steps=("5 1 6 0", "+ 0 2 9 4 0"), answer="5 3 5 5 0"
    )
    # 10 x 203: 30, 0 (30 so far) and 2000.
    assert write_example(2, 3, 10, 203).steps == ("0 3 0", "+ 0 0 0 0 ( 0 3 0 0 )", "+ 0 0 0 2 0")
    assert write_example(1, 1, 3, 4) == Example(question="3 * 4", steps=("2 1",), answer="2 1")


@given(data=st.data(), first_digits=st.integers(1, 12), second_digits=st.integers(1, 12))
def test_every_part_of_every_product_is_right(folder, data, first_digits, second_digits):
    first = data.draw(st.integers(0, 10**first_digits - 1))
    second = data.draw(st.integers(0, 10**second_digits - 1))
    example = write_example(first_digits, second_digits, first, second)
    assert numbers(example) == (first, second)
    assert read_digits(example.answer) == first * second
    assert len(example.steps) == second_digits
    total = 0
    for index, step in enumerate(example.written_steps):
        parts = re.fullmatch(r"(\+ )?([\d ]+?)(?: \( ([\d ]+) \))?", step)
        assert parts and bool(parts[1]) == bool(index)
        assert bool(parts[3]) == (0 < index < second_digits - 1)
        total += read_digits(parts[2])
        for written in filter(None, parts.groups()[1:]):
            assert len(written.split()) == first_digits + 1 + index
        assert not parts[3] or read_digits(parts[3]) == total
    assert total == first * second
    (folder / "one.txt").write_text(line_of(example) + "\n")
    assert load(folder / "one.txt") == [example]


@given(number=st.integers(0, 10**30), extra=st.integers(0, 5))
def test_digits_round_trip(number, extra):
    width = len(str(number)) + extra
    assert read_digits(write_digits(number, width)) == number
    assert len(write_digits(number, width).split()) == width


def test_the_released_file_is_ours_line_by_line(shared_data):
    path = shared_data / "icot_4x4_mult_valid.txt"
    examples = load(path)
    assert "".join(line_of(example) + "\n" for example in examples) == path.read_text()
    assert len(examples) == 1000 == len(set(map(content_hash, examples)))
    assert all(1000 <= number <= 9999 for example in examples for number in numbers(example))


def test_generated_cannot_be_told_from_released(shared_data):
    released = load(shared_data / "icot_4x4_mult_valid.txt")
    ours = multiplication.generate(5000, seed=0)
    assert {len(example.steps) for example in (*ours, *released)} == {4}
    for part in ("question", "answer"):
        # Every place of a number on its own.
        for place in range(len(getattr(ours[0], part).split())):
            counts = [Counter(getattr(e, part).split()[place] for e in examples) for examples in (ours, released)]
            values = sorted(set().union(*counts))
            if values == ["*"]:
                continue
            table = [[count[value] for value in values] for count in counts]
            assert stats.chi2_contingency(table).pvalue > 0.001, (part, place)  # pyright: ignore
    products = [[first * second for first, second in map(numbers, examples)] for examples in (ours, released)]
    assert stats.ks_2samp(*products).pvalue > 0.01  # pyright: ignore


@pytest.mark.parametrize(("digits", "existing"), [((1, 1), 81), ((2, 1), 810), ((1, 2), 810), ((2, 2), 8100)])
def test_all_questions_there_are_and_no_more(digits, existing):
    examples = multiplication.generate(existing, seed=3, digits=digits)
    assert {numbers(example) for example in examples} == {
        (first, second)
        for first in range(10 ** (digits[0] - 1), 10 ** digits[0])
        for second in range(10 ** (digits[1] - 1), 10 ** digits[1])
    }
    with pytest.raises(CoconutError, match=f"{existing:,} distinct questions .* fewer than the {existing + 1:,} asked"):
        multiplication.generate(existing + 1, seed=3, digits=digits)
    with pytest.raises(CoconutError, match="from record 80 on"):
        multiplication.generate(existing, seed=3, digits=digits, start=80)
    with pytest.raises(CoconutError, match=rf"only {existing - 5:,} are left"):
        multiplication.generate(existing, seed=3, digits=digits, exclude=frozenset(map(content_hash, examples[:5])))


@pytest.mark.parametrize("digits", [(1, 2), (4, 4)])  # dealt, and drawn
def test_records_depend_on_seed_and_index_only(digits):
    whole = multiplication.generate(30, seed=9, digits=digits)
    assert whole[:10] == multiplication.generate(10, seed=9, digits=digits)
    assert whole[10:] == multiplication.generate(20, seed=9, digits=digits, start=10)
    assert whole != multiplication.generate(30, seed=10, digits=digits)
    excluded = content_hash(whole[0])
    again = multiplication.generate(30, seed=9, digits=digits, exclude={excluded})
    assert excluded not in map(content_hash, again)


@pytest.mark.parametrize("digits", [(0, 4), (4,), (4, 4, 4), (4, 101), (True, 4)])
def test_impossible_digits_are_named(digits):
    with pytest.raises(CoconutError, match=re.escape(f"digits = {digits}: must be two counts in 1..100")):
        TASK.generate(1, seed=0, digits=digits)


@pytest.mark.parametrize("digits", [4, "44", (4.0, 4), None])
def test_digits_of_another_type_are_named(digits):
    with pytest.raises(CoconutError, match=re.escape(f"digits = {digits!r}: must be two counts")):
        multiplication._checked(
            digits
        )  # The runtime type checks of the tests let none of these through the front door.


def test_negative_counts_are_named():
    with pytest.raises(CoconutError, match="count=-1"):
        TASK.generate(-1, seed=0)


def test_splits_never_overlap():
    config = DataConfig(task="multiplication", train=600, validation=100, test=110, options={"digits": [1, 2]})
    splits = load_dataset(config).splits
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 600, "validation": 100, "test": 110}
    assert len({content_hash(example) for examples in splits.values() for example in examples}) == 810
    with pytest.raises(CoconutError, match="only 600 are left, fewer than the 601"):
        load_dataset(DataConfig(task="multiplication", train=601, validation=100, test=110, options={"digits": [1, 2]}))


def test_every_digit_is_one_token_and_lengths_are_as_the_gin_file_says():
    examples = multiplication.generate(200, seed=0)
    config = DataConfig(task="multiplication", train=200)
    tokenizer = make_tokenizer(config, examples)
    for example in examples[:20]:
        for text in (example.question, *example.written_steps, example.answer):
            assert len(tokenizer.encode(text)) == len(text.split())
    written = "".join(f"{step}\n" for step in examples[0].written_steps) + f"### {examples[0].answer}"
    assert len(tokenizer.encode(written)) == 50 + 9


GOOD = "2 1 * 4 3||8 4 0 + 0 6 3 0 #### 8 0 4 0"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (GOOD.replace("||", "|"), "expected one '||', got 0"),
        (GOOD.replace("####", "###"), "expected one '####', got 0"),
        (GOOD + " #### 1", "expected one '####', got 2"),
        ("2 1 #### 4 3||8", "'####' stands before '||'"),
        (GOOD.partition("||")[1] + GOOD.partition("||")[2], "the question is blank"),
        (GOOD.partition(" 8 0")[0], "the answer is blank"),
        (GOOD.replace("*", "+", 1), "digit by digit, such as '2 1 * 4 3', got '2 1 + 4 3'"),
        (GOOD.replace("2 1", "21", 1), "got '21 * 4 3'"),
        (" ".join("1" * 101) + " * 1||1 #### 1", "digit by digit"),
        (GOOD.replace("6 3", "6 4"), "the steps of '2 1 * 4 3' must be '8 4 0 + 0 6 3 0', got '8 4 0 + 0 6 4 0'"),
        (GOOD.replace("8 0 4 0", "8 0 4"), "the answer of '2 1 * 4 3' must be '8 0 4 0', got '8 0 4'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "bad.txt"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(CoconutError, match=re.escape(f"{path}: record 1 (line 3): ") + ".*" + re.escape(complaint)):
        load(path)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(CoconutError, match=r"empty\.txt: holds no records"):
        load(tmp_path / "empty.txt")


@given(text=st.text(alphabet="0123456789*|#+() \n[]", max_size=60))
def test_no_text_ends_in_another_error(folder, text):
    (folder / "any.txt").write_text(text)
    try:
        load(folder / "any.txt")
    except CoconutError as error:
        assert "any.txt" in str(error)
