"""The ``coconut`` command. Each subcommand is a plain function of another module of this package.

Those modules import JAX, which takes seconds: each is imported where its command runs, after the flags were read.
"""

import argparse
import dataclasses
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coconut import interruption
from coconut.commands.allocator import keep_freed_memory
from coconut.commands.cells import Cell
from coconut.commands.compiled_programs import keep_compiled_programs
from coconut.commands.flags import check_together, parse_arguments
from coconut.commands.flags_of_runs import cells_of, read_seeds
from coconut.errors import CoconutError, DivergedError
from coconut.extensions import import_extensions

if TYPE_CHECKING:
    from coconut.training.config import RunConfig

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; the process exits with what this returns.

    Returns:
      0 done; 2 bad input (one message on standard error); 3 training diverged (likewise); 130 interrupted, with a
      checkpoint to go on from. Any other failure is a Python traceback and 1.
    """
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    options.started = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Orbax and grain report every step of a save through absl.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        check_together(options)
        if imports := getattr(options, "imports", []):
            import_extensions(imports)
        return COMMANDS[options.command](options)
    except CoconutError as error:
        print(f"coconut {options.command}: {error}", file=sys.stderr)
        return EXIT_DIVERGED if isinstance(error, DivergedError) else EXIT_BAD_INPUT


def _quickstart(options: argparse.Namespace) -> int:
    from rich.console import Console

    from coconut.commands.quickstart import QuickstartConfig, quickstart, table

    config = QuickstartConfig.smoke(options.seed) if options.smoke else QuickstartConfig(seed=options.seed)
    results = quickstart(options.outdir, config=config, console=Console(stderr=True))
    if not results["finished"]:
        return _interrupted(f"coconut quickstart --outdir {options.outdir} --seed {options.seed}")
    _print_markdown(table(results))
    return EXIT_DONE


def _data(options: argparse.Namespace) -> int:
    from coconut.commands.data import generate_file, prepare_report, prepare_splits, show, statistics_report
    from coconut.datasets import DataConfig

    if options.action == "generate":
        values = dict(options.option)
        values |= {k: getattr(options, k) for k in ("negatives", "form") if getattr(options, k) is not None}
        examples = generate_file(options.output, options.task, options.count, options.seed, values)
        print(f"wrote {len(examples):,} questions to {options.output}")
    elif options.action == "prepare":
        config = DataConfig(
            task=options.task,
            train=options.train,
            validation=options.validation,
            test=options.test,
            options=dict(options.option),
            seed=options.seed,
            skip_bad_records=options.skip_bad_records or 0,
        )
        splits = prepare_splits(options.output, config, drop_without_steps=options.drop_without_steps)
        _print_markdown(prepare_report(splits))
    elif options.action == "stats":
        _print_markdown(statistics_report(options.file, options.task))
    else:
        print(show(options.file, options.count, options.task))
    return EXIT_DONE


def _train(options: argparse.Namespace) -> int:
    import jax
    from rich.console import Console

    from coconut.commands.configuration import resolve_run
    from coconut.commands.distributed import join
    from coconut.commands.sweep import as_json, check_cells, describe_cells, folder_of, train_cells
    from coconut.commands.train import dry_run, print_dry_run, run_training
    from coconut.sharding import make_mesh
    from coconut.training.clock import told

    bindings = [*options.gin_binding, *(["DataConfig.drop_too_long = True"] if options.drop_too_long else [])]
    if options.skip_bad_records is not None:
        bindings.append(f"DataConfig.skip_bad_records = {options.skip_bad_records}")

    def resolve(cell: Cell | None = None) -> "RunConfig":
        workdir, own = options.workdir, () if cell is None else cell.bindings
        if workdir is not None and cell is not None:
            workdir = workdir / cell.folder
        config = resolve_run(options.gin_file, [*bindings, *own], workdir=workdir)
        tracking = config.tracking.also("tensorboard") if options.tensorboard else config.tracking
        return dataclasses.replace(config, tracking=tracking)

    cells = cells_of(options)
    own = cells[options.cell] if options.cell is not None else None
    config = resolve(own or next(iter(cells), None))
    join(options)
    if own is None and cells and options.dry_run:
        check_cells(resolve, cells, options.workdir)
        print(describe_cells(cells, sys.argv[1:]))
        return EXIT_DONE
    mesh = make_mesh(options.mesh)
    if options.dry_run:
        print_dry_run(*dry_run(config, mesh), Console())
        return EXIT_DONE
    how: dict[str, Any] = {
        "mesh": mesh,
        "allow": options.allow,
        "verify": not options.skip_verification,
        "console": Console(stderr=True),
    }
    if own is None and cells:
        trained = train_cells(resolve, cells, options.workdir, **how)
        if trained is None:
            return _interrupted(f"the same command in the same --workdir {options.workdir}")
        print(f"trained {len(trained)} {'runs' if options.sweep else 'seeds'}: {options.workdir}")
        return EXIT_DONE
    workdir = options.workdir if own is None else folder_of(own, options.workdir)
    cell = None if own is None else as_json(own, len(cells))
    result = run_training(config, workdir, cell=cell, from_step=options.from_step, started=options.started, **how)
    if not result.progress.finished:
        return _interrupted(f"the same command in the same --workdir {options.workdir}")
    if jax.process_index() == 0:
        print(f"trained {result.progress.step:,} steps in {result.progress.seconds:,.0f} s: {workdir}")
        print(told(result.clock))
    return EXIT_DONE


def _runs(options: argparse.Namespace) -> int:
    import datetime

    from rich.console import Console

    from coconut.commands.runs import list_runs, print_runs, to_json

    runs = list_runs(options.folder)
    if options.json:
        print(json.dumps(to_json(runs), indent=1))
    else:
        print_runs(runs, options.folder, Console(), datetime.datetime.now(datetime.UTC))
    return EXIT_DONE


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from coconut.commands.compare import compare_runs, print_comparison

    content = compare_runs(options.workdirs, options.output, axis=options.axis, loss=options.loss)
    print_comparison(content, Console())
    if options.output is not None:
        print(f"wrote {options.output}/learning_curves.png and .svg, compare.md and compare.json")
    return EXIT_DONE


def _table_of(options: argparse.Namespace) -> int:
    """The commands that make a table and nothing else."""
    from coconut.commands.mix import mix_command
    from coconut.commands.numerics import numerics_command
    from coconut.commands.plan.command import plan_command

    commands = {"mix": mix_command, "numerics": numerics_command, "plan": plan_command}
    _print_markdown(commands[options.command](options))
    return EXIT_DONE


def _evaluate(options: argparse.Namespace) -> int:
    import jax
    from rich.console import Console

    from coconut.commands.distributed import join
    from coconut.commands.evaluate import EvaluateConfig, describe, evaluate_workdir
    from coconut.commands.evaluate_pretrained import PretrainedConfig, evaluate_pretrained
    from coconut.commands.evaluate_samples import SamplesConfig, policy_from
    from coconut.latent.halting import HaltingConfig
    from coconut.latent.soft_thinking import SoftThinkingConfig
    from coconut.latent.swi_reasoning import SwiReasoningConfig
    from coconut.sharding import make_mesh
    from coconut.storage import write_atomically
    from coconut.training.config import from_json
    from coconut.training.loading import Numerics

    soft = {"soft_thinking": SoftThinkingConfig, "swi_reasoning": SwiReasoningConfig}.get(options.method)
    samples = None
    if options.samples is not None:
        samples = SamplesConfig(
            count=options.samples,
            policy=policy_from(dict(options.policy)),
            budgets=options.budgets,
            pass_at=options.pass_at,
            scorer=options.scorer,
            beams=options.beams,
            candidates=options.candidates,
        )
    config = EvaluateConfig(
        split=options.split or (None if options.pretrained else options.data) or "test",
        task=None if options.pretrained else options.task,
        which=options.which if options.step is None else options.step,
        verify=not options.skip_verification,
        thoughts=(0,) if options.thoughts is None else tuple(options.thoughts),
        forced=options.force,
        batch_size=options.batch_size,
        halting=from_json(HaltingConfig, dict(options.halting), "--halting") if options.halting else None,
        halting_thresholds=options.halting_thresholds,
        soft_thinking=from_json(soft, dict(options.thinking), "--thinking") if soft else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        samples=samples,
        numerics=Numerics(dtype=options.dtype, param_dtype=options.param_dtype),
        seed=options.seed,
        limit=options.limit,
        interventions=options.interventions,
        allow_overlap=options.allow_overlap,
        answers_file=options.answers,
    )
    if options.plot is not None and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise CoconutError(f"--plot {options.plot}: must be a file.png, .svg or .pdf")
    join(options)
    mesh, console = make_mesh(options.mesh), Console(stderr=True)
    if options.pretrained is None:
        result = evaluate_workdir(options.workdir, config, mesh=mesh, console=console)
    else:
        whom = {"prompt": options.prompt, "max_new_tokens": options.max_new_tokens}
        pretrained = PretrainedConfig(
            folder=options.pretrained,
            task=options.task,
            data=options.data,
            method="no_cot" if options.method == "no_cot" else "cot",
            **{name: value for name, value in whom.items() if value is not None},
        )
        result = evaluate_pretrained(pretrained, config, mesh=mesh, console=console)
    if jax.process_index():
        return EXIT_DONE
    if options.output is not None:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    if options.plot is not None and result["samples"] is not None:
        from coconut.analysis.sample_plots import plot_samples
        from coconut.commands.evaluate_samples import curves_in

        plot_samples(result["samples"], curves_in(result["samples"]), options.plot)
    elif options.plot is not None:
        from coconut.analysis.plots import plot_accuracy_by_mean_thoughts

        plot_accuracy_by_mean_thoughts({result["halting"]["config"]["stop"]: result["halting"]["curve"]}, options.plot)
    _print_markdown(describe(result))
    return EXIT_DONE


def _lm_eval(options: argparse.Namespace) -> int:
    from rich.console import Console

    from coconut.commands.harness import CoconutLM  # First: it says what to install where the library is missing.
    from coconut.commands.lm_eval import HarnessConfig, describe, load_tasks, run_tasks
    from coconut.sharding import make_mesh
    from coconut.storage import write_atomically

    config = HarnessConfig(
        tasks=options.tasks,
        include=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        settings=dict(options.gen_kwargs),
        seed=options.seed,
        samples_file=options.samples,
    )
    mesh, tasks = make_mesh(options.mesh), load_tasks(config)
    model = CoconutLM(
        workdir=options.workdir,
        pretrained=options.pretrained,
        which=options.which if options.step is None else options.step,
        verify=not options.skip_verification,
        thoughts=options.thoughts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        truncate=options.truncate,
        mesh=mesh,
        console=Console(stderr=True),
    )
    result = run_tasks(model, config, tasks)
    if options.output is not None:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    _print_markdown(describe(result))
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from coconut.commands.inspect.command import KINDS, InspectConfig, describe, inspect_workdir
    from coconut.sharding import make_mesh

    config = InspectConfig(
        output=options.output,
        split=options.split,
        which=options.which if options.step is None else options.step,
        verify=not options.skip_verification,
        questions=options.questions,
        batch_size=options.batch_size,
        top=options.top,
        interventions=options.interventions or KINDS,
        beyond=options.beyond,
        allow_overlap=options.allow_overlap,
        seed=options.seed,
    )
    command = shlex.join(["coconut", *sys.argv[1:]])
    mesh, console = make_mesh(options.mesh), Console(stderr=True)
    content = inspect_workdir(options.workdir, config, command=command, mesh=mesh, console=console)
    _print_markdown(describe(content, options.output))
    return EXIT_DONE


def _table(options: argparse.Namespace) -> int:
    from rich.console import Console

    from coconut.commands.table.budget import Budget
    from coconut.commands.table.command import make_table
    from coconut.commands.table.grid import TableConfig
    from coconut.commands.table.report import describe

    config = TableConfig(
        task=options.task,
        methods=options.methods,
        seeds=read_seeds(options.seeds),
        budget=Budget.parse(options.budget),
        output=options.output,
        configs=tuple(options.config),
        bindings=tuple(options.gin_binding),
    )
    content = make_table(config, console=Console(stderr=True))
    if not content["finished"]:
        return _interrupted(f"the same command with the same --output {options.output}")
    _print_markdown(describe(content))
    return EXIT_FAILED if content["failures"] else EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    from coconut.commands.export import export

    which = options.which if options.step is None else options.step
    export(options.workdir, options.output, which, verify=not options.skip_verification, peft=options.peft)
    print(f"wrote {options.output}")
    return EXIT_DONE


def _generate(options: argparse.Namespace) -> int:
    from coconut.commands.generate import answer_question, describe, read_questions
    from coconut.latent.generate import SamplingConfig
    from coconut.training.loading import load_model

    questions = [] if options.question is not None else read_questions()
    which = options.which if options.step is None else options.step
    run, model, progress = load_model(options.workdir, which, verify=not options.skip_verification)
    sampling = SamplingConfig(max_new_tokens=run.config.sampling.max_new_tokens, temperature=options.temperature)

    def reply(question: str) -> None:
        answer = answer_question(
            run,
            model,
            progress,
            question,
            thoughts=options.thoughts,
            forced=options.force,
            sampling=sampling,
            seed=options.seed,
            top=options.top,
        )
        print(describe(answer))

    if options.question is not None:
        reply(options.question)
        return EXIT_DONE
    for question in questions:
        try:
            reply(question)
        except CoconutError as error:
            print(f"coconut generate: {error}", file=sys.stderr)
    return EXIT_DONE


def _checkpoint(options: argparse.Namespace) -> int:
    from coconut.commands.checkpoint import list_checkpoints, show_checkpoint, verify_checkpoints

    if options.action == "list":
        _print_markdown(list_checkpoints(options.workdir))
    elif options.action == "show":
        print(json.dumps(show_checkpoint(options.workdir, options.step), indent=1))
    else:
        table, whole = verify_checkpoints(options.workdir)
        _print_markdown(table)
        return EXIT_DONE if whole else EXIT_BAD_INPUT
    return EXIT_DONE


def _replay(options: argparse.Namespace) -> int:
    from coconut.storage import write_atomically
    from coconut.training.divergence import describe, replay

    result = replay(options.bundle)
    if options.output is not None:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    print(describe(result))
    return EXIT_DONE


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = MappingProxyType(
    {
        "quickstart": _quickstart,
        "data": _data,
        "train": _train,
        "runs": _runs,
        "compare": _compare,
        "plan": _table_of,
        "evaluate": _evaluate,
        "lm-eval": _lm_eval,
        "numerics": _table_of,
        "mix": _table_of,
        "inspect": _inspect,
        "table": _table,
        "export": _export,
        "generate": _generate,
        "checkpoint": _checkpoint,
        "replay": _replay,
    }
)


def _print_markdown(text: str) -> None:
    """In lines that fit on a terminal, as it is into a file or pipe."""
    from rich.console import Console

    from coconut.commands.terminal import print_markdown

    print_markdown(text, Console())


def _interrupted(how: str) -> int:
    print(f"interrupted; everything is saved. Go on with: {how}", file=sys.stderr)
    return EXIT_INTERRUPTED


def run() -> None:
    """The console command."""
    # One line is enough: XLA's own start-up messages help nobody here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_compiled_programs()
    keep_freed_memory()
    try:
        with interruption.interruptible():
            try:
                code = main()
            except Exception as error:
                # A library may make an error of its own of the exception that a signal raises in the middle of it.
                interruption.check(error)
                raise
    except KeyboardInterrupt as interrupt:
        while_doing = f" ({interrupt})" if str(interrupt) else ""
        print(f"interrupted{while_doing}; what was saved before is still there", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Libraries' threads may be at work still, and crash where Python takes itself down around them.
        os._exit(EXIT_INTERRUPTED)
    sys.exit(code)


if __name__ == "__main__":
    run()
