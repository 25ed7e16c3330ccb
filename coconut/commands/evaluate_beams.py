"""``coconut evaluate --scorer``: the scorer of a run, and a beam search by it beside the best of as many samples."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from coconut.commands.evaluate_samples import SamplesConfig, sample_config, sample_lines
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.beams import BeamSearch
from coconut.evaluation.statistics import bootstrap_interval
from coconut.evaluation.subject import Subject
from coconut.latent.scorer import LatentScorer
from coconut.models.parameters import decoder_parameters
from coconut.storage_path import StoragePath
from coconut.tokenizers import TokenizedExample
from coconut.training.loading import Numerics, load_model
from coconut.training.trajectories import scorer_of
from coconut.types import Example

LOG = logging.getLogger(__name__)


def load_scorer(
    workdir: StoragePath,
    subject: Subject,
    mesh: Mesh | None = None,
    *,
    verify: bool = True,
    numerics: Numerics = Numerics(),  # noqa: B008 - immutable
) -> LatentScorer:
    """The scorer of a run's best checkpoint, for the thoughts of somebody who is asked.

    A warning is logged where the model whose thoughts it was trained on is not the one that is asked.

    Args:
      workdir: of the run that trained it.
      subject: who is asked.
      mesh: see `load_model`.
      verify: likewise.
      numerics: likewise.

    Raises:
      CoconutError: there is no such run, or it trained no scorer; or it has another tokenizer, task, method or width,
        or fewer positions.
    """
    where = f"--scorer {workdir}"
    run, model, _ = load_model(workdir, "best", mesh, verify=verify, numerics=numerics)
    if run.config.scorer is None:
        raise CoconutError(f"{where}: this run trained no scorer (RunConfig.scorer)")
    if run.tokenizer.fingerprint != subject.tokenizer.fingerprint:
        raise CoconutError(f"{where}: its tokenizer is another one")
    theirs, own = model.decoder.config, subject.model.decoder.config
    pairs = {
        "task": (run.config.data.task, subject.task.name),
        "method": (run.config.method, subject.method.name),
        "embed_dim": (theirs.embed_dim, own.embed_dim),
    }
    if theirs.position_embedding == "learned":
        pairs["max_positions"] = (min(theirs.max_positions, own.max_positions), own.max_positions)
    for name, (there, here) in pairs.items():
        if there != here:
            raise CoconutError(f"{where}: its {name} is {there!r}, and that of the model that is asked is {here!r}")
    before, now = decoder_parameters(model.decoder), decoder_parameters(subject.model.decoder)
    same = lambda one, other: one.shape == other.shape and bool((one == other).all())
    if before.keys() != now.keys() or not all(same(before[name], now[name]) for name in before):
        LOG.warning("%s: was trained on the thoughts of another model than the one that is asked", where)
    return scorer_of(model.parts)


def plan_beams(
    subject: Subject,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    default: AnswerConfig,
    config: SamplesConfig,
    scorer: LatentScorer | None,
) -> BeamSearch | None:
    """The search that is asked for; None for none. Arguments as of `coconut.commands.evaluate_samples.plan_samples`.

    Raises:
      CoconutError: see `BeamSearch`.
    """
    if config.beams is None or config.candidates is None or scorer is None:
        return None
    own = sample_config(default, config, count=config.beams)
    return BeamSearch(subject, examples, tokenized, own, scorer, config.candidates)


def measure_beams(
    search: BeamSearch,
    examples: Sequence[Example],
    config: SamplesConfig,
    samples: Mapping[str, Any],
    advance: Callable[[int], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Searches, and measures what the best beam of each question answers.

    Args:
      search: what is to be searched.
      examples: the questions.
      config: which search.
      samples: what samples are worth, for the best of as many samples as there are candidates.
      advance: called with the number of questions after each batch.

    Returns:
      Plain values: ``beams``, ``candidates``, ``accuracy`` of the best beam with its ``interval_95``, ``any_beam`` for
      the share of questions of which any beam is right, ``passes`` of the best beam one after the other,
      ``seconds_per_question``, ``candidates_at_once``, and ``best_of_samples``: the same of the best of as many
      samples, whose seconds are those of all samples by their number; None where fewer were drawn. And each beam as a
      line.
    """
    assert config.beams is not None and config.candidates is not None
    found, seconds = search.draw(advance)
    right = np.asarray([[beam.right for beam in own] for own in found])
    passes = np.asarray([own[0].passes for own in found], float)
    scored = config.beams * config.candidates
    (budget,) = samples["budgets"]
    points = [point for point in budget["curves"]["scorer"] if point["samples"] == scored]
    beside = {"seconds_per_question": budget["costs"]["seconds_per_question"] * scored / config.count}
    content = {
        "beams": config.beams,
        "candidates": config.candidates,
        "accuracy": float(right[:, 0].mean()),
        "interval_95": list(bootstrap_interval(right[None, :, 0].astype(float))),
        "any_beam": float(right.any(1).mean()),
        "passes": float(passes.mean()),
        "seconds_per_question": seconds,
        "candidates_at_once": search.rows * config.candidates,
        "examples": len(found),
        "best_of_samples": {**points[0], **beside} if points else None,
    }
    return content, sample_lines(found, examples, setting="beam")


def beam_table(content: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Header and rows of the table of a search, and of the best of as many samples."""

    def cells(name: str, point: Mapping[str, Any]) -> list[str]:
        low, high = point["interval_95"]
        accuracy = f"{100 * point['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        return [name, str(scored), accuracy, f"{point['passes']:.1f}", f"{point['seconds_per_question']:.3g}"]

    scored = content["beams"] * content["candidates"]
    rows = [cells(f"{content['beams']} beams of {content['candidates']} candidates", content)]
    if content["best_of_samples"] is not None:
        rows.append(cells(f"best of {scored} samples", content["best_of_samples"]))
    return ("by the scorer", "scored", "accuracy % (95 %)", "passes", "s a question"), rows
