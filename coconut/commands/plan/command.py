"""``coconut plan``."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from coconut.commands.configuration import resolve_run
from coconut.commands.plan.chips import HERE
from coconut.commands.plan.comparison import measure
from coconut.commands.plan.generation import make_generation_plan
from coconut.commands.plan.hardware import make_slice
from coconut.commands.plan.planning import Columns, Plan, make_step, read_plan
from coconut.commands.plan.report import (
    describe,
    describe_comparison,
    describe_generation,
    describe_mesh,
    describe_microbatches,
    ranking,
)
from coconut.commands.plan.search import search
from coconut.datasets import make_tokenizer
from coconut.errors import CoconutError
from coconut.mesh import MeshConfig
from coconut.provenance import provenance
from coconut.storage import write_atomically
from coconut.training.config import RunConfig
from coconut.training.setup import vocabulary_size


def plan_command(options: argparse.Namespace) -> str:
    """Plans what the options say, writes ``--output`` and returns the text to print.

    Args:
      options: of a command line that has passed `coconut.commands.flags.check_together`.

    Raises:
      CoconutError: bad input (`make_slice`, `make_plan`).
    """
    if options.topology != HERE:
        jax.config.update("jax_platforms", "cpu")  # Nothing runs here: no reason to look for an accelerator.
    config = resolve_run(options.gin_file, options.gin_binding)
    if config.drawing is not None:
        field = "scorer" if config.reinforcement is None else "reinforcement"
        raise CoconutError(
            f"RunConfig.{field}: plan knows steps that imitate data alone; what a step on samples takes of the "
            "devices at hand says coconut train --dry_run"
        )
    if config.decoder.vocab_size is None and config.pretrained is not None and Path(config.pretrained).is_dir():
        rows = vocabulary_size(config, make_tokenizer(config.data, ()), None)
        config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=rows))
    if config.adapter is not None:  # A plan has no tokenizer that knows names, and any other rows cost as much.
        rows = tuple(range(len(config.adapter.trained_rows)))
        config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, trained_rows=rows))
    columns = Columns(total=options.columns, thoughts=options.thoughts, suffix=options.suffix)
    where = make_slice(options.topology)
    console = Console(stderr=True)

    def report(mesh: MeshConfig, way: RunConfig, found: Plan | CoconutError) -> None:
        sizes = {axis: size for axis, size in vars(mesh).items() if size}
        outcome = found if isinstance(found, CoconutError) else "fits" if found.fits else "does not fit"
        how = f"{describe_microbatches(way.microbatches)}, remat {way.execution.remat!r}"
        console.print(f"{describe_mesh(sizes)}, {how}: {outcome}", highlight=False)

    found = search(config, where, columns, report, options.mesh) if options.search else []
    if found:
        config = found[0][0]
    mesh = MeshConfig(**found[0][1].mesh) if found else options.mesh or MeshConfig()
    step = make_step(config, where, mesh, columns)
    plans = [plan for _, plan in found] or [read_plan(config, where, step, columns)]
    content: dict[str, Any] = {"plans": [plan.to_json() for plan in plans], "provenance": provenance()}
    text = [describe(plans[0])]
    if options.search:
        text.insert(0, ranking(plans) + "\n")
    if options.answers:
        generation = make_generation_plan(config, where, MeshConfig(**plans[0].mesh), columns, options.answers)
        content["generation"] = generation.to_json()
        text += ["", describe_generation(generation)]
    if options.topology == HERE and plans[0].cost is not None:
        content["measured"] = measure(config, step, columns, plans[0])
        text.append(describe_comparison(content["measured"]))
    if options.output is not None:
        write_atomically(options.output, json.dumps(content, indent=1) + "\n")
    return "\n".join(text)
