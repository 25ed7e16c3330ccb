"""What a finished grid says: numbers of each method with how sure they are, as JSON, Markdown and CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from coconut.commands.evaluate import markdown_table
from coconut.commands.measuring import TRAINED
from coconut.commands.table.grid import ANSWERS, FAILURE, INTERVENTIONS, Cell, Grid, TableConfig
from coconut.errors import CoconutError
from coconut.evaluation.evaluate import wilson_interval
from coconut.evaluation.statistics import bootstrap_interval, mcnemar, standard_deviation
from coconut.provenance import provenance
from coconut.storage import read_text
from coconut.tasks.statistics import answer_shares
from coconut.training.config import to_json

NOTES = (
    "accuracy: mean over seeds +- their standard deviation (in brackets: 95 % interval, bootstrap over seeds and "
    "questions; of few seeds, and near 0 or 100 %, it is too narrow)",
    "p: McNemar's exact test against the best method, on the same questions of the seeds that both have, pooled; it "
    "compares these models, and says nothing of other seeds",
    "tokens: generated, plus one for each thought, as the paper counts (pause tokens are none); passes: those of the "
    "decoder that wait for each other, for a question; s/question: without compilation, in the evaluation's batches",
    "thoughts: the intact ones are made first; then zeros, noise of the same norm, the mean thought of the validation "
    "questions at that place, those of another question, or the same in another order are run in their place, and the "
    "answer is written behind them. Removed: none are made, and the answer is forced. In brackets: the questions with "
    "thoughts to alter, of all seeds. Thoughts of blocks that a model opens while it writes stay as they are",
    "multi-pass pause has no row of its own: attention is causal and keys are kept, so it computes what pause computes "
    "in one pass (tests/latent/test_rollout.py)",
)


def summarize(config: TableConfig, grid: Grid) -> dict[str, Any]:
    """The content of ``table.json``: a row for each method, the best shortcut, and where all of it comes from.

    Args:
      config: what was compared.
      grid: how it went.
    """
    right = {cell: read_right(cell) for cell in grid.results}
    means = {
        row: float(np.mean([own.mean() for cell, own in right.items() if cell.row == row]))
        for row in config.rows
        if any(cell.row == row for cell in right)
    }
    best = max(means, key=lambda row: means[row]) if means else None
    rows = {row: _row(row, grid, right, best) for row in config.rows}
    splits = next((result["splits"] for result in grid.results.values()), None)
    commits = sorted({result["evaluation"]["provenance"]["commit"] for result in grid.results.values()})
    return {
        "finished": True,
        "command": config.command,
        "task": config.task,
        "budget": str(config.budget),
        "seeds": list(config.seeds),
        "best": best,
        "methods": rows,
        "questions": {name: len(split) for name, split in grid.dataset.splits.items()},
        "best_shortcut": best_shortcut(grid),
        "most_frequent_answer": answer_shares(grid.dataset.splits["test"], 1)[0][1],
        "failures": [
            {"method": cell.row, "seed": cell.seed, "error": error, "traceback": str(cell.folder / FAILURE)}
            for cell, error in grid.failures.items()
        ],
        "data_fingerprints": splits,
        "commits_of_cells": commits,
        "provenance": provenance(),
        "config": {row: to_json(run) for row, run in grid.configs.items()},
        "notes": list(NOTES),
    }


def read_right(cell: Cell) -> Bool[np.ndarray, " N"]:
    """Where a cell's model answers right, question by question."""
    lines = [json.loads(line) for line in read_text(cell.folder / ANSWERS).splitlines()]
    return np.asarray([line["right"] for line in lines if line["setting"] == TRAINED])


def best_shortcut(grid: Grid) -> dict[str, Any] | None:
    """The rule that answers most of the test questions without reasoning; None where none is known, or measurable."""
    shortcuts = grid.dataset.task.shortcuts
    if shortcuts is None:
        return None
    try:
        accuracies = shortcuts(grid.dataset.splits["test"])
    except CoconutError:
        return None
    rule = max(accuracies, key=lambda name: accuracies[name].value)
    return {"rule": rule, "accuracy": accuracies[rule].value, "half_width_95": accuracies[rule].half_width}


