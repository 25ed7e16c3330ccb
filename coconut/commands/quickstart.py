"""``coconut quickstart``: Coconut and its controls on small depth-matched graphs, from scratch, in minutes.

A short warm-up (chain of thought, the markers anywhere) teaches a model to follow an edge. Coconut and its controls
start from its parameters, as the paper's runs start from GPT-2's, and learn from the same questions. But for one:
whoever has been through the warm-up has had a curriculum, so Coconut without its curriculum starts from fresh
parameters, and gets the warm-up's steps on top.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from coconut.analysis.plots import plot_accuracy_by_thoughts, plot_belief, plot_learning_curves, save_figure
from coconut.analysis.search_tree import first_nodes, graph_of
from coconut.commands.configuration import resolve_run
from coconut.commands.evaluate import EvaluateConfig, evaluate_workdir, markdown_table, subject_of
from coconut.commands.train import how_it_went, train_to_the_end
from coconut.datasets import Dataset, load_dataset
from coconut.errors import CoconutError
from coconut.evaluation.subject import Subject
from coconut.methods import get_method
from coconut.provenance import provenance
from coconut.storage import write_atomically
from coconut.tasks.shortcuts import shortcut_accuracies
from coconut.training.config import to_json
from coconut.training.loading import load_model
from coconut.training.loop import TrainResult
from coconut.types import Example

FROM_SCRATCH = "coconut_without_curriculum"
METHODS = ("coconut", "cot", "no_cot", "pause", FROM_SCRATCH)
RUN_FILE = "gin_configs/runs/small_graphs.gin"
FIRST_STEPS_FILE = "gin_configs/runs/small_graphs_first_steps.gin"
WARM_UP_FILE = "gin_configs/runs/small_graphs_warm_up.gin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """What the quickstart runs. All other numbers stand in ``gin_configs/runs/small_graphs.gin``.

    Attributes:
      seed: of parameters and data order; the questions are the same for every seed.
      methods: what is compared; ``coconut`` comes first.
      control_steps: optimizer steps of a control without thoughts for each step that Coconut took. A step with thoughts
        costs more, so this is above 1: controls train about as long, and the table shows the seconds.
      bindings: further gin bindings, for every run.
    """

    seed: int = 0
    methods: tuple[str, ...] = METHODS
    control_steps: float = 1.35
    bindings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for method in self.methods:
            get_method(method)
        if not self.methods or self.methods[0] != "coconut":
            raise CoconutError(f"QuickstartConfig.methods = {self.methods!r}: coconut has to come first")
        if not self.control_steps > 0:
            raise CoconutError(f"QuickstartConfig.control_steps = {self.control_steps!r}: must be positive")

    @classmethod
    def smoke(cls, seed: int = 0) -> "QuickstartConfig":
        """Sizes that run in a minute and learn nothing: a check of the plumbing."""
        bindings = (
            "DataConfig.train = 300",
            "DataConfig.validation = 16",
            "DataConfig.test = 48",
            "DecoderConfig.embed_dim = 16",
            "DecoderConfig.num_layers = 1",
            "CurriculumConfig.steps_per_stage = 6",
            "CurriculumConfig.advance_window = 3",
            "RunConfig.evaluate_every = None",
            "RunConfig.evaluation_batch_size = 48",
            "RunConfig.log_every = 2",
        )
        return cls(seed=seed, methods=("coconut", "no_cot"), bindings=bindings)


def quickstart(
    outdir: Path | str, *, config: QuickstartConfig | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Trains, evaluates, tabulates and plots; started again with the same ``outdir`` it goes on.

    Writes ``results.json``, ``results.md``, and ``learning_curves``, ``accuracy_by_thoughts`` and ``beliefs`` as PNG
    and SVG into ``outdir``, beside one workdir a method.

    Args:
      outdir: the folder; made if missing.
      config: what to run; the default comparison if None.
      console: where progress goes; standard error if None.

    Returns:
      The content of ``results.json``. ``finished`` is False where training was interrupted, and nothing else is there.

    Raises:
      CoconutError: ``outdir`` holds the runs of another quickstart.
    """
    outdir, config = Path(outdir), config or QuickstartConfig()
    console = console or Console(stderr=True)
    outdir.mkdir(parents=True, exist_ok=True)
    seeded = (f"RunConfig.seed = {config.seed}", *config.bindings)

    first_steps = train_to_the_end(resolve_run([FIRST_STEPS_FILE], seeded), outdir / "first_steps", console, None)
    if first_steps is None:
        return {"finished": False}
    warm_up_config = resolve_run([WARM_UP_FILE], (*seeded, _start_from(outdir / "first_steps")))
    console.print(f"generating {warm_up_config.data.train:,} questions")
    dataset = load_dataset(warm_up_config.data)
    warm_up = train_to_the_end(warm_up_config, outdir / "warm_up", console, dataset)
    if warm_up is None:
        return {"finished": False}

    results: dict[str, Any] = {}
    coconut_steps = 0
    for method in config.methods:
        bindings = list(seeded)
        if method != FROM_SCRATCH:
            bindings.append(_start_from(outdir / "warm_up"))
        if method != "coconut":
            steps = math.ceil(coconut_steps * config.control_steps)
            if method == FROM_SCRATCH:
                steps = coconut_steps + first_steps.progress.step + warm_up.progress.step
            bindings.append(f"CurriculumConfig.steps_per_stage = {steps}")
        run_config = resolve_run([RUN_FILE, f"gin_configs/methods/{method}.gin"], bindings)
        trained = train_to_the_end(run_config, outdir / method, console, dataset)
        if not trained:
            return {"finished": False}
        if method == "coconut":
            coconut_steps = trained.progress.step
        results[method] = _measure(outdir / method, trained, console)

    content = {
        "finished": True,
        "what": "coconut quickstart: accuracy on held-out depth-matched 3-hop graphs",
        "command": f"coconut quickstart --seed {config.seed}",
        "seed": config.seed,
        "seeds": 1,
        "questions": {
            "train": len(dataset.splits["train"]),
            "test": len(dataset.splits["test"]),
            "shortcut_accuracies_on_test": {
                rule: accuracy.value for rule, accuracy in shortcut_accuracies(dataset.splits["test"]).items()
            },
        },
        "provenance": provenance(),
        "warm_up": {"first_steps": how_it_went(first_steps), "warm_up": how_it_went(warm_up)},
        "methods": results,
        "config": to_json(run_config),
    }
    write_atomically(outdir / "results.json", json.dumps(content, indent=1) + "\n")
    write_atomically(outdir / "results.md", table(content) + "\n")
    _plot(outdir, config.methods, content, dataset)
    return content


