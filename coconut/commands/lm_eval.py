"""``coconut lm-eval``: tasks of EleutherAI's lm-evaluation-harness, answered by a run or a published model."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from coconut.commands.harness import CoconutLM
from coconut.errors import CoconutError
from coconut.provenance import provenance
from coconut.storage import write_atomically
from coconut.storage_path import StoragePath


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """What to ask.

    Attributes:
      tasks: names of tasks, groups or tags, or files of tasks (``my_task.yaml``).
      include: a folder of further tasks; None for none.
      num_fewshot: examples before each question; None for as many as the task says.
      limit: the first so many questions of each task; None for all.
      settings: what replaces or joins the tasks' ``generation_kwargs``, such as ``max_gen_toks``.
      seed: of the examples that stand before questions, and of what metrics draw.
      samples_file: where to write every request and its answer as JSON lines; None for nowhere.

    Raises:
      CoconutError: a number is out of range.
    """

    tasks: Sequence[str]
    include: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    samples_file: StoragePath | str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise CoconutError(f"--limit {self.limit}: must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise CoconutError(f"--num_fewshot {self.num_fewshot}: must be at least 0")


def load_tasks(config: HarnessConfig) -> tuple[TaskManager, list[Any]]:
    """The tasks with their data, before a model is loaded for nothing.

    Raises:
      CoconutError: one is not known, or the library cannot load it.
    """
    if config.include is not None and not config.include.is_dir():
        raise CoconutError(f"--include_path {config.include}: no such folder")
    manager = TaskManager(include_path=config.include)
    for name in config.tasks:
        if name not in manager.task_index and not Path(name).is_file():
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3)) or "none is like it"
            raise CoconutError(f"--tasks {name}: no such task, and no file of one; did you mean: {near}")
    try:
        loaded = manager.load(list(config.tasks))
    except Exception as error:  # Whatever their loaders of data and of YAML raise.
        message = " ".join(str(error).split())
        raise CoconutError(f"--tasks {','.join(config.tasks)}: {type(error).__name__}: {message:.400}") from error
    groups = list(loaded.get("groups", {}).values())
    within = {task.task_name for group in groups for task in group.get_all_tasks()}
    return manager, [*groups, *(task for name, task in loaded["tasks"].items() if name not in within)]


def run_tasks(model: CoconutLM, config: HarnessConfig, tasks: tuple[TaskManager, list[Any]]) -> dict[str, Any]:
    """Asks a model.

    Returns:
      What the library returns, as plain values, without the samples; ``provenance``; and ``truncated``, the number of
      contexts whose beginning was left out.

    Raises:
      CoconutError: a request does not fit the model, or a task wants something that is not followed here.
    """
    manager, loaded = tasks
    results = simple_evaluate(
        model=model,
        tasks=loaded,
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        gen_kwargs=dict(config.settings) or None,
        log_samples=config.samples_file is not None,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    assert results is not None  # Of several ranks only the first has results; there is one.
    content = json.loads(json.dumps(dict(results), default=handle_non_serializable))
    samples = content.pop("samples", {})
    if config.samples_file is not None:
        lines = [{"task": name, **sample} for name, own in samples.items() for sample in own]
        write_atomically(config.samples_file, "".join(json.dumps(line) + "\n" for line in lines))
    return {**content, "truncated": model.truncated, "provenance": provenance()}


def describe(results: dict[str, Any]) -> str:
    """The library's own Markdown tables of a result."""
    # It looks for what its own evaluation leaves, and sorts it in place.
    copy = json.loads(json.dumps(results))
    tables = [make_table(copy)]
    if copy.get("groups"):
        tables.append(make_table(copy, "groups"))
    if results["truncated"]:
        tables.append(f"the beginning of {results['truncated']} contexts was left out: they were too long")
    return "\n\n".join(tables)
