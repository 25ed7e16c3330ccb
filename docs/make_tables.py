"""Tables of README.md and of the pages, from what programs wrote: `python docs/make_tables.py` writes them anew.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test compares each with what is made here, so that
no number is copied by hand. Ratios are the recorded ones, of one run each.
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
ON_GPU, BENCHMARKS = "on_gpu/second_run/training_step.json", "benchmarks/{}.json"


def read(name: str) -> Any:
    """A recorded result by its path below experiments/results."""
    result = json.loads((RESULTS / name).read_text())
    if isinstance(result, dict) and result.get("unfinished"):
        raise ValueError(f"{name}: the benchmark was stopped before its end")
    return result


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. Columns of numbers, all but the first and those that say where, are to the right."""
    rule = [":--" if name in (head[0], "where") else "--:" for name in head]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _milliseconds(side: Mapping[str, Any]) -> str:
    return f"{1e3 * side['median_seconds']:,.1f} ms"


def _rate(side: Mapping[str, Any]) -> float:
    return side["examples_per_second"]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


AS_OFFICIAL, CACHED = "PyTorch, thoughts, inputs rebuilt as lists", "PyTorch, thoughts, from the cache"
SHIPPED = "Hugging Face, plain, as its users run it"
TUNED = "Hugging Face, plain, logits of labels, fused activation"


def speed() -> str:
    """What a step and an answer take, beside PyTorch with thoughts and beside Hugging Face without."""
    nothing, rows = "-", []

    def steps(file: str, case: str, name: str, machine: str, with_thoughts: str, plain: str) -> None:
        measured = read(file)["measurements"][case]
        sides, ours = measured["sides"], "ours, with thoughts"
        ratios = {other: measured["ratios"][f"{ours} / {other}"]["ratio"] for other in (with_thoughts, plain)}
        rows.append(
            [
                name,
                _milliseconds(sides[ours]),
                _milliseconds(sides[with_thoughts]),
                _milliseconds(sides[plain]),
                " / ".join(_ratio(ratios[other]) for other in (with_thoughts, plain)),
                f"{machine}, `{file}`",
            ]
        )

    gpu = (ON_GPU, "bfloat16, batch 128, 6 thoughts")
    steps(
        *gpu,
        "step, 6 thoughts, batch 128; PyTorch as the official code, Hugging Face as shipped",
        "H100",
        AS_OFFICIAL,
        SHIPPED,
    )
    steps(*gpu, "the same; PyTorch from a cache, Hugging Face tuned", "H100", CACHED, TUNED)
    more = ("on_gpu/third_run/training_step.json", "bfloat16, batch 128, 32 thoughts")
    steps(*more, "step, 32 thoughts, batch 128; from a cache, tuned", "H200", CACHED, TUNED)

    for letter, name in (
        ("a", "step, 2 layers x 256, 6 thoughts, batch 32, float32"),
        ("b", "step, GPT-2 small, 6 thoughts, batch 4, float32"),
    ):
        file = BENCHMARKS.format(f"latent_step_{letter}_against_transformers")
        case = read(file)["cases"][f"{letter} against transformers"]
        theirs = case["transformers"][case["attention"]]
        ratio = f"{nothing} / {_ratio(case['ratio'])}"
        rows.append(
            [name, _milliseconds(case["latent"]), nothing, _milliseconds(theirs), ratio, f"2 CPU cores, `{file}`"]
        )

    file = "on_gpu/generation.json"
    for batch in (1, 64, 512):
        case = read(file)["measurements"][f"batch {batch}"]
        ours, theirs = case["sides"]["ours, with thoughts"], case["sides"]["Hugging Face's generate, without"]
        rates = [f"{side['examples_per_second']:,.1f}/s" for side in (ours, theirs)]
        [ratio] = [entry["ratio"] for entry in case["ratios"].values()]
        name = f"answers, 6 thoughts and 32 tokens, batch {batch}"
        rows.append([name, rates[0], nothing, rates[1], f"{nothing} / {_ratio(ratio)}", f"H100, `{file}`"])

    file = BENCHMARKS.format("generate_a")
    case = read(file)["cases"]["a"]
    theirs = max((case["sides"][f"batch 16, transformers, {kind}"] for kind in ("eager", "sdpa")), key=_rate)
    ratio = 1 / case["speedups"]["batch 16 over transformers"]["ratio"]
    name = "answers, 2 layers x 256, 6 thoughts and 32 tokens, batch 16, float32"
    rates = [f"{_rate(side):,.1f}/s" for side in (case["sides"]["batch 16"], theirs)]
    rows.append([name, rates[0], nothing, rates[1], f"{nothing} / {_ratio(ratio)}", f"2 CPU cores, `{file}`"])

    file = BENCHMARKS.format("rollouts")
    case = read(file)["cases"]["groups of 8"]
    rates = [f"{case['sides'][side]['examples_per_second']:,.1f}/s" for side in ("thoughts", "transformers, sdpa")]
    ratio = 1 / case["speedups"]["thoughts over transformers"]["ratio"]
    name = "samples, 8 of each question, 6 thoughts and 32 tokens, 4 layers x 128"
    rows.append([name, rates[0], nothing, rates[1], f"{nothing} / {_ratio(ratio)}", f"2 CPU cores, `{file}`"])
    head = [
        "what",
        "ours, with thoughts",
        "PyTorch, with thoughts",
        "Hugging Face, without",
        "our time / theirs",
        "where",
    ]
    return markdown(head, rows)


