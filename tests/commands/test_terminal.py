"""What is printed on a terminal of 80 columns: all of it, in lines that fit."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from coconut.commands.evaluate import markdown_table
from coconut.commands.terminal import print_markdown, print_table

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
# What `coconut table`, `evaluate` and the others wrote into files, as they print it.
WRITTEN = sorted(path for path in RESULTS.rglob("*.md") if "\n| " in path.read_text() and path.name != "README.md")


def printed(text: str, width: int = 80) -> str:
    file = io.StringIO()
    print_markdown(text, Console(file=file, width=width, force_terminal=True, color_system=None))
    return file.getvalue()


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_results_fit_with_every_word_whole(path: Path) -> None:
    text = path.read_text()
    shown = printed(text)
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    words = {word for line in text.splitlines() for word in line.split() if set(word) - set("|-")}
    assert {word for word in words if len(word) <= 40} <= set(shown.split())


def test_a_table_that_is_too_wide_stands_in_parts() -> None:
    header = ("method", *(f"column_number_{index}" for index in range(9)))
    lines = printed(markdown_table(header, [["cot", *map(str, range(9))], ["a | b", *map(str, range(9))]])).splitlines()
    heads = [line.split() for line in lines if line.startswith("method")]
    assert [head[0] for head in heads] == ["method"] * 3 and [name for head in heads for name in head[1:]] == list(
        header[1:]
    )
    assert [line.split()[1:] for line in lines if line.startswith("cot")] == [[*"0123"], [*"4567"], [*"8"]]


def test_long_names_are_broken_where_they_may_be_and_into_a_file_not_at_all() -> None:
    name, row = "a_name_without_any_blank" * 4, ["running", "1"]
    for terminal, lines in ((True, 3), (False, 2)):
        file = io.StringIO()
        console = Console(file=file, width=80, force_terminal=terminal, color_system=None)
        print_table(("run", "state", "seed"), [[name, *row]], console, breakable=("run",))
        shown = file.getvalue().splitlines()
        assert len(shown) == lines and "".join(line.split()[0] for line in shown[1:]) == name
    assert printed("one\ntwo | three") == "one\ntwo | three\n"
