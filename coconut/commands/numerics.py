"""``coconut numerics``: how many answers of a run change with dtype, batch size and devices."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable
from typing import Any, no_type_check

import jax
from rich.console import Console

from coconut.commands.evaluate import markdown_table, questions_of, subject_of
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.evaluation.numerics import Judged, compare, smallest_margin
from coconut.mesh import MESH_AXES, MeshConfig
from coconut.provenance import provenance
from coconut.sharding import make_mesh
from coconut.storage import write_atomically
from coconut.storage_path import StoragePath
from coconut.training.checkpoint import Which
from coconut.training.loading import Numerics, load_model
from coconut.training.metrics import progress_bar
from coconut.training.run import Run, folder_of_run, split_fingerprint


def read_numerics(text: str) -> Numerics:
    """``float32``: computed so, parameters as they are stored; ``bfloat16:float32``: parameters are rounded first.

    Raises:
      CoconutError: an unknown dtype.
    """
    param_dtype, colon, dtype = text.rpartition(":")
    try:
        return Numerics(dtype=dtype, param_dtype=param_dtype if colon else None)
    except CoconutError as error:
        raise CoconutError(f"--dtypes {text}: {error}") from error


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """Which settings answer, each combination of the three; the first one is what the others are compared with.

    Attributes:
      numerics: of parameters and computation.
      batch_sizes: rows answered together; empty for the run's own, and 1.
      meshes: devices, the first ones there are.
      split: ``test`` or ``validation`` of the run's own data, or a source of questions.
      which: the ``best`` checkpoint by validation, the ``latest``, or that of a step.
      verify: compare the checkpoint's files with their SHA-256 first.
      limit: the first so many questions only; None for all.
    """

    numerics: tuple[Numerics, ...]
    batch_sizes: tuple[int, ...] = ()
    meshes: tuple[MeshConfig, ...] = (MeshConfig(data=1),)
    split: str = "test"
    which: Which | int = "best"
    verify: bool = True
    limit: int | None = None


def numerics_command(options: argparse.Namespace) -> str:
    """Runs the command; returns its table in Markdown."""
    config = NumericsConfig(
        numerics=tuple(map(read_numerics, options.dtypes)),
        batch_sizes=options.batch_sizes or (),
        meshes=tuple(map(_whole, options.mesh or [MeshConfig()])),
        split=options.split,
        which=options.which if options.step is None else options.step,
        verify=not options.skip_verification,
        limit=options.limit,
    )
    result = compare_numerics(options.workdir, config)
    if options.output is not None:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    return describe(result)


def compare_numerics(
    workdir: StoragePath | str, config: NumericsConfig, *, console: Console | None = None
) -> dict[str, Any]:
    """Answers the same questions greedily in every setting.

    Returns:
      ``settings``: each with its ``param_dtype``, ``dtype``, ``batch_size``, ``mesh``, number of ``devices`` and what
      `coconut.evaluation.numerics.compare` says of it beside the first one; ``smallest_margin`` of all tokens of the
      first; and what was evaluated, where.

    Raises:
      CoconutError: the workdir holds no run, or none that can be run so; or there are fewer devices than asked for.
    """
    devices = _devices(max(map(_size, config.meshes)))
    run = Run.load(folder_of_run(workdir))
    examples = questions_of(run, config.split)[: config.limit]
    own = run.config.evaluation_batch_size
    batch_sizes = config.batch_sizes or tuple(dict.fromkeys((own, 1)))
    for numerics in config.numerics:  # refused before anything is answered
        numerics.execution(run.config.execution)
    loads = list(itertools.product(config.numerics, config.meshes))
    settings, first, said = [], None, {}
    with progress_bar(console) as bar:
        total = len(examples) * len(loads) * len(batch_sizes)
        task_id = bar.add_task("answering", total=total, numbers="")
        for numerics, mesh_config in loads:
            mesh = make_mesh(mesh_config, devices[: _size(mesh_config)])
            run, model, progress = load_model(
                workdir, config.which, mesh, verify=config.verify and not settings, numerics=numerics
            )
            said = {"method": run.config.method, "step": progress.step, "stage": progress.stage}
            subject = subject_of(run, model, progress)
            tokenized = [subject.tokenize(example) for example in examples]
            sampling = dataclasses.replace(run.config.sampling, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)
            for batch_size in batch_sizes:
                how = AnswerConfig(
                    batch_size=batch_size, sampling=sampling, halting=run.config.halting, keep_choices=True
                )
                with jax.set_mesh(mesh), numerics.products():
                    advance: Callable[[int], None] = lambda rows: bar.advance(task_id, rows)
                    answers = list(answer_questions(*subject.asked, tokenized, how, advance=advance))
                right = [
                    subject.task.check(answer.text, example) for answer, example in zip(answers, examples, strict=True)
                ]
                judged = Judged(answers=answers, right=right)
                first = first or judged
                settings.append(
                    {
                        "param_dtype": run.config.decoder.param_dtype,
                        "dtype": run.config.execution.dtype,
                        "batch_size": batch_size,
                        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
                        "devices": mesh.size,
                        **compare(first, judged),
                    }
                )
    assert first is not None
    return {
        **said,
        "split": config.split,
        "data_fingerprint": split_fingerprint(examples),
        "questions": len(examples),
        "smallest_margin": smallest_margin(first),
        "settings": settings,
        "provenance": provenance(),
    }


def describe(result: dict[str, Any]) -> str:
    """The Markdown table of `compare_numerics`."""
    number = lambda value: "" if value is None else f"{value:.2g}"
    rows = []
    for setting in result["settings"]:
        mesh = ", ".join(f"{axis}={size}" for axis, size in setting["mesh"].items())
        rows.append(
            [
                setting["param_dtype"],
                setting["dtype"],
                str(setting["batch_size"]),
                mesh or "1",
                f"{100 * setting['accuracy']:.1f}",
                str(setting["other_texts"]),
                str(setting["turned_wrong"]),
                str(setting["turned_right"]),
                "" if setting["first_column"] is None else str(setting["first_column"]),
                number(setting["smallest_margin"]),
                number(setting["largest_margin"]),
            ]
        )
    header = (
        *("parameters", "computed in", "rows", "devices", "accuracy %", "other texts", "turned wrong", "turned right"),
        *("first token", "smallest margin", "largest margin"),
    )
    about = (
        f"{result['questions']} questions ({result['split']}), answered greedily. Other texts are those that are not "
        "the first setting's. They part at a token, the first of them at the one of that number; a margin is by how "
        "much the first setting's logit was above its second best there. The smallest of all its tokens is "
        f"{number(result['smallest_margin'])}."
    )
    return f"{markdown_table(header, rows)}\n\n{about}"


def _whole(mesh: MeshConfig) -> MeshConfig:
    """A mesh that says how many devices it takes: one copy of the model where it says nothing."""
    return dataclasses.replace(mesh, data=mesh.data or 1)


def _size(mesh: MeshConfig) -> int:
    return math.prod(getattr(_whole(mesh), axis) for axis in MESH_AXES)


def _devices(count: int) -> list[Any]:
    """The devices, of which a CPU is made to have so many where JAX has not started yet.

    Raises:
      CoconutError: there are fewer.
    """
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # JAX refuses where it has started; then it has what it has.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise CoconutError(f"--mesh: asks for {count} devices, there are {len(devices)} ({devices[0].platform})")
    return devices
