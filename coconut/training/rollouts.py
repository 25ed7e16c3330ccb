"""Learning from rewards of the model's own samples: what a step samples, scores, and updates by.

Samples are drawn with the parameters as they are, on the mesh of the run and without a copy of them; their texts are
scored on the host; and one compiled program updates the parameters by them, once or several times.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from coconut.datasets import Dataset
from coconut.errors import NotFiniteError
from coconut.latent.sampling import Sampler, Samples, Written, given_columns
from coconut.losses import Loss, Term, ratio
from coconut.methods import get_method
from coconut.methods.method import LossContext, Views
from coconut.model import Model, Parameters, Template
from coconut.sharding import constrain_tree, own_rows, put_rows, replicate, replicated, row_sharding
from coconut.tasks import Task
from coconut.tokenizers import TextFormat, Tokenizer
from coconut.training.config import RunConfig
from coconut.training.learning import Imitation, Learning, Measured, StepViews
from coconut.training.reinforcement import (
    advantages,
    averaged,
    beside,
    divergence,
    first_thoughts_that_count,
    surrogate,
    together,
)
from coconut.training.rewards import Sample, Setting, score
from coconut.training.samplers import make_sampler
from coconut.training.state import REFERENCE, TrainState
from coconut.training.step import Metrics, TrainStep, make_train_step, make_update, skipped_of
from coconut.training.trajectories import Scoring
from coconut.types import Example


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts(Samples):
    """Samples with what they are worth.

    Attributes:
      advantages: of each sample.
      counted: samples that are part of the objective.
      first_counts: samples whose first thought keeps its advantage.
    """

    advantages: Float[Any, " B"]
    counted: Bool[Any, " B"]
    first_counts: Bool[Any, " B"]


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Update(Rollouts):
    """The rollouts of one update of several.

    Attributes:
      behaviour: log-probabilities of the actions, by kind, before the first update of the step.
      is_first: whether this is that update.
    """

    behaviour: dict[str, Float[Any, "B X"]]
    is_first: Bool[Any, " B"]


class Reinforcement:
    """Learns from rewards of the model's own samples (`coconut.training.reinforcement`).

    Args:
      config: of the run, which has a ``reinforcement``.
      template: how to make the model.
      optimizer: of the run.
      mesh: the devices.
      tokenizer: of the run.
      task: judges answers.
      text_format: how answers are marked.
      examples: the questions, by the numbers that batches name them by.

    Raises:
      CoconutError: the policy does not fit the model or the method.
    """

    def __init__(
        self,
        config: RunConfig,
        template: Template,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        *,
        tokenizer: Tokenizer,
        task: Task,
        text_format: TextFormat,
        examples: Sequence[Example],
    ):
        assert config.reinforcement is not None
        own = get_method(config.method)
        self._config, self._reinforcement, self._own = config, config.reinforcement, own
        self._template, self._mesh, self._tokenizer, self._examples = template, mesh, tokenizer, examples
        self._setting = Setting(
            task=task, answer_prefix=text_format.answer_prefix, max_new_tokens=config.sampling.max_new_tokens
        )
        self._samples = config.pipeline.batch_size * config.reinforcement.group
        self._rows = own_rows(mesh, self._samples, config.microbatches * config.reinforcement.minibatches)
        # Only the page that is answered: nothing else is read.
        self.method = dataclasses.replace(own, pages={"main": own.write_to_answer}, loss=self._loss)
        self.step = self._make_step(optimizer)
        self._programs: dict[Any, Any] = {}
        self._gathering: dict[int, Any] = {}
        self._compile_seconds = 0.0
        self._key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(config.seed)

    def sampler(self, model: Model) -> Sampler:
        """How the model is sampled from."""
        return make_sampler(self._config, self._tokenizer, model)

    # --- Sampling and scoring -----------------------------------------------------------------------------------

    def views(self, state: TrainState, batches: Iterator[Views], number: int) -> StepViews:
        """Draws samples, scores them, and puts them beside what they are worth.

        Raises:
          NotFiniteError: the model gives numbers that are not finite.
          CoconutError: a reward gives something else than a finite number for each sample.
        """
        config, wanted = self._reinforcement, self._config.pipeline.batch_size
        judged: list[_Judged] = []
        for attempt in range(config.most_draws if config.dead_groups == "resample" else 1):
            judged.append(self._judge(next(batches), state.parameters, number, attempt))
            if sum(int(one.live.sum()) for one in judged) >= wanted:
                break
        samples, chosen = judged[0].samples, slice(None)
        if len(judged) > 1:
            # Those that are alive, in the order in which they were drawn; behind them others, which do not count.
            chosen = np.argsort(~np.concatenate([one.live for one in judged]), kind="stable")[:wanted]
            rows = (chosen[:, None] * config.group + np.arange(config.group)).reshape(-1)
            samples = self._gathered([one.samples for one in judged], rows)
        of_chosen = lambda name: np.concatenate([getattr(one, name) for one in judged])[chosen]
        counted = of_chosen("live") if config.dead_groups != "keep" else of_chosen("real")
        found = {
            "advantages": of_chosen("advantages").astype(np.float32),
            "counted": np.broadcast_to(counted[:, None], (len(counted), config.group)),
            "first_counts": of_chosen("first_counts"),
        }
        put = lambda x: put_rows(np.ascontiguousarray(x.reshape(-1)[self._rows]), self._mesh, self._samples)
        rollouts = Rollouts(**_fields(samples), **{name: put(x) for name, x in found.items()})
        hosts = tuple(one.host for one in judged)
        return StepViews(hosts, {"main": rollouts}, _added([one.metrics for one in judged]))

    def abstract_views(self, state: TrainState, host: Views) -> Views:
        """The shapes of the samples of a batch, which lie where samples do."""
        given = put_rows(given_columns(host["main"]), self._mesh, self._config.pipeline.batch_size)
        number = np.int32(0)
        samples, _ = jax.eval_shape(self._sample, state.parameters, given, self._key, number, number)
        row = lambda dtype: jax.ShapeDtypeStruct((self._samples,), dtype)
        found: dict[str, Any] = {"advantages": row("float32"), "counted": row("bool"), "first_counts": row("bool")}
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(self._mesh))
        return {"main": jax.tree.map(place, Rollouts(**_fields(samples), **found))}

    def shown(self, state: TrainState, host: Views) -> Mapping[str, Any]:
        """Samples of the first questions of a batch, with keys that never change: what changes is the model."""
        judged = self._judge(host, state.parameters, _SHOWN, 0)
        return {"rollouts": judged.lines[: 2 * self._reinforcement.group]}

    def compile_seconds(self) -> float:
        """Seconds that the sampler was compiled for since the last call."""
        seconds, self._compile_seconds = self._compile_seconds, 0.0
        return seconds

    def _judge(self, host: Views, parameters: Parameters, number: int, attempt: int) -> "_Judged":
        """Samples of a batch, and what they are worth."""
        config = self._reinforcement
        given = put_rows(given_columns(host["main"]), self._mesh, self._config.pipeline.batch_size)
        arguments = (parameters, given, self._key, np.int32(number), np.int32(attempt))
        if given.schedule not in self._programs:
            started = time.perf_counter()
            self._programs[given.schedule] = jax.jit(self._sample).lower(*arguments).compile()
            self._compile_seconds += time.perf_counter() - started
        samples, seen = self._programs[given.schedule](*arguments)
        seen = jax.tree.map(np.asarray, seen)
        written, real = seen.written, seen.examples >= 0
        if not written.finite[real].all():
            example = int(seen.examples[real][np.argmin(written.finite[real])])
            raise NotFiniteError(f"its samples of training example {example} are not finite")
        of_rows = [
            Sample(
                example=self._examples[seen.examples[row]],
                question=int(row) // config.group,
                text=self._tokenizer.decode(written.tokens[row, : written.lengths[row]].tolist()),
                new_tokens=int(written.lengths[row]),
                thoughts=int(written.thoughts[row]),
                ended=bool(written.ended[row]),
            )
            for row in np.flatnonzero(real)
        ]
        total, parts = self._scored(of_rows)
        rewards = np.zeros(len(real))
        rewards[real] = total
        rewards = rewards.reshape(-1, config.group)
        found, dead = advantages(rewards, config)
        is_real = real.reshape(rewards.shape)[:, 0]
        first = np.ones(rewards.shape, bool)
        if config.best_first_thought:
            first = first_thoughts_that_count(found, seen.first.reshape(rewards.shape))
        mean = lambda values: (float(np.sum(values)), float(np.size(values)))
        metrics = {
            "reward": mean(total),
            **({f"reward_{name}": mean(values) for name, values in parts.items()} if len(parts) > 1 else {}),
            "dead_groups": mean(dead[is_real]),
            "thoughts": mean(written.thoughts[real]),
            "new_tokens": mean(written.lengths[real]),
            "ended": mean(written.ended[real]),
        }
        thinking = real & (written.thoughts > 0)
        if thinking.any():
            metrics["thought_size"] = mean(written.thought_size[thinking])
        lines = [
            {
                "question": sample.example.question,
                "text": sample.text,
                "thoughts": sample.thoughts,
                "reward": float(value),
            }
            for sample, value in zip(of_rows, total, strict=True)
        ]
        return _Judged(
            host=host,
            samples=samples,
            advantages=found,
            first_counts=first,
            real=is_real,
            live=is_real & ~dead,
            metrics=metrics,
            lines=lines,
        )

    def _scored(self, samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What the first process makes of the samples: somebody's own reward may not give all processes the same."""
        weights = self._reinforcement.rewards
        if jax.process_count() == 1:
            return score(samples, self._setting, weights)
        found = np.zeros((1 + len(weights), len(samples)))
        if jax.process_index() == 0:
            total, parts = score(samples, self._setting, weights)
            found = np.stack([total, *parts.values()])
        total, *values = np.asarray(multihost_utils.broadcast_one_to_all(found), float)
        return total, dict(zip(weights, values, strict=True))

    def _sample(
        self, parameters: Parameters, given: Any, key: Key[Array, ""], number: Array, attempt: Array
    ) -> tuple[Samples, "_Seen"]:
        """The compiled part: samples of a batch, and what the host has to see of them."""
        model = self._template.model(parameters)
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, _SAMPLING), number), attempt)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(self._samples))
        samples, written = self.sampler(model).sample(
            model.decoder, given, keys, self._reinforcement.group, active=given.examples >= 0
        )
        first = jnp.full(self._samples, -jnp.inf)
        if "thoughts" in samples.sampled:
            first = jnp.where(written.thoughts > 0, samples.sampled["thoughts"][:, 0], first)
        return samples, replicate(_Seen(written, samples.examples, first))

    def _gathered(self, samples: Sequence[Samples], rows: np.ndarray) -> Samples:
        """Some rows of several batches of samples."""
        places = jax.tree.map(lambda x: x.sharding, samples[0])
        if len(samples) not in self._gathering:
            gather = lambda samples, rows: jax.tree.map(lambda *parts: jnp.concatenate(parts)[rows], *samples)
            self._gathering[len(samples)] = jax.jit(gather, out_shardings=places)
        return self._gathering[len(samples)](list(samples), rows)

    # --- Updating -----------------------------------------------------------------------------------------------

    def _loss(self, model: Model, views: Views, context: LossContext) -> Loss:
        """The objective of some samples, with the sign of a loss."""
        del context  # Dropout of training would make other probabilities than those of sampling.
        config, rollouts = self._reinforcement, views["main"]
        assert isinstance(rollouts, Rollouts)
        sampler = self.sampler(model)
        actions = sampler.replay(model.decoder, rollouts, entropies=True, advantages=rollouts.advantages)
        all_actions = together(actions, config)
        log_probs, taken = all_actions["log_probs"], all_actions["taken"]
        own, is_first = jax.lax.stop_gradient(log_probs), jnp.ones(len(log_probs), bool)
        behaviour = own
        if isinstance(rollouts, _Update):
            # The first update's ratios are 1 to the bit: what was done is what it says itself.
            is_first = rollouts.is_first
            behaviour = jnp.where(is_first[:, None], own, beside(rollouts.behaviour, actions))
        advantage = jnp.broadcast_to(rollouts.advantages[:, None], log_probs.shape).astype(log_probs.dtype)
        advantage = jnp.where(all_actions["first"] & ~rollouts.first_counts[:, None], 0.0, advantage)
        value, ratios, clipped = surrogate(log_probs, behaviour, taken, advantage, config)
        sampled = beside(rollouts.sampled, actions)
        if config.sampler_cap is not None:
            value *= jnp.minimum(jnp.exp(jnp.clip(behaviour - sampled, -20.0, 20.0)), config.sampler_cap)
        average = lambda values: averaged(values, taken, rollouts.counted, config)
        terms = {"policy": Term(average(-value * all_actions["weights"]))}
        seen = taken & rollouts.counted[:, None]
        metrics = {
            "ratio": ratio(jax.lax.stop_gradient(ratios), seen),
            "clipped": ratio(clipped.astype(ratios.dtype), seen),
            "sampler_gap": ratio(jnp.abs(own - sampled), seen & is_first[:, None]),
        }
        for kind, draws in actions.items():
            assert draws.entropies is not None
            metrics[f"entropy_{kind}"] = ratio(
                jax.lax.stop_gradient(draws.entropies), draws.taken & rollouts.counted[:, None]
            )
        if config.kl_weight:
            parts = dict(model.parts[REFERENCE])
            there = Model(parts.pop("decoder"), parts)
            found = self.sampler(there).replay(there.decoder, rollouts, advantages=rollouts.advantages)
            before = beside({kind: draws.log_probs for kind, draws in found.items()}, actions)
            terms["kl"] = Term(average(divergence(log_probs, before, config.kl)), config.kl_weight)
        return Loss(terms, metrics)

    def _make_step(self, optimizer: optax.GradientTransformation) -> TrainStep:
        """The train step: one update, or several with the probabilities before the first of them."""
        config, template = self._reinforcement, self._template
        fields = ("options", "microbatches", "spikes")
        settings = {name: getattr(self._config, name) for name in fields}
        settings["correction_rate"] = self._config.optimizer.correction_rate
        if config.updates == 1:
            return make_train_step(template, self.method, optimizer, **settings)
        update, parts = make_update(template, self.method, optimizer, **settings), config.minibatches
        micro = self._config.microbatches

        def split(tree: Any, number: int) -> Any:
            # Every so-manieth row, so that each device keeps the rows it has.
            return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), tree)

        def behaviour(parameters: Parameters, rollouts: Rollouts) -> dict[str, Array]:
            model = template.model(parameters)
            actions = self.sampler(model).replay(model.decoder, rollouts, advantages=rollouts.advantages)
            return {kind: draws.log_probs for kind, draws in actions.items()}

        @functools.partial(jax.jit, donate_argnums=0)
        def step(
            state: TrainState, views: Views, learning_rate: Float[Array, ""], key: Key[Array, ""]
        ) -> tuple[TrainState, Metrics]:
            number, rollouts = state.step, split(views["main"], parts)
            pieces = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(lambda x: split(x, micro))(rollouts))
            before = jax.lax.map(lambda rows: behaviour(state.parameters, rows), pieces)
            join = lambda x: x.reshape(parts, micro, *x.shape[1:]).swapaxes(1, 2).reshape(parts, -1, *x.shape[2:])
            before = jax.tree.map(join, before)

            def one(state: TrainState, index: Array) -> tuple[TrainState, Metrics]:
                rows, own = jax.tree.map(lambda x: x[index % parts], (rollouts, before))
                is_first = jnp.full(len(rows.tokens), index == 0)
                updated = _Update(**_fields(rows), behaviour=own, is_first=is_first)
                return update(state, {"main": updated}, learning_rate, jax.random.fold_in(key, index))

            state, metrics = jax.lax.scan(one, state, jnp.arange(config.updates))
            metrics = jax.tree.map(lambda x: x.sum(0), metrics)
            metrics["skipped"] = skipped_of(metrics, config.updates)
            following = dataclasses.replace(state, step=number + 1)
            return constrain_tree(following, template.axes), replicate(metrics)

        return step


