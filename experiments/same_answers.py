"""How many answers change with the batch size and the dtype that a trained model is asked in.

    python -m experiments.same_answers --workdir DIR --output FILE [--questions 500]

Every setting answers the same questions of the run's test split, greedily. In float32 the batch size should change no
answer. In bfloat16 sums of other lengths round otherwise, and an answer may turn whose two best tokens are nearly even.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from coconut.commands.evaluate import questions_of, subject_of
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.provenance import provenance
from coconut.sharding import make_mesh
from coconut.storage import write_atomically
from coconut.training.loading import load_model

DTYPES, BATCH_SIZES = ("float32", "bfloat16"), (64, 7, 1)


def main(arguments: list[str] | None = None) -> None:
    """Answers in all settings and writes how many answers differ from those of the first one."""
    parser = argparse.ArgumentParser(description="How many answers change with batch size and dtype.")
    parser.add_argument("--workdir", type=Path, required=True, help="of a run")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args(arguments)
    settings, first = [], None
    for dtype in DTYPES:
        for batch_size in BATCH_SIZES:
            texts, right = answers(options.workdir, dtype, batch_size, options.questions)
            first = first or texts
            setting: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, "questions": len(texts)}
            setting["other_answers"] = sum(one != other for one, other in zip(texts, first, strict=True))
            setting["correct"] = sum(right)
            settings.append(setting)
            print(setting, file=sys.stderr)
    command = " ".join(["python -m experiments.same_answers", *sys.argv[1:]])
    found = {"command": command, "settings": settings, "provenance": provenance()}
    write_atomically(options.output, json.dumps(found, indent=1) + "\n")


def answers(workdir: Path, dtype: str, batch_size: int, questions: int) -> tuple[list[str], list[bool]]:
    """The answers of one setting, and whether they are right."""
    mesh = make_mesh()
    execution = dataclasses.replace(load_model(workdir, mesh=mesh)[0].config.execution, dtype=dtype)
    run, model, progress = load_model(workdir, mesh=mesh, execution=execution)
    subject, examples = subject_of(run, model, progress), questions_of(run, "test")[:questions]
    config = AnswerConfig(batch_size=batch_size, sampling=dataclasses.replace(run.config.sampling, temperature=0.0))
    tokenized = [subject.tokenize(example) for example in examples]
    with jax.set_mesh(mesh):
        texts = [answer.text for answer in answer_questions(*subject.asked, tokenized, config)]
    return texts, [subject.task.check(text, example) for text, example in zip(texts, examples, strict=True)]


if __name__ == "__main__":
    main()