def table(content: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""

    def row(name: str, entry: dict[str, Any], trained: dict[str, Any] | None) -> list[str]:
        low, high = entry["interval_95"]
        seconds, steps = ("", "") if trained is None else (f"{trained['seconds']:.0f}", f"{trained['steps']:,}")
        accuracy = f"{100 * entry['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        return [name, accuracy, f"{entry['tokens']:.1f}", f"{entry['thoughts']:.0f}", steps, seconds]

    rows = []
    for method, result in content["methods"].items():
        rows.append(row(method, result["trained"], result["training"]))
        if method == "coconut":
            for count, entry in result["thoughts"].items():
                name = "- thoughts removed" if count == "0" else f"- {count} thoughts"
                rows.append(row(f"{name}, answer forced", entry, None))
                # A choice generates nothing: it has no tokens.
                low, high = result["choices"][count]["interval_95"]
                share = f"{100 * result['choices'][count]['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"
                rows.append([f"{name}, choosing between the two options", share, "", count, "", ""])
    header = ("method", "accuracy % (95 %)", "tokens", "thoughts", "steps", "training s")
    questions = content["questions"]
    return (
        f"{questions['test']:,} held-out depth-matched graph questions, {questions['train']:,} to learn from; "
        f"seed {content['seed']}, commit {content['provenance']['commit']}\n"
        f"before: {_warm_up_seconds(content):.0f} s of warm-up, shared by all but {FROM_SCRATCH}\n\n"
        + markdown_table(header, rows)
    )


def _warm_up_seconds(content: dict[str, Any]) -> float:
    return sum(run["seconds"] for run in content["warm_up"].values())


def _measure(workdir: Path, trained: TrainResult, console: Console) -> dict[str, Any]:
    """Accuracy on the test split, once, of the checkpoint the validation split chose."""
    curriculum = trained.run.config.curriculum
    thoughts = tuple(range(curriculum.max_thoughts)) if trained.run.config.method == "coconut" else ()
    result = evaluate_workdir(workdir, EvaluateConfig(split="test", which="best", thoughts=thoughts), console=console)
    result["training"] = how_it_went(trained)
    return result


def _start_from(workdir: Path) -> str:
    """The binding that starts a run from another one's parameters."""
    return f"RunConfig.init_from = {str(workdir)!r}"


def _plot(outdir: Path, methods: Sequence[str], content: dict[str, Any], dataset: Dataset) -> None:
    curves = {method: outdir / method for method in methods}
    figures = {
        "learning_curves": plot_learning_curves(
            curves, outdir / "learning_curves.png", stages_of="coconut", chance=0.5
        ),
        "accuracy_by_thoughts": plot_accuracies(content, outdir / "accuracy_by_thoughts.png"),
    }
    run, model, progress = load_model(outdir / "coconut", "best")
    subject, example = subject_of(run, model, progress), dataset.splits["test"][0]
    most = run.config.curriculum.max_thoughts
    figures["beliefs"] = plot_next_node(subject, example, most, outdir / "beliefs.png")
    for name, figure in figures.items():
        save_figure(figure, outdir / f"{name}.svg")


def plot_accuracies(content: dict[str, Any], path: Path) -> Figure:
    """Draws Coconut's accuracy by its number of thoughts, by both measures. Only a choice has a chance of one half.

    Args:
      content: of ``results.json``.
      path: file to write.
    """
    coconut = content["methods"]["coconut"]
    written = {int(count): entry for count, entry in coconut["thoughts"].items()}
    written[round(coconut["trained"]["thoughts"])] = coconut["trained"]
    # Where questions differ in their trained number of thoughts, no number says it.
    chosen = {int(count): entry for count, entry in coconut["choices"].items() if count.isdigit()}
    names = ("writes the answer (forced to, after fewer thoughts than trained)", "chooses between the two options")
    results = {name: entries for name, entries in zip(names, (written, chosen), strict=True) if entries}
    chance = 0.5 if chosen else None
    return plot_accuracy_by_thoughts(results, path, chance=chance, chance_name="chance\nof choosing")


def plot_next_node(subject: Subject, example: Example, max_thoughts: int, path: Path) -> Figure:
    """Draws which node the model would write next after each number of thoughts, when nothing is forced.

    That is a step where it has steps left to write, and the answer where it has none. The node that it answers when it
    is made to answer at once is another matter: after one thought of three that is a guess.

    Args:
      subject: the model.
      example: a question in the symbol form, with its graph.
      max_thoughts: the most thoughts to draw.
      path: file to write.
    """
    graph = graph_of(example)
    step, answer = first_nodes(subject, example, range(max_thoughts + 1))
    root, target, negative = (graph.symbols[node] for node in (graph.root, graph.target, graph.negative))
    return plot_belief(
        graph,
        step + answer,
        path,
        f"Is {target} or {negative} below {root}? The node the model would write next, nothing forced",
        measure="probability to be written next",
        notes=[f"as a step {a:.0%}, as its answer {b:.0%}" for a, b in zip(step.sum(1), answer.sum(1), strict=True)],
    )
