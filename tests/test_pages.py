"""Pages: what every method writes of an example, and what is given of it to a model that answers."""

import dataclasses

import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.methods import METHODS, get_method
from coconut.pages import (
    Page,
    Text,
    Thoughts,
    count_thoughts,
    given,
    index_behind,
    question_alone,
    take_steps,
    with_thoughts,
)
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.types import Think
from tests.tiny_pages import placing_at

TOKENIZER = symbol_tokenizer([str(number) for number in range(60)])
NAMES = {TOKENIZER.start_latent_id: "<", TOKENIZER.end_latent_id: ">"}
CURRICULUM = CurriculumConfig(max_latent_stage=2, c_thought=2)


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def example_of(*steps: int | Think) -> TokenizedExample:
    """Question 1 2, the steps (a number is a step of one token), answer 9."""
    parts = tuple(step if isinstance(step, Think) else ids(step) for step in steps)
    return TokenizedExample(question=ids(1, 2), steps=parts, answer=ids(9))


def shown(page: Page) -> str:
    """A page as text: tokens as numbers, markers as ``<`` and ``>``, thoughts as ``*2*``; scored as ``piece:token``."""
    words = []
    for part in page:
        if isinstance(part, Thoughts):
            words.append(f"*{part.count}*")
            continue
        tokens = [NAMES.get(token, str(token)) for token in part.ids.tolist()]
        words += [f"{part.piece}:{token}" for token in tokens] if part.scored else tokens
        assert part.answer == (part.scored and part.ids.tolist() == [9])
    return " ".join(words)


def written(name: str, stage: int, *steps: int | Think, curriculum: CurriculumConfig = CURRICULUM) -> str:
    placing = placing_at(TOKENIZER, curriculum, stage, options=METHODS[name].options())
    return shown(METHODS[name].pages["main"](example_of(*steps), placing))


COCONUT_PAGES = (
    "1 2 < *0* > 0:11 1:12 2:13 3:14 4:9",
    "1 2 < *2* > 0:12 1:13 2:14 3:9",
    "1 2 < *4* > 0:13 1:14 2:9",
    "1 2 < *4* > 0:9",
)
PAGES = {
    "coconut": COCONUT_PAGES,
    "coconut_without_curriculum": COCONUT_PAGES[-1:] * 4,
    "pause": COCONUT_PAGES[-1:] * 4,
    "pause_as_thought": COCONUT_PAGES,
    "cot": ("1 2 0:11 1:12 2:13 3:14 4:9",) * 4,
    "no_cot": ("1 2 0:9",) * 4,
    "coconut_without_thought": (
        "1 2 0:11 1:12 2:13 3:14 4:9",
        "1 2 0:12 1:13 2:14 3:9",
        "1 2 0:13 1:14 2:9",
        "1 2 0:9",
    ),
    "marked_cot": (
        "1 2 < > 0:11 1:12 2:13 3:14 4:9",
        "1 2 < 0:11 > 1:12 2:13 3:14 4:9",
        "1 2 < 0:11 1:12 > 2:13 3:14 4:9",
        "1 2 < 0:11 1:12 2:13 3:14 > 4:9",
    ),
    "interleaved": (
        "1 2 0:11 1:12 2:13 3:14 4:9",
        "1 2 < *2* > 0:12 1:13 2:14 3:9",
        "1 2 < *2* > 0:12 1:< *2* > 2:14 3:9",
        "1 2 < *2* > 0:12 1:< *2* > 2:14 3:9",
    ),
    "random_thoughts": COCONUT_PAGES,
    "simcot": COCONUT_PAGES,
    **dict.fromkeys(("codi", "simcot_codi", "pccot", "kava", "ponder", "ponder_codi"), COCONUT_PAGES[-1:] * 4),
    "colar": ("1 2 < 0:11 0:12 0:13 0:14 1:> 2:9",) * 4,
    "coconut_frontier": ("1 2 < *0* > 0:11", "1 2 < *2* > 0:12", "1 2 < *4* > 0:13", "1 2 < *4* > 0:9"),
    # Eight tokens a stage, from stage 1 on.
    "icot": ("1 2 0:11 1:12 2:13 3:14 4:9", "1 2 0:11 1:12 2:13 3:14 4:9", "1 2 0:9", "1 2 0:9"),
}


