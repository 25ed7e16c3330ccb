"""A tiny model as a subject of evaluation."""

from coconut.curriculum import CurriculumConfig
from coconut.evaluation.subject import Subject
from coconut.methods import get_method
from coconut.model import Model
from coconut.tasks import get_task
from coconut.tokenizers import TextFormat, Tokenizer
from tests.tiny_pages import placing_at


def asked_subject(
    model: Model,
    tokenizer: Tokenizer,
    text_format: TextFormat,
    *,
    method: str = "coconut",
    curriculum: CurriculumConfig | None = None,
) -> Subject:
    """The model, asked at stage 0 of a curriculum."""
    return Subject(
        model=model,
        tokenizer=tokenizer,
        method=get_method(method),
        placing=placing_at(tokenizer, curriculum or CurriculumConfig(), 0),
        task=get_task("prosqa"),
        text_format=text_format,
    )
