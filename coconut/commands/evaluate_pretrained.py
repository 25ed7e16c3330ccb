"""``coconut evaluate --pretrained``: a published model, which was never trained here, answers a file of questions."""

import dataclasses
import re
from typing import Any, Literal, no_type_check

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from coconut.commands.evaluate import EvaluateConfig, measure_all
from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError, check_fields
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.subject import Subject
from coconut.hub import local_folder
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.methods import get_method
from coconut.model import Model
from coconut.models.huggingface import export_fields, load_pretrained
from coconut.pages import Markers, Placing
from coconut.provenance import provenance
from coconut.sharding import make_mesh
from coconut.tasks import get_task
from coconut.tokenizers import TEXT, TokenizedExample, Tokenizer, encode_example, load_tokenizer
from coconut.training.config import to_json
from coconut.training.run import split_fingerprint
from coconut.types import Example

QUESTION = "{question}"
"""Where a question stands in a prompt."""


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """Which model is asked, and what.

    Attributes:
      folder: a checkpoint of Hugging Face's layout with its tokenizer, or the id of a repository.
      task: name of the task, which judges the answers.
      data: a file of its questions, part of one (``questions.json[:100]``), or a data set (`coconut.tasks.records`).
      method: ``cot``, the model writes on behind the question; ``no_cot``, it goes on from the mark of an answer.
      prompt: what is asked, with ``{question}`` where the question stands. The names of the tokenizer's special tokens
        are these tokens there, in the question they are text. Question and surroundings are cut into tokens apart. None
        for the question as a run would write it.
      max_new_tokens: tokens of an answer, EOS included.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    folder: str
    task: str
    data: str
    method: Literal["cot", "no_cot"] = "cot"
    prompt: str | None = None
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        get_task(self.task)
        if self.prompt is not None and self.prompt.count(QUESTION) != 1:
            raise CoconutError(f"PretrainedConfig.prompt = {self.prompt!r}: must have {QUESTION} in it once")
        if self.max_new_tokens < 1:
            raise CoconutError(f"PretrainedConfig.max_new_tokens = {self.max_new_tokens!r}: must be at least 1")


def evaluate_pretrained(
    pretrained: PretrainedConfig, config: EvaluateConfig, *, mesh: Mesh | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Asks a model that was never trained here.

    Args:
      pretrained: which model, and what.
      config: what to measure; its ``split``, ``which`` and ``verify`` are those of a run, and not looked at.
      mesh: the devices; None for all there are.
      console: where the progress bar goes; standard error if None.

    Returns:
      What `coconut.commands.evaluate.evaluate_model` returns. There is no step and no stage, and what the model was
      trained on nobody knows; ``pretrained`` and ``config`` say which model it is.

    Raises:
      CoconutError: the model or the questions cannot be read or do not fit each other, thoughts are asked of it, or it
        is an export of a model that thinks.
    """
    mesh = make_mesh() if mesh is None else mesh
    refuse_thinker(pretrained.folder)
    task = get_task(pretrained.task)
    examples = task.load(pretrained.data)[: config.limit]
    tokenizer = load_tokenizer(local_folder(pretrained.folder))
    tokenized = [encode_prompt(tokenizer, example, pretrained.prompt) for example in examples]
    decoder = config.numerics.of(load_pretrained(pretrained.folder, mesh=mesh))
    if (highest := max(int(example.question.max()) for example in tokenized)) >= decoder.config.vocabulary:
        raise CoconutError(
            f"{pretrained.folder}: a question has the token id {highest}, but the embedding has "
            f"{decoder.config.vocabulary} rows"
        )
    subject = Subject(
        model=Model(decoder, {"feedback": Identity()}),
        tokenizer=tokenizer,
        method=get_method(pretrained.method),
        placing=Placing(curriculum=CurriculumConfig(), stage=0, options=None, markers=Markers.of(tokenizer)),
        task=task,
        text_format=TEXT,
    )
    default = AnswerConfig(
        batch_size=config.batch_size or AnswerConfig.batch_size,
        sampling=config.sampling_from(SamplingConfig(max_new_tokens=pretrained.max_new_tokens)),
        forced=config.forced or (TEXT.answer_prefix if pretrained.method == "no_cot" else ""),
        seed=config.seed,
        halting=config.halting,
        soft_thinking=config.soft_thinking,
    )
    with jax.set_mesh(mesh), config.numerics.products():
        measured = measure_all(subject, examples, tokenized, default, config, console=console)
    return {
        "method": pretrained.method,
        "split": pretrained.data,
        "task": task.name,
        "step": None,
        "stage": None,
        "seed": None,
        **measured,
        "also_trained_on": None,
        "provenance": provenance(),
        "pretrained": pretrained.folder,
        "config": {
            **to_json(pretrained),
            "decoder": to_json(decoder.config),
            "execution": to_json(decoder.execution),
            "answers": to_json(default),
        },
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data_fingerprint": split_fingerprint(examples),
    }


def refuse_thinker(folder: str) -> None:
    """Refuses what `coconut export` wrote of a run whose pages hold thoughts or markers before the answer.

    Asked as published models are, it would answer without them.

    Raises:
      CoconutError: it is such an export.
    """
    export = export_fields(folder)
    # What was exported before there was this field says its method.
    unsaid = [] if export.get("method") in ("cot", "no_cot") else None
    if export and export.get("behind_question", unsaid) != []:
        raise CoconutError(
            f"--pretrained {folder}: it is the export of a run of {export.get('method')!r}, whose thoughts or markers "
            "are not made here: give that run's --workdir"
        )


def encode_prompt(tokenizer: Tokenizer, example: Example, prompt: str | None) -> TokenizedExample:
    """A question's ids as `PretrainedConfig.prompt` says, behind the tokens that the vocabulary wants before a text."""
    encoded = encode_example(tokenizer, example, TEXT)
    if prompt is None:
        return encoded
    special = {name: id for name, id in tokenizer.special_token_ids().items() if name in prompt}
    longest_first = sorted(special, key=len, reverse=True)
    names = re.compile("|".join(map(re.escape, [*longest_first, QUESTION])))
    ids, end = [*tokenizer.leading_ids], 0
    for found in names.finditer(prompt):
        ids += tokenizer.encode(prompt[end : found.start()])
        ids += tokenizer.encode(example.question) if found.group() == QUESTION else [special[found.group()]]
        end = found.end()
    ids += tokenizer.encode(prompt[end:])
    # A chat template often names the token that the vocabulary wants first.
    twice = len(tokenizer.leading_ids)
    if twice and ids[twice : 2 * twice] == tokenizer.leading_ids:
        ids = ids[twice:]
    return dataclasses.replace(encoded, question=np.asarray(ids, np.int32))