def test_every_method_has_its_pages_here():
    assert set(PAGES) == set(METHODS)
    with pytest.raises(CoconutError, match=r"'cocnut'.*did you mean 'coconut'"):
        get_method("cocnut")
    assert {name for name, method in METHODS.items() if not method.feeds_back(method.options())} == {
        "pause",
        "pause_as_thought",
    }


@pytest.mark.parametrize("name", PAGES)
def test_the_page_of_every_stage(name: str):
    assert tuple(written(name, stage, 11, 12, 13, 14) for stage in range(4)) == PAGES[name]


def test_thoughts_know_the_steps_they_stand_for():
    placing, example = placing_at(TOKENIZER, CURRICULUM, 2), example_of(11, 12, 13, 14)
    for name, expected in (("coconut", [[[11], [12]]]), ("interleaved", [[[11]], [[13]]])):
        page = METHODS[name].pages["main"](example, placing)
        blocks = [[step.tolist() for step in part.stands_for] for part in page if isinstance(part, Thoughts)]
        assert blocks == expected


@pytest.mark.parametrize(
    "name,stage,page",
    [
        # Behind written text the model has to begin to think by itself; before it, thoughts are given.
        ("cot", 0, "1 2 < *3* > 0:11 1:< *1* > 2:12 3:9"),
        ("no_cot", 0, "1 2 < *3* > < *1* > 0:9"),
        ("coconut", 0, "1 2 < *0* > < *3* > 0:11 1:< *1* > 2:12 3:9"),
        # A curriculum counts and replaces written steps alone.
        ("coconut", 1, "1 2 < *2* > < *3* > < *1* > 0:12 1:9"),
        ("coconut", 3, "1 2 < *4* > < *3* > < *1* > 0:9"),
        ("pause", 0, "1 2 < *4* > < *3* > < *1* > 0:9"),
        ("coconut_without_thought", 1, "1 2 < *3* > < *1* > 0:12 1:9"),
        ("marked_cot", 1, "1 2 < < *3* > 0:11 > 1:< *1* > 2:12 3:9"),
        ("interleaved", 1, "1 2 < *3* > < *2* > < *1* > 0:12 1:9"),
    ],
)
def test_blocks_of_the_data_stay_where_they_are(name: str, stage: int, page: str):
    assert written(name, stage, Think(3), 11, Think(1), 12) == page


THOUGHT_BY_THOUGHT = CurriculumConfig(max_latent_stage=2, c_thought=3, stage_adds="thought")


@pytest.mark.parametrize(
    "name,pages",
    [
        (
            "coconut",
            (
                "1 2 < *0* > 0:11 0:12 0:13 0:14 1:21 1:22 2:31 3:9",
                "1 2 < *1* > 0:12 0:13 0:14 1:21 1:22 2:31 3:9",
                "1 2 < *2* > 0:13 0:14 1:21 1:22 2:31 3:9",
                "1 2 < *3* > 0:21 0:22 1:31 2:9",
                "1 2 < *4* > 0:21 0:22 1:31 2:9",
                "1 2 < *5* > 0:22 1:31 2:9",
                "1 2 < *6* > 0:31 1:9",
                "1 2 < *6* > 0:9",
            ),
        ),
        (
            "coconut_without_thought",
            ("1 2 0:11 0:12 0:13 0:14 1:21 1:22 2:31 3:9", "1 2 0:12 0:13 0:14 1:21 1:22 2:31 3:9"),
        ),
        (
            "marked_cot",
            ("1 2 < > 0:11 0:12 0:13 0:14 1:21 1:22 2:31 3:9", "1 2 < 0:11 > 1:12 1:13 1:14 2:21 2:22 3:31 4:9"),
        ),
        ("coconut_without_curriculum", ("1 2 < *6* > 0:9",)),
    ],
)
def test_a_stage_that_adds_a_thought_takes_its_share_of_the_steps_tokens(name: str, pages: tuple[str, ...]):
    steps = (ids(11, 12, 13, 14), ids(21, 22), ids(31))
    example = TokenizedExample(question=ids(1, 2), steps=steps, answer=ids(9))
    for stage, page in enumerate(pages):
        assert shown(METHODS[name].pages["main"](example, placing_at(TOKENIZER, THOUGHT_BY_THOUGHT, stage))) == page


