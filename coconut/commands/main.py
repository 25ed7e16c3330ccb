"""The ``coconut`` command. Each subcommand is a plain function of another module of this package."""

import argparse
import ast
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markdown import Markdown

from coconut.commands.distributed import add_flags, join
from coconut.commands.plan.command import add_plan_flags, plan_command
from coconut.errors import CoconutError, DivergedError
from coconut.storage import StoragePath, parse_path, write_atomically

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; the process exits with what this returns.

    Returns:
      0 done; 2 bad input (one message on standard error); 3 training diverged (likewise); 130 interrupted, with a
      checkpoint to go on from. Any other failure is a Python traceback and 1.
    """
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Orbax and grain report every step of a save through absl.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return options.run(options, Console())
    except CoconutError as error:
        print(f"coconut {options.command}: {error}", file=sys.stderr)
        return EXIT_DIVERGED if isinstance(error, DivergedError) else EXIT_BAD_INPUT


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, in which ``--gin.NAME=VALUE`` (the t5x convention) is a binding."""
    return _parser().parse_args([re.sub(r"^--gin\.([^=]+)=", r"--gin_binding=\1=", word) for word in arguments])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coconut", description="Reasoning in continuous thoughts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    quickstart = command("quickstart", _quickstart, "train Coconut and its controls on small graphs and compare them")
    quickstart.add_argument("--outdir", type=Path, default=Path("quickstart"), help="where everything goes")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of parameters and data order")
    quickstart.add_argument("--smoke", action="store_true", help="tiny sizes that learn nothing: a check")

    data = command("data", _data, "questions, their splits and their shortcuts")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    generate = actions.add_parser("generate", help="write generated questions to a file", allow_abbrev=False)
    generate.add_argument("--task", default="prosqa", help="name of the task")
    generate.add_argument("--count", type=int, required=True, help="number of questions")
    generate.add_argument("--seed", type=int, default=0, help="seed of the questions")
    generate.add_argument("--negatives", choices=("official", "depth_matched"), help="ProsQA: the wrong options")
    generate.add_argument("--form", choices=("text", "graph"), help="ProsQA: sentences, or graph symbols")
    generate.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="any option of the task")
    generate.add_argument("--output", type=Path, required=True, help="a .json or .jsonl file")
    prepare = actions.add_parser("prepare", help="write splits that share no question", allow_abbrev=False)
    prepare.add_argument("--task", required=True, help="name of the task")
    for split in ("train", "validation", "test"):
        text = "a file in the task's own format, part of one (questions.json[:9000]), or a number to generate"
        prepare.add_argument(f"--{split}", type=_count_or_file, required=split == "train", default=0, help=text)
    prepare.add_argument("--seed", type=int, default=0, help="seed of generated questions")
    prepare.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the generator")
    prepare.add_argument("--drop_without_steps", action="store_true", help="drop training questions without steps")
    prepare.add_argument("--output", type=Path, required=True, help="folder for train.json, validation.json, test.json")
    stats = actions.add_parser("stats", help="what can be counted in a file, and each known shortcut's accuracy")
    show = actions.add_parser("show", help="the first questions of a file")
    show.add_argument("--count", type=int, default=3)
    for action in (stats, show):
        action.add_argument("file", type=Path, help="a file of questions, or part of one: questions.json[9000:]")
        action.add_argument("--task", help="the task in whose own format the file is; the field's JSON if not given")

    train = command("train", _train, "train one run; started again with the same workdir it goes on")
    train.add_argument("--gin_file", action="append", required=True, metavar="FILE", help="repeatable; later ones win")
    train.add_argument(
        "--gin_binding", action="append", default=[], metavar="NAME=VALUE", help="also written --gin.NAME=VALUE"
    )
    train.add_argument(
        "--workdir", type=_workdir, help="where checkpoints, metrics and the resolved config go: a folder, or gs://..."
    )
    train.add_argument("--dry_run", action="store_true", help="resolve, build abstractly, print the costs, and exit")
    train.add_argument("--drop_too_long", action="store_true", help="drop examples that do not fit the positions")
    train.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    add_flags(train)

    plan = command("plan", _plan, "what a run needs of a slice of chips and how fast it could be there, without it")
    plan.add_argument("--gin_file", action="append", required=True, metavar="FILE", help="as for train")
    plan.add_argument("--gin_binding", action="append", default=[], metavar="NAME=VALUE", help="--gin.NAME=VALUE")
    plan.add_argument("--output", type=_workdir, help="write the result as JSON")
    add_plan_flags(plan)

    evaluate = command("evaluate", _evaluate, "accuracy of a trained workdir, its price, and without its thoughts")
    evaluate.add_argument("--workdir", type=_workdir, required=True)
    evaluate.add_argument("--split", default="test", help="test, validation, or a file of questions")
    evaluate.add_argument("--which", choices=("best", "latest"), default="best", help="which checkpoint")
    evaluate.add_argument(
        "--thoughts", type=int, action="append", default=None, metavar="K", help="also with K thoughts; repeatable (0)"
    )
    evaluate.add_argument("--force", default="", metavar="TEXT", help="text every answer has to go on from")
    evaluate.add_argument("--limit", type=int, help="the first so many questions")
    evaluate.add_argument("--batch_size", type=int, help="rows decoded together")
    evaluate.add_argument("--output", type=_workdir, help="write the result as JSON")
    evaluate.add_argument("--answers", type=_workdir, help="write every answer as JSON lines")
    add_flags(evaluate)

    export = command("export", _export, "write a trained workdir as a checkpoint for Hugging Face's libraries")
    export.add_argument("--workdir", type=_workdir, required=True)
    export.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    export.add_argument("--which", choices=("best", "latest"), default="best", help="which checkpoint")

    ask = command("generate", _generate, "ask a trained workdir a question; its thoughts are shown")
    ask.add_argument("--workdir", type=_workdir, required=True, help="a run's, or a quickstart's")
    ask.add_argument("--question", help="asked on the terminal, until an empty line, if not given")
    ask.add_argument("--which", choices=("best", "latest"), default="best", help="which checkpoint")
    ask.add_argument("--thoughts", type=int, metavar="K", help="number of thoughts; the trained number if not given")
    ask.add_argument("--force", default="", metavar="TEXT", help="text the answer has to go on from")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    ask.add_argument("--seed", type=int, default=0, help="seed of the draws")
    ask.add_argument("--top", type=int, default=3, help="tokens shown for each thought")
    return parser


