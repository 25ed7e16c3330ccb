"""The flags of ``coconut``. Nothing heavy is imported here, so that ``--help`` and bad flags are answered at once."""

import argparse
import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coconut.commands.flags_of_evaluate import check_evaluate
from coconut.commands.flags_of_lm_eval import add_lm_eval, check_lm_eval
from coconut.commands.flags_of_numerics import add_numbers, add_numerics, check_numerics
from coconut.commands.flags_of_runs import add_compare, add_mix, add_runs, add_sweep, check_mix, check_sweep
from coconut.commands.hints import hint
from coconut.commands.plan.chips import HERE, read_topology
from coconut.commands.shipped import version
from coconut.errors import CoconutError
from coconut.mesh import MeshConfig
from coconut.storage_path import parse_path

TIMEOUT = 300
"""Seconds that a process waits for the others of its run, if it is not told."""
A_RUN = "a run's, or a quickstart's: its Coconut run"
A_SOURCE = (
    "a JSON, JSONL, Parquet or Arrow file, part of one (questions.json[9000:]), or a data set, "
    "hf:OWNER/NAME[@REVISION][,config=CONFIG][,split=SPLIT]"
)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, in which ``--gin.NAME=VALUE`` (the t5x convention) is a binding.

    A flag that is wrong by itself ends the process with exit code 2; `check_together` looks at them together.
    """
    parser = _parser()
    bindings_marked = [re.sub(r"^--gin\.([^=]+)=", r"--gin_binding=\1=", word) for word in arguments]
    options, unknown = parser.parse_known_args(bindings_marked)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint(unknown[0], vars(options))}")
    return options


def check_together(options: argparse.Namespace) -> None:
    """Looks for flags that contradict each other.

    Raises:
      CoconutError: naming them.
    """
    if options.command in ("train", "evaluate"):
        _check_processes(options)
    if options.command == "evaluate":
        check_evaluate(options)
    if options.command == "lm-eval":
        check_lm_eval(options)
    if options.command in (own := {"numerics": check_numerics, "mix": check_mix}):
        own[options.command](options)
    if options.command == "train":
        check_sweep(options)
    if options.command == "train" and options.workdir is None and not options.dry_run:
        raise CoconutError("--workdir is missing (or --dry_run, which needs none)")
    if options.command == "train" and options.dry_run:
        given = {
            f"--allow {', '.join(options.allow)}": bool(options.allow),
            f"--from_step {options.from_step}": options.from_step is not None,
            "--skip_verification": options.skip_verification,
        }
        if meaningless := [flag for flag, is_given in given.items() if is_given]:
            raise CoconutError(f"{meaningless[0]}: --dry_run goes on with no run, give one or the other")
    if options.command == "plan" and options.answers < 0:
        raise CoconutError(f"--answers {options.answers}: must be at least 0")


def _check_processes(options: argparse.Namespace) -> None:
    explicit = (options.coordinator, options.num_processes, options.process_id)
    if explicit == (None, None, None):
        return
    if options.distributed:
        raise CoconutError("--distributed takes the processes from the environment: give it or --coordinator, not both")
    if None in explicit:
        raise CoconutError("--coordinator, --num_processes and --process_id belong together: give all three")
    if not 0 <= options.process_id < options.num_processes:
        raise CoconutError(f"--process_id {options.process_id}: must be from 0 to {options.num_processes - 1}")
    _, colon, port = options.coordinator.rpartition(":")
    if not colon or not port.isdecimal():
        raise CoconutError(f"--coordinator {options.coordinator!r}: must be HOST:PORT")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coconut", description="Reasoning in continuous thoughts.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    quickstart = command("quickstart", "train Coconut and its controls on small graphs and compare them")
    quickstart.add_argument("--outdir", type=Path, default=Path("quickstart"), help="where everything goes")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of parameters and data order")
    quickstart.add_argument("--smoke", action="store_true", help="tiny sizes that learn nothing: a check")

    _add_data_actions(command("data", "questions, their splits and their shortcuts"))

    train = command("train", "train one run; started again with the same workdir it goes on")
    _add_imports(train)
    train.add_argument("--gin_file", action="append", required=True, metavar="FILE", help="repeatable; later ones win")
    train.add_argument(
        "--gin_binding", action="append", default=[], metavar="NAME=VALUE", help="also written --gin.NAME=VALUE"
    )
    train.add_argument(
        "--workdir", type=_path, help="where checkpoints, metrics and the resolved config go: a folder, or gs://..."
    )
    add_sweep(train)
    train.add_argument("--dry_run", action="store_true", help="resolve, build abstractly, print the costs, and exit")
    train.add_argument("--drop_too_long", action="store_true", help="drop examples that do not fit the positions")
    _add_skip_bad_records(train)
    train.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on with another value of a field that changes the numbers, such as optimizer.learning_rate",
    )
    train.add_argument(
        "--from_step", type=int, metavar="N", help="go back to the checkpoint of this step; later ones are set aside"
    )
    _add_verification(train)
    train.add_argument(
        "--tensorboard", action="store_true", help="also write TensorBoard events, as TrackingConfig.writers names them"
    )
    _add_mesh(train, "such as data=2,fsdp=4,tensor=2; every device its own rows")
    _add_processes(train)

    add_runs(command("runs", "every run below a folder: whether it runs, how far it is, how good"), _path)
    add_compare(command("compare", "runs side by side: configs, metrics, learning curves with bands over seeds"), _path)

    plan = command("plan", "what a run needs of a slice of chips and how fast it could be there, without it")
    _add_imports(plan)
    plan.add_argument("--gin_file", action="append", required=True, metavar="FILE", help="as for train")
    plan.add_argument("--gin_binding", action="append", default=[], metavar="NAME=VALUE", help="--gin.NAME=VALUE")
    plan.add_argument("--output", type=_path, help="write the result as JSON")
    plan.add_argument(
        "--topology", type=_topology, required=True, help=f"such as v5p:4x4x4; {HERE!r} for the devices at hand"
    )
    _add_mesh(plan, "such as fsdp=64; every chip its own rows")
    plan.add_argument("--columns", type=int, default=512, help="of a row: prompt, thoughts and suffix")
    plan.add_argument("--suffix", type=int, default=64, help="columns behind the thoughts, which are scored")
    plan.add_argument("--thoughts", type=int, metavar="K", help="those of the curriculum's last stage if not given")
    plan.add_argument(
        "--answers", type=int, default=64, metavar="ROWS", help="also plan generation of so many answers at once; 0: no"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="try meshes, or the one given, with other microbatches and remat; rank them; each compiles for minutes",
    )

    evaluate = command("evaluate", "accuracy of a trained workdir, its price, and without its thoughts")
    _add_imports(evaluate)
    evaluate.add_argument("--workdir", type=_path, help=A_RUN)
    evaluate.add_argument(
        "--pretrained", metavar="FOLDER", help="instead: a checkpoint of Hugging Face's layout, or a repository"
    )
    evaluate.add_argument("--task", help="the task that reads and judges --data; a run's own if not given")
    evaluate.add_argument("--data", metavar="SOURCE", help=f"questions to ask: {A_SOURCE}")
    evaluate.add_argument(
        "--prompt",
        metavar="TEXT",
        help="with --pretrained: what is asked, with {question} in it; its special tokens may be spelled",
    )
    evaluate.add_argument("--max_new_tokens", type=int, metavar="N", help="with --pretrained: of an answer (256)")
    evaluate.add_argument(
        "--method",
        choices=("cot", "no_cot", "soft_thinking", "swi_reasoning"),
        help="soft thoughts in the place of written reasoning, or by turns with it; with --pretrained also cot (if "
        "not given) or no_cot, which forces the mark of an answer",
    )
    evaluate.add_argument(
        "--thinking",
        type=_named_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of soft_thinking or swi_reasoning, such as temperature=0.6 or end='</think>'; repeatable",
    )
    evaluate.add_argument("--split", help="of a run: test (if not given), validation, or a source, as for --data")
    _add_which(evaluate)
    evaluate.add_argument(
        "--thoughts", type=int, action="append", default=None, metavar="K", help="also with K thoughts; repeatable (0)"
    )
    evaluate.add_argument(
        "--halting",
        type=_named_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="when a block of thoughts is over: stop=entropy, threshold=0.5 and most=12, each its own flag",
    )
    evaluate.add_argument(
        "--halting_thresholds",
        type=_numbers,
        default=(),
        metavar="T,T,...",
        help="accuracy by mean thoughts for each of these thresholds of the stop (stop=count: numbers of thoughts)",
    )
    evaluate.add_argument("--plot", type=Path, help="a picture of that curve, or of the samples': png, svg or pdf")
    evaluate.add_argument("--temperature", type=float, help="0 takes the most likely token; the run's own if not given")
    evaluate.add_argument("--top_k", type=int, metavar="K", help="draw among the K most likely tokens")
    evaluate.add_argument("--top_p", type=float, metavar="P", help="draw among the most likely tokens of share P")
    evaluate.add_argument(
        "--min_p", type=float, metavar="P", help="draw tokens at least P times as likely as the first"
    )
    evaluate.add_argument(
        "--samples", type=int, metavar="N", help="also draw N samples of each question: pass@k, votes, the best of them"
    )
    evaluate.add_argument(
        "--policy",
        type=_named_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="how samples' thoughts are drawn: kind=gaussian, an option of the kind such as share=0.1, "
        "learnt_stop=True, least=1; repeatable",
    )
    evaluate.add_argument(
        "--budgets",
        type=_whole_numbers,
        default=(),
        metavar="T,T,...",
        help="draw the samples with each of these numbers of thoughts, the most where the stop is learnt",
    )
    evaluate.add_argument(
        "--pass_at",
        type=_whole_numbers,
        default=(),
        metavar="K,K,...",
        help="also measure K of the samples (1,2,4,...)",
    )
    evaluate.add_argument(
        "--scorer", type=_path, metavar="RUN", help="also the best of the samples by the scorer that this run trained"
    )
    evaluate.add_argument("--beams", type=int, metavar="B", help="with a scorer, also a beam search with B beams")
    evaluate.add_argument("--candidates", type=int, metavar="C", help="thoughts drawn behind each beam")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the draws")
    evaluate.add_argument(
        "--interventions",
        type=_names,
        default=(),
        metavar="NAME,...",
        help="also with altered thoughts: removed, zero, noise, mean, mean_of_all, other, permuted, repeated; intact",
    )
    evaluate.add_argument("--force", default="", metavar="TEXT", help="text every answer has to go on from")
    evaluate.add_argument(
        "--allow_overlap", action="store_true", help="answer a file's questions although some were trained on"
    )
    evaluate.add_argument("--limit", type=int, help="the first so many questions")
    evaluate.add_argument("--batch_size", type=int, help="rows decoded together")
    add_numbers(evaluate)
    evaluate.add_argument("--output", type=_path, help="write the result as JSON")
    evaluate.add_argument("--answers", type=_path, help="write every answer as JSON lines")
    _add_mesh(evaluate, "such as data=2,fsdp=4,tensor=2; every device its own rows")
    _add_processes(evaluate)

    harness = command("lm-eval", "tasks of EleutherAI's lm-evaluation-harness, with thoughts and without")
    _add_imports(harness)
    add_lm_eval(harness, _path, _named_value)
    _add_which(harness)
    _add_mesh(harness, "such as data=2,fsdp=4,tensor=2; every device its own rows")

    numerics = command("numerics", "how many answers of a trained workdir change with dtype, batch size and devices")
    _add_imports(numerics)
    add_numerics(numerics, _path, _mesh, _names, _whole_numbers)
    _add_which(numerics)

    mix = command("mix", "runs that trained scales of singular values, each alone and mixed at test time")
    _add_imports(mix)
    add_mix(mix, _path, _numbers)
    _add_which(mix)

    inspect = command("inspect", "look into the thoughts of a trained workdir: a page, figures, arrays")
    _add_imports(inspect)
    inspect.add_argument("--workdir", type=_path, required=True, help=A_RUN)
    inspect.add_argument("--output", type=Path, required=True, help="a folder for the page and all else")
    inspect.add_argument("--split", default="test", help="test (if not given), validation, or a file of questions")
    inspect.add_argument("--questions", type=int, default=50, metavar="N", help="the first so many")
    _add_which(inspect)
    inspect.add_argument("--batch_size", type=int, help="rows run together")
    inspect.add_argument("--top", type=int, default=5, help="tokens shown of each thought")
    inspect.add_argument(
        "--interventions",
        type=_names,
        default=(),
        metavar="NAME,...",
        help="what is done to thoughts, of removed, zero, noise, mean, mean_of_all, other, permuted, repeated (all)",
    )
    inspect.add_argument(
        "--allow_overlap", action="store_true", help="look at a file's questions although some were trained on"
    )
    inspect.add_argument("--beyond", type=int, default=2, metavar="N", help="thoughts behind the last one to try")
    inspect.add_argument("--seed", type=int, default=0, help="of what interventions draw")
    _add_mesh(inspect, "such as data=2; every device its own rows")

    table = command("table", "train and evaluate methods alike, with several seeds, and compare them in one table")
    _add_imports(table)
    table.add_argument("--task", required=True, help="name of the task")
    table.add_argument(
        "--methods", type=_names, required=True, metavar="NAME,...", help="gin files of gin_configs/methods, or paths"
    )
    table.add_argument("--seeds", required=True, metavar="N,...", help="of parameters and data order")
    table.add_argument(
        "--budget", required=True, metavar="N", help="of each run: 2000steps, or 10minutes of training, in all stages"
    )
    table.add_argument("--output", type=Path, required=True, help="where everything goes; a table there goes on")
    table.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="gin files of what all methods share; gin_configs/runs/TASK.gin if not given",
    )
    table.add_argument("--gin_binding", action="append", default=[], metavar="NAME=VALUE", help="--gin.NAME=VALUE")

    export = command("export", "write a trained workdir as a checkpoint for Hugging Face's libraries")
    _add_imports(export)
    export.add_argument("--workdir", type=_path, required=True, help=A_RUN)
    export.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    export.add_argument("--peft", action="store_true", help="write a run's adapters alone, for PEFT, not merged")
    _add_which(export)

    ask = command("generate", "ask a trained workdir a question; its thoughts are shown")
    _add_imports(ask)
    ask.add_argument("--workdir", type=_path, required=True, help=A_RUN)
    ask.add_argument("--question", help="asked on the terminal, until an empty line, if not given")
    _add_which(ask)
    ask.add_argument("--thoughts", type=int, metavar="K", help="number of thoughts; the trained number if not given")
    ask.add_argument("--force", default="", metavar="TEXT", help="text the answer has to go on from")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    ask.add_argument("--seed", type=int, default=0, help="seed of the draws")
    ask.add_argument("--top", type=int, default=3, help="tokens shown for each thought")

    checkpoint = command("checkpoint", "the checkpoints of a workdir: which there are, and whether they are whole")
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("list", "each with its stage, accuracy and size"),
        ("verify", "compare every file with what was saved; exits with 2 where one is not"),
        ("show", "what one says of itself, as JSON"),
    ):
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        action.add_argument("workdir", type=_path)
        if name == "show":
            action.add_argument("--step", type=int, metavar="N", help="the latest that is whole if not given")

    replay = command("replay", "do the step again that a diverged run ended with, and look for what is not finite")
    _add_imports(replay)
    replay.add_argument("bundle", type=_path, help="WORKDIR/diverged/STEP")
    replay.add_argument("--output", type=_path, help="write the result as JSON")
    return parser


def _add_which(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument("--which", choices=("best", "latest"), default="best", help="which checkpoint")
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step instead")
    _add_verification(command)


def _add_verification(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--skip_verification", action="store_true", help="do not compare the checkpoint's files with their SHA-256"
    )


def _add_imports(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--import",
        dest="imports",
        type=_module,
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of your own that registers a task, a method, a feedback, a reward, a metrics writer; repeatable",
    )


def _module(text: str) -> str:
    if not all(part.isidentifier() for part in text.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a module: my_module, without .py")
    return text


def _add_data_actions(data: argparse.ArgumentParser) -> None:
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    generate = actions.add_parser("generate", help="write generated questions to a file", allow_abbrev=False)
    generate.add_argument("--task", default="prosqa", help="name of the task")
    generate.add_argument("--count", type=int, required=True, help="number of questions")
    generate.add_argument("--seed", type=int, default=0, help="seed of the questions")
    generate.add_argument("--negatives", choices=("official", "depth_matched"), help="ProsQA: the wrong options")
    generate.add_argument("--form", choices=("text", "graph"), help="ProsQA: sentences, or graph symbols")
    _add_task_options(generate, "any option of the task")
    generate.add_argument("--output", type=Path, required=True, help="a .json or .jsonl file")
    prepare = actions.add_parser("prepare", help="write splits that share no question", allow_abbrev=False)
    prepare.add_argument("--task", required=True, help="name of the task")
    for split in ("train", "validation", "test"):
        text = f"{A_SOURCE}; in the task's own format or the field's; or a number to generate"
        prepare.add_argument(f"--{split}", type=_count_or_file, required=split == "train", default=0, help=text)
    prepare.add_argument("--seed", type=int, default=0, help="seed of generated questions")
    _add_task_options(prepare, "of the generator")
    _add_skip_bad_records(prepare)
    prepare.add_argument("--drop_without_steps", action="store_true", help="drop training questions without steps")
    prepare.add_argument("--output", type=Path, required=True, help="folder for train.json, validation.json, test.json")
    stats = actions.add_parser("stats", help="what can be counted in a file, and each known shortcut's accuracy")
    show = actions.add_parser("show", help="the first questions of a file")
    show.add_argument("--count", type=int, default=3)
    for action in (generate, prepare, stats, show):
        _add_imports(action)
    for action in (stats, show):
        action.add_argument("file", help=A_SOURCE)
        action.add_argument("--task", help="the task in whose own format the file is; the field's JSON if not given")


def _add_skip_bad_records(parser: argparse.ArgumentParser) -> None:
    text = "malformed records of each file to leave out, each logged; one more is an error"
    parser.add_argument("--skip_bad_records", type=int, metavar="N", help=text)


def _add_task_options(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--option", type=_named_value, action="append", default=[], metavar="NAME=VALUE", help=f"{text}; repeatable"
    )


def _add_mesh(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--mesh", type=_mesh, metavar="AXIS=SIZE,...", help=text)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes, as the environment says (TPU pod, Slurm)"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="one of several processes; where process 0 listens")
    parser.add_argument("--num_processes", type=int, help="with --coordinator: how many")
    parser.add_argument("--process_id", type=int, help="with --coordinator: which this is, from 0")
    parser.add_argument(
        "--distributed_timeout", type=int, default=TIMEOUT, metavar="SECONDS", help="how long to wait for the others"
    )


def _explained(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Argparse would say no more of a `CoconutError`, a ValueError, than that there was one."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except CoconutError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _read_named_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CoconutError(f"{text!r}: must be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _read_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise CoconutError(f"{text!r}: must be numbers with commas between them") from error


def _read_whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise CoconutError(f"{text!r}: must be whole numbers with commas between them") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _known_topology(text: str) -> str:
    if text != HERE:
        read_topology(text)
    return text


_path, _mesh = _explained(parse_path), _explained(MeshConfig.parse)
_named_value, _topology = _explained(_read_named_value), _explained(_known_topology)
_numbers, _whole_numbers = _explained(_read_numbers), _explained(_read_whole_numbers)


def _count_or_file(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