def test_a_block_of_thoughts_in_the_data_is_no_part_of_the_step_that_is_shared():
    two = dataclasses.replace(THOUGHT_BY_THOUGHT, c_thought=2)
    example = TokenizedExample(question=ids(1), steps=(Think(3), ids(11, 12), Think(1)), answer=ids(9))
    page = METHODS["coconut"].pages["main"](example, placing_at(TOKENIZER, two, 1))
    assert shown(page) == "1 < *1* > < *3* > 0:12 1:< *1* > 2:9"
    with pytest.raises(CoconutError, match="stage_adds = 'thought': method = 'interleaved' replaces whole steps alone"):
        METHODS["interleaved"].pages["main"](example, placing_at(TOKENIZER, two, 0))


def test_interleaved_replaces_odd_steps_one_a_stage():
    longer = dataclasses.replace(CURRICULUM, max_latent_stage=4, c_thought=1)
    pages = [written("interleaved", stage, 11, 12, 13, 14, 15, curriculum=longer) for stage in range(6)]
    assert pages == [
        "1 2 0:11 1:12 2:13 3:14 4:15 5:9",
        "1 2 < *1* > 0:12 1:13 2:14 3:15 4:9",
        "1 2 < *1* > 0:12 1:< *1* > 2:14 3:15 4:9",
        *["1 2 < *1* > 0:12 1:< *1* > 2:14 3:< *1* > 4:9"] * 3,
    ]


@pytest.mark.parametrize(
    "name,page",
    [
        ("coconut", "1 2 < *2* >"),
        ("pause_as_thought", "1 2 < *2* >"),
        ("cot", "1 2"),
        ("marked_cot", "1 2 < >"),
        ("interleaved", "1 2 < *2* >"),
    ],
)
def test_what_is_given_to_be_answered(name: str, page: str):
    placing = placing_at(TOKENIZER, CURRICULUM, 1)
    front = given(METHODS[name].write_to_answer(example_of(11, 12, 13), placing))
    assert shown(front) == page
    assert count_thoughts(front) == (2 if "*" in page else 0)
    # It does not depend on steps that nobody knows, nor on the answer, but where there may be fewer than are replaced.
    alone = question_alone(ids(1, 2), CURRICULUM)
    assert shown(given(METHODS[name].write_to_answer(alone, placing))) == page


def test_the_number_of_thoughts_of_an_unknown_question_is_that_of_a_long_one():
    unpadded, write = dataclasses.replace(CURRICULUM, pad_latent_to_max=False), METHODS["coconut"].write_to_answer
    last = placing_at(TOKENIZER, unpadded, unpadded.final_stage)
    thoughts = [count_thoughts(given(write(example_of(*range(11, 11 + steps)), last))) for steps in range(5)]
    assert thoughts == [0, 2, 4, 4, 4]
    assert count_thoughts(given(write(question_alone(ids(1, 2), unpadded), last))) == 4


def test_thoughts_can_be_chosen_where_there_is_a_place_for_them():
    page = given(METHODS["coconut"].pages["main"](example_of(Think(1), 11), placing_at(TOKENIZER, CURRICULUM, 1)))
    assert shown(page) == "1 2 < *2* > < *1* >"
    assert shown(with_thoughts(page, 3)) == "1 2 < *3* > < *3* >"
    assert shown(with_thoughts(page, 0)) == "1 2 < *0* > < *0* >"
    bare = (Text(ids(1)),)
    assert with_thoughts(bare, 0) == bare
    with pytest.raises(CoconutError, match="2 thoughts: the method writes this question without a block of thoughts"):
        with_thoughts(bare, 2)


def test_steps_are_taken_and_blocks_between_them_left():
    one, first, two, second, three = steps = example_of(Think(1), 11, Think(2), 12, Think(3)).steps
    assert [index_behind(steps, count) for count in range(3)] == [0, 2, 4]
    assert take_steps(steps, 0) == ((), steps)
    assert take_steps(steps, 1) == ((first,), (one, two, second, three))
    assert take_steps(steps, 2) == ((first, second), (one, two, three))
    assert take_steps((first, second), 1) == ((first,), (second,))