def _quickstart(options: argparse.Namespace, console: Console) -> int:
    from coconut.commands.quickstart import QuickstartConfig, quickstart, table

    config = QuickstartConfig.smoke(options.seed) if options.smoke else QuickstartConfig(seed=options.seed)
    results = quickstart(options.outdir, config=config, console=Console(stderr=True))
    if not results["finished"]:
        return _interrupted(f"coconut quickstart --outdir {options.outdir} --seed {options.seed}")
    _print_markdown(table(results), console)
    return EXIT_DONE


def _data(options: argparse.Namespace, console: Console) -> int:
    from coconut.commands.data import generate_file, prepare, prepare_report, show, statistics_report
    from coconut.datasets import DataConfig

    if options.action == "generate":
        values = dict(_named_value(text) for text in options.option)
        values |= {k: getattr(options, k) for k in ("negatives", "form") if getattr(options, k) is not None}
        examples = generate_file(options.output, options.task, options.count, options.seed, values)
        console.print(f"wrote {len(examples):,} questions to {options.output}", highlight=False)
    elif options.action == "prepare":
        config = DataConfig(
            task=options.task,
            train=options.train,
            validation=options.validation,
            test=options.test,
            options=dict(_named_value(text) for text in options.option),
            seed=options.seed,
        )
        splits = prepare(options.output, config, drop_without_steps=options.drop_without_steps)
        _print_markdown(prepare_report(splits), console)
    elif options.action == "stats":
        _print_markdown(statistics_report(options.file, options.task), console)
    else:
        print(show(options.file, options.count, options.task))
    return EXIT_DONE


