"""``coconut data``: generate questions, look at them, and measure their shortcuts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coconut.tasks import get_task, load_examples, save_examples
from coconut.tasks.shortcuts import shortcut_accuracies, statistics
from coconut.types import CoconutError, Example
from experiments.evaluate import markdown_table


def generate_file(path: Path, task: str, count: int, seed: int, options: Mapping[str, Any]) -> list[Example]:
    """Generates questions into a file (``.json`` or ``.jsonl``), whole or not at all.

    Raises:
      CoconutError: the task has no generator or refuses its options.
    """
    examples = get_task(task).generate(count, seed, **options)
    if not examples:
        raise CoconutError(f"--count = {count}: there is nothing to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_examples(path, examples)
    return examples


def statistics_report(path: Path) -> str:
    """Markdown: the statistics of a file of graph questions, and the accuracy of each shortcut rule."""
    examples = load_examples(path)
    marginals = statistics(examples)
    rows = []
    for name, marginal in marginals.items():
        values = sorted(marginal.counts)
        shares = "  ".join(f"{value}: {marginal.share(value):.3f}" for value in values) if len(values) <= 8 else ""
        rows.append([name, f"{marginal.mean:.2f}", f"{marginal.standard_deviation:.2f}", shares])
    table = markdown_table(("statistic", "mean", "sd", "shares"), rows)
    rules = [
        [name, f"{100 * accuracy.value:.1f} +- {100 * accuracy.half_width:.1f}"]
        for name, accuracy in shortcut_accuracies(examples).items()
    ]
    shortcuts = markdown_table(("shortcut rule", "accuracy % (95 %)"), rules)
    return f"{len(examples):,} questions of {path}\n\n{table}\n\n{shortcuts}"


def show(path: Path, count: int) -> str:
    """The first questions of a file, as a person reads them."""
    blocks = []
    for number, example in enumerate(load_examples(path)[:count]):
        steps = "\n".join(f"  {step}" for step in example.steps)
        blocks.append(f"[{number}] {example.question}\n{steps}\n  -> {example.answer}")
    return "\n\n".join(blocks)
