"""What somebody writes outside: a task, a feedback with parameters, a loss with two terms and views, a tracker."""

import dataclasses
import random

import jax
import jax.numpy as jnp
from flax import nnx

from coconut.latent.feedback import register_feedback
from coconut.losses import Loss, Term, language_loss
from coconut.methods import get_method, register_method
from coconut.methods.method import Method
from coconut.tasks import Task, content_hash, register_task
from coconut.training.trackers.writer import register_metrics_writer
from coconut.types import Example


def generate(count, *, seed, exclude=frozenset(), top=9):
    draw, found = random.Random(seed), {}
    while len(found) < count:
        first, second, third = (draw.randint(0, top) for _ in range(3))
        steps, answer = (f"{(first + second) % 10}",), f"{(first + second + third) % 10}"
        example = Example(question=f"{first} + {second} + {third} =", steps=steps, answer=answer)
        if (hash_ := content_hash(example)) not in exclude:
            found[hash_] = example
    return list(found.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    turn: nnx.Param

    def __call__(self, decoder, hidden, *, keys=None):
        return hidden @ self.turn[...].astype(hidden.dtype)


def make_turned(config, decoder, key):
    start = jnp.eye(decoder.embed_dim) + config.factor * jax.random.normal(key, (decoder.embed_dim,) * 2)
    return Turned(nnx.Param(start, axes=("features", "embed")))


def taught(model, views, context):
    terms, metrics = {}, {}
    for view, factor in (("main", 1.0), ("teacher", context.options.teacher)):
        output = context.rollout(model, views[view])
        loss, found = language_loss(model.decoder, views[view], output)
        terms[f"{view}_loss"], metrics = Term(loss, factor), metrics or found
    return Loss(terms, metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaughtOptions:
    teacher: float = 0.5


class Losses:
    run_id, last_step = None, -1

    def __init__(self, run, run_id):
        self.path, self.lines = run.workdir / "losses.txt", []

    def write(self, step, numbers, texts):
        self.lines += [f"{step} {numbers['train/loss']}"] if "train/loss" in numbers else []

    def flush(self):
        self.path.write_text("\n".join(self.lines))

    def close(self, outcome):
        self.flush()


PAGES = {"main": get_method("coconut").pages["main"], "teacher": get_method("cot").pages["main"]}
register_task(Task(name="sums", generator=generate))
register_metrics_writer("losses", Losses)
register_feedback("turned", make_turned)
register_method(Method(name="taught", pages=PAGES, options=TaughtOptions, loss=taught))