def _train(options: argparse.Namespace, console: Console) -> int:
    from coconut.commands.configuration import resolve_run
    from coconut.commands.train import dry_run, print_dry_run, run_training
    from coconut.sharding import MeshConfig, make_mesh

    bindings = [*options.gin_binding, *(["DataConfig.drop_too_long = True"] if options.drop_too_long else [])]
    config, mesh_config = resolve_run(options.gin_file, bindings), MeshConfig.parse(options.mesh)
    if options.workdir is None and not options.dry_run:
        raise CoconutError("--workdir is missing (or --dry_run, which needs none)")
    join(options)
    mesh = make_mesh(mesh_config)
    if options.workdir is None or options.dry_run:
        print_dry_run(*dry_run(config, mesh), console)
        return EXIT_DONE
    result = run_training(
        config, options.workdir, mesh=mesh, tensorboard=options.tensorboard, console=Console(stderr=True)
    )
    if not result.progress.finished:
        return _interrupted(f"the same command in the same --workdir {options.workdir}")
    if jax.process_index() == 0:
        console.print(f"trained {result.progress.step:,} steps in {result.progress.seconds:,.0f} s: {options.workdir}")
    return EXIT_DONE


def _plan(options: argparse.Namespace, console: Console) -> int:
    _print_markdown(plan_command(options), console)
    return EXIT_DONE


def _evaluate(options: argparse.Namespace, console: Console) -> int:
    from coconut.commands.evaluate import EvaluateConfig, describe, evaluate_workdir
    from coconut.sharding import MeshConfig, make_mesh

    config = EvaluateConfig(
        split=options.split,
        which=options.which,
        thoughts=(0,) if options.thoughts is None else tuple(options.thoughts),
        forced=options.force,
        batch_size=options.batch_size,
        limit=options.limit,
        answers_file=options.answers,
    )
    mesh_config = MeshConfig.parse(options.mesh)
    join(options)
    result = evaluate_workdir(options.workdir, config, mesh=make_mesh(mesh_config), console=Console(stderr=True))
    if jax.process_index():
        return EXIT_DONE
    if options.output is not None:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    _print_markdown(describe(result), console)
    return EXIT_DONE


def _export(options: argparse.Namespace, console: Console) -> int:
    from coconut.commands.export import export

    export(options.workdir, options.output, options.which)
    console.print(f"wrote {options.output}", highlight=False)
    return EXIT_DONE


def _generate(options: argparse.Namespace, console: Console) -> int:
    from coconut.commands.generate import answer_question, describe, load
    from coconut.latent.generate import SamplingConfig

    run, model, progress = load(options.workdir, options.which)
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
    while question := console.input("question (empty to end): " if sys.stdin.isatty() else "").strip():
        try:
            reply(question)
        except CoconutError as error:
            print(f"coconut generate: {error}", file=sys.stderr)
    return EXIT_DONE


def _workdir(text: str) -> StoragePath:
    try:
        return parse_path(text)
    except CoconutError as error:
        # Argparse would say no more of a ValueError than that there was one.
        raise argparse.ArgumentTypeError(str(error)) from error


def _count_or_file(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _named_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CoconutError(f"--option {text!r}: must be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _print_markdown(text: str, console: Console) -> None:
    """Rendered on a terminal, as it is into a file or pipe."""
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text)


def _interrupted(how: str) -> int:
    print(f"interrupted; everything is saved. Go on with: {how}", file=sys.stderr)
    return EXIT_INTERRUPTED


def run() -> None:
    """The console command."""
    # One line is enough: XLA's own start-up messages help nobody here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        code = main()
    except (KeyboardInterrupt, EOFError):
        code = EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    run()
