"""Flags of ``coconut lm-eval``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coconut.errors import CoconutError

EXAMPLE = """Contexts are read word for word, and thoughts stand between a context and what follows it. A run that was
trained on bare questions wants a task that asks them so. For a file of questions {"question": ..., "answer": ...},
my_tasks/bare.yaml: task: bare; dataset_path: json; dataset_kwargs: {data_files: questions.jsonl}; test_split: train;
output_type: generate_until; generation_kwargs: {until: []}; doc_to_text: "{{question}}\\n"; doc_to_target:
"{{answer}}", each on a line of its own. Then: coconut lm-eval --workdir WORKDIR --include_path my_tasks --tasks bare"""


def add_lm_eval(
    command: argparse.ArgumentParser, path: Callable[[str], Any], named_value: Callable[[str], Any]
) -> None:
    """The flags, of which folders are read by ``path`` and settings by ``named_value``."""
    command.epilog = EXAMPLE
    command.add_argument("--workdir", type=path, help="a run's, or a quickstart's: its Coconut run")
    command.add_argument(
        "--pretrained", metavar="FOLDER", help="instead: a checkpoint of Hugging Face's layout, or a repository"
    )
    command.add_argument(
        "--tasks",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        required=True,
        metavar="NAME,...",
        help="tasks or groups of the library, such as gsm8k, or YAML files of your own",
    )
    command.add_argument("--include_path", type=Path, metavar="DIR", help="a folder of tasks of your own")
    command.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question; the task's own")
    command.add_argument("--limit", type=int, metavar="N", help="the first so many questions of each task")
    command.add_argument(
        "--thoughts", type=int, metavar="K", help="thoughts behind each context; the trained number if not given"
    )
    command.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="of an answer, where the task says nothing; the run's own"
    )
    command.add_argument(
        "--gen_kwargs",
        type=named_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="in the place of the tasks' own: max_gen_toks=64, temperature=0.8, top_k, top_p, min_p; repeatable",
    )
    command.add_argument(
        "--truncate", action="store_true", help="leave out the beginning of contexts that are too long"
    )
    command.add_argument("--batch_size", type=int, metavar="N", help="rows run together; the run's own if not given")
    command.add_argument("--seed", type=int, default=0, help="seed of the draws")
    command.add_argument("--output", type=path, help="write the result as JSON")
    command.add_argument("--samples", type=path, help="write every request and its answer as JSON lines")


def check_lm_eval(options: argparse.Namespace) -> None:
    """Looks whether the flags go together.

    Raises:
      CoconutError: one is missing, or means nothing beside the others; the message names it.
    """
    if (options.workdir is None) == (options.pretrained is None):
        raise CoconutError("give --workdir, of a run, or --pretrained, a model that was never trained here")
    meaningless = {
        f"--thoughts {options.thoughts}": options.thoughts is not None,
        f"--step {options.step}": options.step is not None,
        f"--which {options.which}": options.which != "best",
        "--skip_verification": options.skip_verification,
    }
    if options.pretrained is not None and (given := [flag for flag, value in meaningless.items() if value]):
        raise CoconutError(f"{given[0]}: belongs to --workdir, a model that was never trained here has no such thing")
    for flag, least in (("thoughts", 0), ("max_new_tokens", 1), ("batch_size", 1), ("limit", 1), ("num_fewshot", 0)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise CoconutError(f"--{flag} {value}: must be at least {least}")