QUICKSTART = ("coconut", "cot", "no_cot", "pause", "coconut_without_curriculum")


def _mean_and_spread(shares: Sequence[float]) -> str:
    return f"{100 * statistics.mean(shares):.1f} ± {100 * statistics.stdev(shares):.1f}"


def _of_quickstart(method: str) -> list[float]:
    return [read(f"quickstart/seed{seed}/results.json")["methods"][method]["trained"]["accuracy"] for seed in (0, 1, 2)]


def _results(methods: Sequence[str]) -> str:
    table, rows = read("methods_on_small_graphs/table.json"), []
    for method in methods:
        entry = table["methods"][method]
        replaced = [entry["interventions"][name] for name in ("noise", "other")]
        removed = entry["interventions"]["removed"]
        choosing = None if removed is None else removed["choice"]
        rows.append(
            [
                f"`{method}`",
                _mean_and_spread(_of_quickstart(method)) if method in QUICKSTART else "-",
                _mean_and_spread(entry["accuracies"]),
                *("-" if effect is None else f"{100 * effect['accuracy']:.1f}" for effect in (choosing, *replaced)),
                f"{entry['tokens']:.1f}",
                f"{entry['training_seconds']:.0f}",
            ]
        )
    head = ["method", "quickstart %", "3,000 steps %", "no thoughts, choosing %", "noise instead %"]
    return markdown([*head, "another's thoughts %", "tokens", "train s"], rows)


def results() -> str:
    """Accuracy on small graphs, mean and spread over three seeds, of the methods a reader asks about first."""
    return _results(
        (
            *("simcot", "pccot", "coconut_stage_mixing", "kava", "coconut", "cot"),
            *("codi", "coconut_without_curriculum", "no_cot", "pause"),
        )
    )


def all_results() -> str:
    """The same of every method that has three seeds, the best first."""
    methods = read("methods_on_small_graphs/table.json")["methods"]
    return _results(sorted(methods, key=lambda method: -methods[method]["accuracy"]))


def rewards() -> str:
    """What each policy gains by rewards."""
    lines = (RESULTS / "learning_from_rewards" / "table.md").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "results": results,
    "all_results": all_results,
    "rewards": rewards,
}
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with each of its tables as it has to be."""
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], text)


def pages() -> list[Path]:
    """README.md and the pages."""
    return [
        ROOT / "README.md",
        *sorted(path for path in (ROOT / "docs").rglob("*.md") if "reference" not in path.parts),
    ]


if __name__ == "__main__":
    for page in pages():
        page.write_text(with_tables(page.read_text()))