def _row(row: str, grid: Grid, right: Mapping[Cell, Bool[np.ndarray, " N"]], best: str | None) -> dict[str, Any]:
    """The numbers of one method; those of a method whose cells all failed are None."""
    cells = [cell for cell in grid.cells if cell.row == row and cell in grid.results]
    failed = [cell.seed for cell in grid.cells if cell.row == row and cell in grid.failures]
    if not cells:
        return {"seeds": [], "failed": failed, "accuracy": None}
    answers = np.stack([right[cell] for cell in cells])
    evaluations = [grid.results[cell]["evaluation"] for cell in cells]
    training = [grid.results[cell]["training"] for cell in cells]
    of_trained = lambda name: float(np.mean([evaluation["trained"][name] for evaluation in evaluations]))
    accuracies = [float(own.mean()) for own in answers]
    choices = [next(iter(evaluation["choices"].values())) for evaluation in evaluations if evaluation["choices"]]
    return {
        "seeds": [cell.seed for cell in cells],
        "failed": failed,
        "accuracy": float(np.mean(accuracies)),
        "accuracies": accuracies,
        "standard_deviation": standard_deviation(accuracies),
        "interval_95": list(bootstrap_interval(answers)),
        "questions": int(answers.shape[1]),
        "against_best": _against(row, best, right),
        **{name: of_trained(name) for name in ("tokens", "thoughts", "passes")},
        "training_steps": float(np.mean([own["steps"] for own in training])),
        "training_seconds": float(np.mean([own["seconds"] for own in training])),
        "seconds_per_question": float(np.mean([own["seconds_per_question"] for own in evaluations])),
        "choice": _pooled(choices),
        "interventions": {
            name: _pooled_intervention([evaluation["interventions"].get(name) for evaluation in evaluations])
            for name in INTERVENTIONS
        },
    }


def _against(row: str, best: str | None, right: Mapping[Cell, Bool[np.ndarray, " N"]]) -> dict[str, Any] | None:
    """McNemar's test against the best method; None for itself, and where no seed was done by both."""
    by_seed = {name: {cell.seed: own for cell, own in right.items() if cell.row == name} for name in (row, best)}
    seeds = sorted(by_seed[row].keys() & by_seed[best].keys())
    if row == best or not seeds:
        return None
    own, others = (np.concatenate([by_seed[name][seed] for seed in seeds]) for name in (row, best))
    found = mcnemar(own, others)
    return {"seeds": seeds, "own_only": found.first_only, "best_only": found.second_only, "p_value": found.p_value}


