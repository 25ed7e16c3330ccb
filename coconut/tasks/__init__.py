"""Tasks: generate questions, load them, check an answer. One contract (`Task`), one file a task.

>>> from coconut.tasks import get_task
>>> task = get_task("small_graphs")
>>> [example] = task.generate(1, seed=0, config="e12")
>>> task.check(" ".join(("###", example.answer)), example)
True
"""

from coconut.errors import CoconutError
from coconut.tasks import (
    evaluation_sets,
    gsm8k,
    multiplication,
    prontoqa,
    prontoqa_shortcuts,
    prosqa,
    shortcuts,
    small_graphs,
)
from coconut.tasks.answer_rules import (
    find_letter,
    find_number,
    find_yes_or_no,
    normalize_number,
    normalize_yes_or_no,
)
from coconut.tasks.hashing import assert_disjoint, content_hash, without_overlap
from coconut.tasks.records import BadRecords, load_examples, save_examples
from coconut.tasks.task import Task, extract_answer, unknown

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="prosqa",
            generator=prosqa.generate,
            statistics=shortcuts.statistics,
            shortcuts=shortcuts.shortcut_accuracies,
        ),
        Task(
            name="small_graphs",
            generator=small_graphs.generate,
            statistics=shortcuts.statistics,
            shortcuts=shortcuts.shortcut_accuracies,
        ),
        Task(
            name="prontoqa",
            generator=prontoqa.generate,
            loader=prontoqa.load,
            statistics=prontoqa_shortcuts.statistics,
            shortcuts=prontoqa_shortcuts.shortcut_accuracies,
        ),
        Task(name="gsm8k", loader=gsm8k.load),
        Task(name="multiplication", generator=multiplication.generate, loader=multiplication.load),
        # Questions of your own, in the field's JSON.
        Task(name="text"),
        *(
            Task(name=name, loader=load, extract_answer=find_number, normalize_answer=normalize_number)
            for name, load in (
                ("svamp", evaluation_sets.load_svamp),
                ("multiarith", evaluation_sets.load_multiarith),
                ("gsm_hard", evaluation_sets.load_gsm_hard),
            )
        ),
        Task(
            name="strategyqa",
            loader=evaluation_sets.load_strategyqa,
            extract_answer=find_yes_or_no,
            normalize_answer=normalize_yes_or_no,
        ),
        Task(name="commonsenseqa", loader=evaluation_sets.load_commonsenseqa, extract_answer=find_letter),
    )
}
"""Every task, by name."""


def register_task(task: Task) -> None:
    """Adds a task: ``DataConfig.task = name`` chooses it.

    Raises:
      CoconutError: there is another one of that name.
    """
    if TASKS.get(task.name, task) is not task:
        raise CoconutError(f"a task named {task.name!r} is registered already")
    TASKS[task.name] = task


def get_task(name: str) -> Task:
    """Finds a task.

    Raises:
      CoconutError: naming the nearest known task, and all of them.
    """
    if name not in TASKS:
        raise CoconutError(unknown("task", name, TASKS))
    return TASKS[name]


__all__ = [
    "TASKS",
    "BadRecords",
    "Task",
    "assert_disjoint",
    "content_hash",
    "extract_answer",
    "get_task",
    "load_examples",
    "register_task",
    "save_examples",
    "without_overlap",
]
