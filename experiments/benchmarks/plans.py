"""Plans of published models on slices, by `coconut plan` as typed: what they need, what thoughts cost, how they scale.

    python -m experiments.benchmarks.plans --output experiments/results/plans

Each plan takes minutes of two cores and needs libtpu, but no TPU. It writes NAME.json and NAME.md; those that are there
already are not made again. With all of them, `weak_scaling.png` shows Llama 3.1 8B on 4 to 512 chips, 8 rows a chip.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from coconut.storage import write_atomically
from experiments import ending

SCALING = ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "8x8x8")
"""Slices of v5p for the weak scaling: 4 to 512 chips."""
LARGEST_SHARDS = 64
"""Chips that share one copy of the parameters; more hold several."""


def run_flags(
    model: str, topology: str, mesh: str, *, vocabulary: int, rows: int, columns: int, thoughts: int, answers: int = 0
) -> list[str]:
    """Flags of `coconut plan` for a model in bfloat16 over float32 parameters, every layer recomputed."""
    recipe = {"gpt2": "gsm8k_coconut", "deepseek-v2-lite": "gsm8k_deepseek-v2-lite"}.get(model, "gsm8k_llama-3.2-1b")
    files = [f"runs/{recipe}", f"models/{model}", "methods/coconut"]
    flags = [part for file in files for part in ("--gin_file", f"gin_configs/{file}.gin")]
    bindings = {
        "DecoderConfig.vocab_size": vocabulary,
        "ExecutionConfig.dtype": "'bfloat16'",
        "ExecutionConfig.scan_layers": True,
        "ExecutionConfig.remat": "'full'",
        "PipelineConfig.batch_size": rows,
        "RunConfig.microbatches": 1,
    }
    flags += [f"--gin.{name}={value}" for name, value in bindings.items()]
    flags += ["--topology", topology, "--mesh", mesh, "--columns", str(columns), "--suffix", "128"]
    return [*flags, "--thoughts", str(thoughts), "--answers", str(answers)]


def llama_8b(shape: str, *, thoughts: int = 6, answers: int = 0) -> list[str]:
    """Llama 3.1 8B on a slice of v5p: 8 rows of 1,024 columns a chip."""
    chips = math.prod(map(int, shape.split("x")))
    shards = min(chips, LARGEST_SHARDS)
    mesh = f"fsdp={shards}" + (f",data={chips // shards}" if chips > shards else "")
    sizes = {"vocabulary": 128_256, "rows": 8 * chips, "columns": 1_024}
    return run_flags("llama-3.1-8b", f"v5p:{shape}", mesh, **sizes, thoughts=thoughts, answers=answers)


def deepseek_v2_lite() -> list[str]:
    """Its first layer has experts here, too, or its layers could not be scanned: 0.5 B parameters too many."""
    flags = run_flags(
        "deepseek-v2-lite", "v5p:4x4x4", "fsdp=8,tensor=8", vocabulary=102_400, rows=512, columns=1_024, thoughts=6
    )
    return [*flags, "--gin.ExpertsConfig.first_layer=0"]


LLAMA_1B = run_flags(
    "llama-3.2-1b", "v5e:4x4", "fsdp=16", vocabulary=128_256, rows=128, columns=512, thoughts=6, answers=64
)


def recipe(name: str, *flags: str, columns: int) -> list[str]:
    """Flags of `coconut plan` for a recipe of GPT-2 small as it is, on the least slice."""
    files = ("--gin_file", f"gin_configs/runs/{name}.gin", "--gin_file", "gin_configs/methods/coconut.gin")
    bindings = ("--gin.DecoderConfig.vocab_size=50260", "--gin.ExecutionConfig.dtype='bfloat16'")
    where = ("--topology", "v5e:2x2", "--mesh", "data=4", *flags)
    return [*files, *bindings, *where, "--columns", str(columns), "--suffix", "64", "--thoughts", "6"]


PLANS: Mapping[str, Sequence[str]] = {
    "gsm8k_coconut_v5e-2x2": recipe("gsm8k_coconut", "--search", columns=192),
    # At most 312 and 146 words and stops a question; 98 and 36 of the words are made up, taken for 3 tokens each.
    "prosqa_v5e-2x2": recipe("prosqa", "--gin.RunConfig.microbatches=2", columns=512),
    "prontoqa_v5e-2x2": recipe("prontoqa", columns=256),
    "gpt2_v5e-2x2": run_flags(
        "gpt2", "v5e:2x2", "fsdp=4", vocabulary=50_260, rows=64, columns=512, thoughts=6, answers=64
    ),
    "llama-3.2-1b_v5e-4x4": LLAMA_1B,
    "llama-3.2-1b_v5e-4x4_gathered_once": [*LLAMA_1B, "--gin.ExecutionConfig.gather='step'"],
    "deepseek-v2-lite_v5p-4x4x4": deepseek_v2_lite(),
    "qwen2.5-7b_v6e-16x16": run_flags(
        "qwen2.5-7b", "v6e:16x16", "fsdp=256", vocabulary=152_064, rows=1_024, columns=1_024, thoughts=6, answers=256
    ),
    "llama-3.1-8b_v5p-4x4x4_0_thoughts": llama_8b("4x4x4", thoughts=0),
    "llama-3.1-8b_v5p-4x4x4_32_thoughts": llama_8b("4x4x4", thoughts=32),
    **{f"llama-3.1-8b_v5p-{shape}": llama_8b(shape, answers=64 * (shape == "4x4x4")) for shape in SCALING},
}


def make(name: str, folder: Path) -> None:
    """Types one plan's command, in a process of its own, and keeps what it prints.

    Raises:
      SystemExit: the command failed.
    """
    command = ["plan", *PLANS[name], "--output", str(folder / f"{name}.json")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-m", "coconut.commands.main", *command], env=environment, capture_output=True, text=True
    )
    if found.returncode:
        raise SystemExit(f"{name}: exit code {found.returncode}\n{found.stderr}")
    shown = " ".join(["coconut", "plan", *PLANS[name]])
    write_atomically(folder / f"{name}.md", f"# {name}\n\n```\n{shown}\n```\n\n{found.stdout.strip()}\n")


def plot_weak_scaling(folder: Path) -> Figure:
    """Estimated step time and utilisation against chips."""
    plans: list[dict[str, Any]] = []
    for shape in SCALING:
        content = json.loads((folder / f"llama-3.1-8b_v5p-{shape}.json").read_text(encoding="utf-8"))
        plans.append(content["plans"][0])
    chips = [plan["batch_size"] // 8 for plan in plans]
    times = [plan["cost"]["roofline"] for plan in plans]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("expected", "expected, nothing overlaps"), ("fastest", "everything overlaps")):
        left.plot(chips, [time[name] for time in times], marker="o", label=label)
    for name, label in (("compute", "products"), ("memory", "memory"), ("interconnect", "collectives")):
        left.plot(chips, [time[name] for time in times], marker=".", linestyle=":", label=label)
    left.set(xscale="log", xlabel="chips", ylabel="seconds a step, estimated", ylim=(0, None))
    right.plot(chips, [100 * plan["utilisation"] for plan in plans], marker="o")
    right.set(xscale="log", xlabel="chips", ylabel="model FLOPs utilisation, %, estimated", ylim=(0, 100))
    for axes in (left, right):
        axes.set_xticks(chips, [str(count) for count in chips])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle("Llama 3.1 8B on v5p, 6 thoughts, 8 rows of 1,024 columns a chip (rooflines, not measured)")
    return figure


def main() -> None:
    """Makes the plans that are missing, then the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--name", nargs="+", choices=PLANS, help="only these, without the plot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.name or PLANS:
        if not (options.output / f"{name}.md").exists():
            print(name, flush=True)
            with ending.by_exception():
                make(name, options.output)
    if not options.name:
        figure = plot_weak_scaling(options.output)
        for kind in ("png", "svg"):
            figure.savefig(options.output / f"weak_scaling.{kind}", dpi=120)


if __name__ == "__main__":
    main()
