"""``coconut mix``: runs that trained scales of singular values, each alone and mixed at test time."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from coconut.commands.evaluate import markdown_table, questions_of, subject_of
from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions
from coconut.evaluation.evaluate import wilson_interval
from coconut.evaluation.mixing import (
    CrossEntropyConfig,
    QuestionClassifier,
    check_mixable,
    cross_entropy_search,
    question_states,
)
from coconut.evaluation.subject import Subject
from coconut.model import Model, parameters_of
from coconut.models.adapters import mix_singular_values, with_scales
from coconut.models.decoder import Decoder
from coconut.provenance import provenance
from coconut.sharding import make_mesh
from coconut.storage import write_atomically
from coconut.storage_path import StoragePath
from coconut.training.checkpoint import Which
from coconut.training.config import to_json
from coconut.training.loading import load_model
from coconut.training.metrics import progress_bar
from coconut.training.run import Run, split_fingerprint
from coconut.types import Example

By = Literal["classifier", "cross_entropy", "weights"]
WITHOUT, MIXED = "without vectors", "mixed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How vectors are mixed, and what they are asked.

    Attributes:
      by: ``classifier``, a vector for each question; ``cross_entropy``, one mixture for each run's questions, found on
        a few of them; ``weights``, one that is given.
      weights: of each run.
      per_layer: look for weights of each layer.
      shots: questions of each set that a mixture is looked for with; they count nowhere.
      search: how it is looked for.
      split: whose questions are asked: ``test`` or ``validation`` of every run's own data, or a source of questions.
      which: the ``best`` checkpoint of each by validation, the ``latest``, or that of a step.
      verify: compare the checkpoints' files with their SHA-256 first.
      limit: the first so many questions of each set only; None for all.
    """

    by: By = "classifier"
    weights: tuple[float, ...] = ()
    per_layer: bool = False
    shots: int = 10
    search: CrossEntropyConfig = dataclasses.field(default_factory=CrossEntropyConfig)
    split: str = "test"
    which: Which | int = "best"
    verify: bool = True
    limit: int | None = None


def mix_command(options: argparse.Namespace) -> str:
    """Runs the command; returns its table in Markdown."""
    config = MixConfig(
        by=options.by,
        weights=options.weights or (),
        per_layer=options.per_layer,
        shots=options.shots,
        search=CrossEntropyConfig(iterations=options.iterations, seed=options.seed),
        split=options.split,
        which=options.which if options.step is None else options.step,
        verify=not options.skip_verification,
        limit=options.limit,
    )
    result = mix_runs(options.workdirs, config)
    if options.output is not None:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    return describe(result)


def mix_runs(
    workdirs: Sequence[StoragePath | str], config: MixConfig, *, console: Console | None = None
) -> dict[str, Any]:
    """Asks the decoder without vectors, with those of each run, and with a mixture of them.

    Returns:
      ``sets``: for each set of questions its ``name``, ``questions``, ``shots`` and ``accuracy``: by who answers
      (``without vectors``, each run, ``mixed``) the share of right answers, with ``correct`` and ``interval_95``; and
      of the mixture ``chosen``, questions by run, or the ``weights`` and what the ``search`` scored. ``runs``, ``by``,
      and where.

    Raises:
      CoconutError: a run has no vectors, or runs differ in more than them; too few questions.
    """
    mesh = make_mesh()
    names, loaded = [str(workdir) for workdir in workdirs], []
    for name, workdir in zip(names, workdirs, strict=True):
        run, model, progress = load_model(workdir, config.which, mesh, verify=config.verify)
        if loaded:
            model = _beside(loaded[0][1], model, names[0], name)
        loaded.append((run, model, progress))
    if config.by == "weights" and len(config.weights) != len(names):
        raise CoconutError(f"--weights: {len(config.weights)} are given for {len(names)} runs")
    subjects = [subject_of(run, model, progress) for run, model, progress in loaded]
    own_splits = config.split in ("test", "validation")
    sets = [
        (name if own_splits else config.split, subject, run, _questions(run, name, config))
        for name, subject, (run, _, _) in zip(names, subjects, loaded, strict=True)
    ][: None if own_splits else 1]
    trained = [model.decoder for _, model, _ in loaded]
    alone = [with_scales(decoder, lambda name, scale: scale) for decoder in trained]
    plain = with_scales(trained[0], lambda name, scale: jnp.ones_like(scale))
    mixture = lambda weights: mix_singular_values(trained, weights)
    results = []
    with progress_bar(console) as bar, jax.set_mesh(mesh):
        classify = _classifier(plain, subjects, [run for run, _, _ in loaded]) if config.by == "classifier" else None
        ways = len(names) + (1 if classify is not None else 2)
        task_id = bar.add_task("answering", total=sum(len(own[3]) for own in sets) * ways, numbers="")
        advance = lambda rows: bar.advance(task_id, rows)
        for name, subject, run, examples in sets:
            shots = examples[: config.shots] if config.by == "cross_entropy" else []
            asked = examples[len(shots) :]
            ask = lambda decoder, examples=asked, subject=subject, run=run: _answers(
                subject, run, decoder, examples, advance
            )
            right = {WITHOUT: ask(plain), **{who: ask(own) for who, own in zip(names, alone, strict=True)}}
            found: dict[str, Any] = {}
            if classify is not None:
                chosen = classify([subject.tokenize(example).question for example in asked])
                right[MIXED] = [right[names[kind]][index] for index, kind in enumerate(chosen)]
                found["chosen"] = {who: int((chosen == kind).sum()) for kind, who in enumerate(names)}
            else:
                weights = np.asarray(config.weights, np.float32)
                if config.by == "cross_entropy":
                    weights, found["search"] = _searched(mixture, subject, run, shots, len(names), config, bar)
                found["weights"] = weights.tolist()
                right[MIXED] = ask(mixture(jnp.asarray(weights, jnp.float32)))
            accuracy = {who: _share([one for one, _ in answers]) for who, answers in right.items()}
            results.append({"name": name, "questions": len(asked), "shots": len(shots), "accuracy": accuracy, **found})
    settings = to_json(dataclasses.replace(config, weights=()))
    return {"runs": names, "sets": results, "config": settings, "provenance": provenance()}


