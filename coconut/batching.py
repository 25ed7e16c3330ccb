"""From tokenized examples at their stages to aligned batches of one fixed shape. Pure, on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from coconut.curriculum import CurriculumConfig, SequenceRule, StagePlan, drawable_stages
from coconut.errors import CoconutError
from coconut.tokenizers import TokenizedExample, Tokenizer
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, Schedule


@dataclasses.dataclass(frozen=True)
class Shape:
    """Columns of a batch.

    Attributes:
      prompt: ``P``, with the start marker where there is one.
      latent: ``K``.
      suffix: ``S``, with the end marker where there is one.
    """

    prompt: int
    latent: int
    suffix: int

    @property
    def columns(self) -> int:
        """``T``."""
        return self.prompt + self.latent + self.suffix


@dataclasses.dataclass(frozen=True)
class Row:
    """One example written down.

    Attributes:
      prompt: token ids of the question, and the start marker where there is one.
      latent: columns to fill.
      end: the end marker's token id, or nothing; it is never a label.
      pieces: token ids of the written steps, then of the answer; all of them are labels.
      end_before: number of the piece before which ``end`` stands.
    """

    prompt: np.ndarray
    latent: int
    end: np.ndarray
    pieces: tuple[np.ndarray, ...]
    end_before: int = 0

    @property
    def suffix(self) -> int:
        """Columns after the latent ones."""
        return len(self.end) + sum(len(piece) for piece in self.pieces)


def write_row(example: TokenizedExample, plan: StagePlan, rule: SequenceRule, tokenizer: Tokenizer) -> Row:
    """``question <start> latent x n <end> steps[s:] answer`` (Hao et al. 2024, figure 2).

    With the filler ``step`` it is ``question <start> steps[:s] <end> steps[s:] answer``.
    """
    markers = (lambda token: np.array([token], np.int32)) if rule.markers else (lambda token: np.zeros(0, np.int32))
    writes_all = rule.filler == "step"
    return Row(
        prompt=np.concatenate([example.question, markers(tokenizer.start_latent_id)]),
        latent=0 if writes_all else plan.thoughts,
        end=markers(tokenizer.end_latent_id),
        pieces=(*example.steps[0 if writes_all else plan.skipped :], example.answer),
        end_before=plan.skipped if writes_all else 0,
    )


def schedule_of(shape: Shape, rule: SequenceRule) -> Schedule:
    """The spans of a batch.

    Without thoughts the whole sequence is one language span: pause tokens and written steps need no second pass. An end
    marker that opens the suffix is never a label.
    """
    scored = shape.suffix - (rule.markers and rule.filler != "step")
    if rule.filler == "thought" and shape.latent:
        return (Language(shape.prompt), Latent(shape.latent), Language(shape.suffix, scored))
    return (Language(shape.columns, scored),)


def stage_shape(
    examples: Sequence[TokenizedExample],
    rule: SequenceRule,
    config: CurriculumConfig,
    stage: int,
    *,
    multiple_of: int = 1,
) -> Shape:
    """The least shape that holds every example at every stage it may be put at while the run is at ``stage``.

    Args:
      examples: all examples of the data set.
      rule: the method's rule.
      config: the curriculum.
      stage: the run's stage.
      multiple_of: prompt and suffix are rounded up to a multiple of this.
    """
    prompt = max(len(example.question) for example in examples) + rule.markers
    latent, suffix = 0, 0
    plans: dict[tuple[int, int], StagePlan] = {}
    for example in examples:
        lengths = [len(step) for step in example.steps]
        for at in {stage, *drawable_stages(config, stage, len(lengths))}:
            key = (at, len(lengths))
            if key not in plans:
                plans[key] = rule.plan(config, *key)
            written = lengths if rule.filler == "step" else lengths[plans[key].skipped :]
            latent = max(latent, 0 if rule.filler == "step" else plans[key].thoughts)
            suffix = max(suffix, sum(written) + len(example.answer))
    round_up = lambda length: -(-length // multiple_of) * multiple_of
    return Shape(round_up(prompt), latent, round_up(suffix + rule.markers))


def align(
    rows: Sequence[Row | None],
    shape: Shape,
    rule: SequenceRule,
    *,
    pad_id: int,
    latent_id: int,
    examples: Sequence[int] | None = None,
) -> Batch:
    """Aligns rows so that the first latent column of each is column ``P``.

    Prompts end at column ``P``; latent columns and suffixes are filled from the left. A row of None only fills the
    batch: nothing in it is valid.

    Args:
      rows: what to write.
      shape: columns of the batch.
      rule: the method's rule.
      pad_id: token id of columns that are not valid.
      latent_id: token id of latent columns.
      examples: index of each row's example; counted from 0 if None.

    Raises:
      CoconutError: a row does not fit the shape.
    """
    size = (len(rows), shape.columns)
    tokens = np.full(size, pad_id, np.int32)
    valid = np.zeros(size, bool)
    labels = np.full(size, IGNORED_LABEL, np.int32)
    pieces = np.full(size, -1, np.int32)
    answers = np.zeros(size, bool)
    latent_start, suffix_start = shape.prompt, shape.prompt + shape.latent
    for index, row in enumerate(rows):
        if row is None:
            continue
        if len(row.prompt) > shape.prompt or row.latent > shape.latent or row.suffix > shape.suffix:
            raise CoconutError(
                f"row {index} has {len(row.prompt)} prompt, {row.latent} latent and {row.suffix} suffix columns; "
                f"the batch has room for {shape}"
            )
        prompt_start = latent_start - len(row.prompt)
        tokens[index, prompt_start:latent_start] = row.prompt
        tokens[index, latent_start : latent_start + row.latent] = latent_id
        valid[index, prompt_start : latent_start + row.latent] = True
        column = suffix_start
        valid[index, column : column + row.suffix] = True
        for number, piece in enumerate(row.pieces):
            if number == row.end_before:
                tokens[index, column : column + len(row.end)] = row.end
                column += len(row.end)
            here = slice(column, column + len(piece))
            tokens[index, here] = labels[index, here] = piece
            pieces[index, here] = number
            answers[index, here] = number == len(row.pieces) - 1
            column += len(piece)
    positions = np.where(valid, np.cumsum(valid, 1) - 1, 0).astype(np.int32)
    if examples is None:
        examples = [index if row is not None else -1 for index, row in enumerate(rows)]
    return Batch(
        schedule=schedule_of(shape, rule),
        tokens=tokens,
        positions=positions,
        valid=valid,
        labels=labels,
        pieces=pieces,
        answers=answers,
        examples=np.asarray(examples, np.int32),
    )
