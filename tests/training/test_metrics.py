"""What the terminal shows of a run."""

import io

import pytest
from rich.console import Console

from coconut.training.metrics import progress_bar


@pytest.mark.parametrize(("completed", "numbers"), [(30, "loss 0.123  accuracy 0.500  12,345 tokens/s"), (0, "")])
def test_the_time_left_stands_on_a_narrow_terminal(completed: int, numbers: str) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, color_system=None)
    bar = progress_bar(console)
    task = bar.add_task("coconut_without_curriculum stage 3", total=2500, numbers=numbers)
    bar.update(task, completed=completed)
    console.print(bar.get_renderable())
    [line] = output.getvalue().splitlines()
    assert "0:00:00 left -:--:-- " in line
    assert line.rstrip().endswith("compiling") != bool(numbers)