def _beside(first: Model, model: Model, first_name: str, name: str) -> Model:
    """A model that holds the first one's arrays but for its vectors, so that memory holds them once.

    Raises:
      CoconutError: it differs from the first in more.
    """
    shared, own = parameters_of(first), parameters_of(model)
    check_mixable([first_name, name], [shared, own])
    if jax.tree.structure(first) != jax.tree.structure(model):
        raise CoconutError(
            f"{name} is run in another way than {first_name}: both need the same SingularValueConfig, such as form"
        )
    leaves = [value if name.endswith(".singular_z") else shared[name] for name, value in own.items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _questions(run: Run, name: str, config: MixConfig) -> list[Example]:
    examples = questions_of(run, config.split)[: config.limit]
    if config.by == "cross_entropy" and len(examples) <= config.shots:
        raise CoconutError(f"{name}: --shots {config.shots} leave none of {len(examples)} questions to answer")
    return examples


def _classifier(
    plain: Decoder, subjects: Sequence[Subject], runs: Sequence[Run]
) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """Which run's questions some questions are like: fitted on each run's validation questions.

    Raises:
      CoconutError: two runs have the same ones, or one has none.
    """
    states = lambda questions: question_states(plain, questions)
    validation = [questions_of(run, "validation") for run in runs]
    if len(set(map(split_fingerprint, validation))) < len(runs):
        raise CoconutError(
            "--by classifier: two of the runs have the same validation questions, by which nothing tells them apart"
        )
    kinds = [
        states([subject.tokenize(example).question for example in examples])
        for subject, examples in zip(subjects, validation, strict=True)
    ]
    classifier = QuestionClassifier.fitted(kinds)
    return lambda questions: classifier(states(questions))


def _answers(
    subject: Subject, run: Run, decoder: Decoder, examples: Sequence[Example], advance: Callable[[int], None]
) -> list[tuple[bool, Answer]]:
    """Each answer of a decoder in the place of a run's, and whether it is right."""
    model = subject.model._replace(decoder=decoder)
    sampling = dataclasses.replace(run.config.sampling, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)
    config = AnswerConfig(
        batch_size=run.config.evaluation_batch_size,
        sampling=sampling,
        halting=run.config.halting,
        keep_choices=True,
    )
    asked = [subject.tokenize(example) for example in examples]
    answers = answer_questions(
        model, subject.tokenizer, subject.method, subject.placing, asked, config, advance=advance
    )
    return [
        (subject.task.check(answer.text, example), answer) for answer, example in zip(answers, examples, strict=True)
    ]


def _searched(
    mixture: Callable[[Any], Decoder],
    subject: Subject,
    run: Run,
    shots: Sequence[Example],
    runs: int,
    config: MixConfig,
    bar: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The best mixture for some questions, and what was seen on the way."""
    layers = run.config.decoder.num_layers
    shape = (runs, layers) if config.per_layer else (runs,)

    def score(weights: np.ndarray) -> tuple[float, float]:
        decoder = mixture(jnp.asarray(weights.reshape(shape), jnp.float32))
        answers = _answers(subject, run, decoder, shots, lambda rows: None)
        likely = [answer.log_prob or 0.0 for right, answer in answers if right]
        return len(likely) / len(answers), float(np.mean(likely)) if likely else -np.inf

    search = config.search
    task_id = bar.add_task("mixing", total=1 + (search.population - 1) * search.iterations, numbers="")
    start = np.full(int(np.prod(shape)), 1 / runs)
    found = cross_entropy_search(score, start, search, advance=lambda rows: bar.advance(task_id, rows))
    bar.update(task_id, visible=False)
    seen = {"accuracy": found.score[0], "tried": found.tried, "iterations": len(found.history)}
    return found.weights.reshape(shape), seen


def _share(right: Sequence[bool]) -> dict[str, Any]:
    correct, count = sum(right), len(right)
    return {"accuracy": correct / count, "correct": correct, "interval_95": list(wilson_interval(correct, count))}


def describe(result: dict[str, Any]) -> str:
    """The Markdown table of `mix_runs`."""
    rows, lines = [], []
    for own in result["sets"]:
        shares = [f"{100 * entry['accuracy']:.1f}" for entry in own["accuracy"].values()]
        rows.append([own["name"], str(own["questions"]), *shares])
        if "chosen" in own:
            how = ", ".join(f"{count} by {who}" for who, count in own["chosen"].items())
        else:
            how = f"weights {np.round(np.asarray(own['weights']), 2).tolist()} of {', '.join(result['runs'])}"
        if "search" in own:
            how += f", the best of {own['search']['tried']} on {own['shots']} questions that are not counted"
        lines.append(f"{own['name']}: mixed: {how}")
    header = ("questions of", "number", *(f"{who} %" for who in result["sets"][0]["accuracy"]))
    return "\n\n".join([markdown_table(header, rows), *lines])