def _pooled(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """An accuracy over the questions of all seeds; None where there are none."""
    correct, count = (sum(entry[name] for entry in entries) for name in ("correct", "examples"))
    if not count:
        return None
    return {
        "accuracy": correct / count,
        "correct": correct,
        "examples": count,
        "interval_95": list(wilson_interval(correct, count)),
    }


def _pooled_intervention(entries: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    measured = [entry for entry in entries if entry is not None]
    generation = _pooled(measured)
    if generation is None:
        return None
    return {**generation, "choice": _pooled([entry["choice"] for entry in measured if "choice" in entry])}


# --- For readers --------------------------------------------------------------------------------------------------


def describe(content: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    rows = content["methods"]
    header = ("method", "seeds", "accuracy %", "p", "tokens", "thoughts", "passes", "steps", "training s", "s/question")
    questions = content["questions"]
    parts = [
        f"{content['task']}: {questions['test']:,} test questions, {questions['train']:,} to learn from; budget "
        f"{content['budget']} a run, seeds {', '.join(map(str, content['seeds']))}",
        markdown_table(header, [_main_cells(row, rows[row], content["best"]) for row in rows]),
    ]
    columns = ("method", "as trained", *INTERVENTIONS)
    for title, choose in (("by generation", False), ("choosing between the two options", True)):
        if choose and not any(own.get("choice") for own in rows.values()):
            continue
        cells = [_intervention_cells(row, rows[row], choose) for row in rows]
        parts += [f"Accuracy % with altered thoughts, {title}:", markdown_table(columns, cells)]
    parts.append("\n".join(f"- {line}" for line in _lines_below(content)))
    return "\n\n".join(parts)


def to_csv(content: Mapping[str, Any]) -> str:
    """The table as CSV: a line for each method, numbers in full, nothing where there is none."""
    plain = ("accuracy", "standard_deviation")
    costs = ("tokens", "thoughts", "passes", "training_steps", "training_seconds", "seconds_per_question")
    altered = [
        f"{name}{kind}_{what}" for name in INTERVENTIONS for kind in ("", "_choice") for what in ("accuracy", "rows")
    ]
    header = ["method", "seeds", "failed", *plain, "low_95", "high_95", "p_value", *costs, *altered]
    file = io.StringIO()
    writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
    writer.writeheader()
    for method, row in content["methods"].items():
        line = {"method": method, "seeds": len(row["seeds"]), "failed": len(row["failed"])}
        if row["accuracy"] is not None:
            line |= {name: row[name] for name in (*plain, *costs)}
            line["low_95"], line["high_95"] = row["interval_95"]
            line["p_value"] = row["against_best"] and row["against_best"]["p_value"]
            for name, entry in row["interventions"].items():
                for kind, own in (("", entry), ("_choice", entry and entry["choice"])):
                    if own:
                        line |= {f"{name}{kind}_accuracy": own["accuracy"], f"{name}{kind}_rows": own["examples"]}
        writer.writerow(line)
    return file.getvalue()


def _main_cells(name: str, row: Mapping[str, Any], best: str | None) -> list[str]:
    seeds = f"{len(row['seeds'])}" + (f" ({len(row['failed'])} failed)" if row["failed"] else "")
    if row["accuracy"] is None:
        return [name, seeds, "failed", *"-" * 7]
    low, high = row["interval_95"]
    spread = "" if row["standard_deviation"] is None else f" +- {100 * row['standard_deviation']:.1f}"
    against = row["against_best"]
    return [
        name,
        seeds,
        f"{100 * row['accuracy']:.1f}{spread} ({100 * low:.1f}-{100 * high:.1f})",
        "best" if name == best else "-" if against is None else _p_value(against["p_value"]),
        f"{row['tokens']:.1f}",
        f"{row['thoughts']:.1f}",
        f"{row['passes']:.1f}",
        f"{row['training_steps']:,.0f}",
        f"{row['training_seconds']:,.1f}",
        f"{row['seconds_per_question']:.2g}",
    ]


def _p_value(value: float) -> str:
    """A p-value; one below the least number is not 0."""
    return f"{value:.2g}" if value else "<1e-300"


def _intervention_cells(name: str, row: Mapping[str, Any], choose: bool) -> list[str]:
    if row["accuracy"] is None:
        return [name, "failed", *"-" * len(INTERVENTIONS)]

    def cell(entry: Mapping[str, Any] | None) -> str:
        own = entry and entry["choice"] if choose else entry
        return f"{100 * own['accuracy']:.1f} ({own['examples']:,})" if own else "-"

    trained = f"{100 * row['accuracy']:.1f} ({row['questions'] * len(row['seeds']):,})"
    if choose:
        trained = cell({"choice": row["choice"]})
    return [name, trained, *(cell(row["interventions"][altered]) for altered in INTERVENTIONS)]


def _lines_below(content: Mapping[str, Any]) -> list[str]:
    shortcut, provenances = content["best_shortcut"], content["provenance"]
    lines = [f"failed: {x['method']}, seed {x['seed']}: {x['error']}" for x in content["failures"]]
    if shortcut is None:
        lines.append("no rule is known that answers these questions without reasoning")
    else:
        accuracy, half = 100 * shortcut["accuracy"], 100 * shortcut["half_width_95"]
        lines.append(f"best shortcut on the same questions: {shortcut['rule']}, {accuracy:.1f} +- {half:.1f} %")
    lines.append(f"most frequent answer: {100 * content['most_frequent_answer']:.1f} % of the questions")
    lines += content["notes"]
    hardware = provenances["hardware"]
    commits = [commit for commit in content["commits_of_cells"] if commit != provenances["commit"]]
    others = f" (cells of {', '.join(commits)}, too)" if commits else ""
    lines += [
        f"command: {content['command']}",
        f"commit {provenances['commit']}{others}; {hardware['devices']} x {hardware['device']}, {hardware['cores']} "
        f"cores of {hardware['processor']}; config and versions in table.json",
    ]
    if content["data_fingerprints"]:
        prints = (f"{name} {digest[:12]}" for name, digest in content["data_fingerprints"].items())
        lines.append(f"SHA-256 of the questions: {', '.join(prints)}")
    return lines
