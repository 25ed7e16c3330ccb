"""Pages and batches for tests that do not care how an example is written down."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from coconut.batching import Shape, align
from coconut.curriculum import CurriculumConfig
from coconut.pages import Markers, Page, Placing, Text, Thoughts
from coconut.tokenizers import Tokenizer
from coconut.types import Batch


def placing_at(tokenizer: Tokenizer, curriculum: CurriculumConfig, stage: int, **settings: Any) -> Placing:
    """A stage; for a method without options, unless they are named."""
    settings = {"options": None, "markers": Markers.of(tokenizer), **settings}
    return Placing(curriculum=curriculum, stage=stage, **settings)


def thinking_page(tokenizer: Tokenizer, question: np.ndarray, thoughts: int, answer: np.ndarray) -> Page:
    """``question <start> thoughts <end> answer``."""
    markers = Markers.of(tokenizer)
    block = (markers.start_text, Thoughts(thoughts), markers.end_text)
    return (Text(question), *block, Text(answer, scored=True, piece=0, answer=True))


def one_block(prompt: int, thoughts: int, suffix: int) -> Shape:
    """The shape of such pages, markers included."""
    return Shape(prompt=prompt, texts=(0, suffix), thoughts=(thoughts,), scored=(0, suffix - 1))


def aligned(pages: Sequence[Page | None], shape: Shape, tokenizer: Tokenizer, *, feeds_back: bool = True) -> Batch:
    """The batch of some pages."""
    return align(pages, shape, pad_id=tokenizer.eos_id, latent_id=tokenizer.latent_id, feeds_back=feeds_back)