_SAMPLING = zlib.crc32(b"sampling")  # Keeps the draws of samples apart from what else the run's key makes.
_SHOWN = 2**31 - 1
"""The step whose keys the samples have that are shown."""


class _Seen(NamedTuple):
    """What the host sees of samples: what was written, their examples, and the log-probability of the first draw."""

    written: Written
    examples: Array
    first: Array


class _Judged(NamedTuple):
    """Samples of one batch and what they are worth, by question and sample."""

    host: Views
    samples: Samples
    advantages: Float[np.ndarray, "Q G"]
    first_counts: Bool[np.ndarray, "Q G"]
    real: Bool[np.ndarray, " Q"]
    live: Bool[np.ndarray, " Q"]
    metrics: Mapping[str, Measured]
    lines: list[dict[str, Any]]


def _fields(batch: Any) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _added(metrics: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """The metrics of several batches together."""
    names = dict.fromkeys(name for own in metrics for name in own)
    pairs = {name: [own[name] for own in metrics if name in own] for name in names}
    return {name: (sum(total for total, _ in own), sum(weight for _, weight in own)) for name, own in pairs.items()}


def make_learning(
    config: RunConfig,
    template: Template,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    tokenizer: Tokenizer,
    dataset: Dataset,
) -> Learning:
    """What the steps of a run learn from.

    Args:
      config: of the run.
      template: how to make the model.
      optimizer: of the run.
      mesh: the devices.
      tokenizer: of the run.
      dataset: its data, the training examples that `coconut.training.setup.prepare` has left.
    """
    task, examples = dataset.task, dataset.splits["train"]
    if config.scorer is not None:
        return Scoring(config, template, optimizer, mesh, tokenizer=tokenizer, task=task, examples=examples)
    if config.reinforcement is None:
        return Imitation(config, template, optimizer, mesh)
    return Reinforcement(
        config,
        template,
        optimizer,
        mesh,
        tokenizer=tokenizer,
        task=task,
        text_format=dataset.text_format,
        examples=examples,
    )
