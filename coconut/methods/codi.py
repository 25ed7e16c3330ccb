"""CODI (Shen et al. 2025, arXiv 2502.21074): a model that writes its steps teaches itself to think them.

One set of weights is teacher and student. The teacher reads the written steps; the student thinks in their place. At
the token before the answer itself the student's states have to come near the teacher's, in every layer.
"""

import dataclasses
from typing import Literal, no_type_check

import jax.numpy as jnp
import numpy as np

from coconut.errors import CoconutError, check_fields
from coconut.losses import Loss, Term, language_loss
from coconut.methods.coconut import write_final_stage
from coconut.methods.distillation import distance
from coconut.methods.method import LossContext, Method, Views, imitate
from coconut.model import Model
from coconut.pages import Page, Placing, Text, write_on
from coconut.tokenizers import TokenizedExample
from coconut.types import Language, ModelOutput, Think


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodiOptions:
    """Options of `CODI`. The defaults are the original code's for GPT-2; for Llama ``distill`` is 20.

    The paper's equation and its appendix call the weights by each other's names; this follows the code.

    Attributes:
      distill: factor of the distance between the student's states and the teacher's.
      teacher: factor of the teacher's own loss, over its steps and answer.
      keep_last_step: whether the teacher reads the last step, too. It often states the answer, which is then copied:
        43.7 % become 31.7 % (table 4 of the paper).
      embedding: whether what the first layer reads is compared, too. The code does, the paper counts layers.
      squared: compare by squares in place of smooth L1. The paper writes L1.
      divide_by: what the distance of a layer is divided by: the deviation of the teacher's states in that ``layer``,
        that of ``all`` layers together, or ``none``.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    distill: float = 1.0
    teacher: float = 1.0
    keep_last_step: bool = False
    embedding: bool = True
    squared: bool = False
    divide_by: Literal["layer", "all", "none"] = "layer"

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("distill", "teacher"):
            if not 0 <= getattr(self, field) < np.inf:
                raise CoconutError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: must be at least 0")


def write_for_teacher(example: TokenizedExample, placing: Placing) -> Page:
    """``question steps answer``, without markers, and without the last step unless the options keep it."""
    steps = tuple(step for step in example.steps if not isinstance(step, Think))
    kept = steps if placing.options.keep_last_step else steps[:-1]
    return (Text(example.question), *write_on(kept, example, placing.markers))


def distilled(
    model: Model, views: Views, context: LossContext, *, every_hidden: bool = False, teacher_states: bool = False
) -> tuple[Loss, ModelOutput, ModelOutput | None]:
    """The terms ``language``, ``teacher`` and ``distill``, and the rollouts of student and teacher.

    A term whose factor is 0 is left out, and so is a teacher that nobody needs.

    Args:
      model: the model.
      views: the student's, ``main``, and the teacher's.
      context: of the loss.
      every_hidden: whether the student's rollout returns all of its hidden states.
      teacher_states: whether the teacher's returns, behind those of the token before the answer, its states at all
        columns that may carry a label.
    """
    options, batch = context.options, views["main"]
    watched = jnp.asarray(batch.before_answer)[:, None] if options.distill else None
    loss, output = imitate(model, batch, context, every_hidden=every_hidden, observed=watched)
    if not (options.distill or options.teacher or teacher_states):
        return loss, output, None
    terms, metrics = dict(loss.terms), dict(loss.metrics)
    taught = views["teacher"]
    watched = jnp.asarray(taught.before_answer)[:, None] if options.distill or teacher_states else None
    if teacher_states:
        T, last = taught.tokens.shape[1], taught.schedule[-1]
        assert watched is not None and isinstance(last, Language)
        labelled = jnp.broadcast_to(jnp.arange(T - last.scored, T), (len(watched), last.scored))
        watched = jnp.concatenate([watched, labelled], 1)
    teacher = context.rollout(model, taught, observed=watched)
    if options.teacher:
        own_loss, own = language_loss(model.decoder, taught, teacher)
        terms["teacher"] = Term(own_loss, options.teacher)
        metrics["teacher_answer_accuracy"] = own["answer_accuracy"]
    if options.distill:
        first = 0 if options.embedding else 1
        assert output.states is not None and teacher.states is not None
        far = distance(
            *(output.states[first:, :, 0], teacher.states[first:, :, 0], batch.before_answer >= 0),
            squared=options.squared,
            divide_by=options.divide_by,
        )
        terms["distill"] = Term(far, options.distill)
    return Loss(terms, metrics), output, teacher


def codi_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """The student's cross-entropy, the teacher's, and the distance between their states.

    The original's left padding is seen by what follows it; here nothing sees padding. It runs the teacher twice, once
    for the target without a gradient; with dropout the two draw other masks. Here one pass serves both.
    """
    loss, _, _ = distilled(model, views, context)
    return loss


CODI = Method(
    name="codi",
    pages={"main": write_final_stage, "teacher": write_for_teacher},
    options=CodiOptions,
    needs_steps=True,
    loss=codi_loss,
)
