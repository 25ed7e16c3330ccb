"""Learning to score trajectories: what a step draws from the generator, how it is labelled, and the update by it.

The generator is the model that the run starts from. It stays as it is, on the mesh of the run; what is trained is the
scorer beside it (`coconut.training.scoring`).
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError, NotFiniteError
from coconut.latent.policies.policy import DrawingPolicy
from coconut.latent.sampling import Given, Sampler, Written, given_columns
from coconut.latent.scorer import DECODER_PART, HEAD_PART, LatentScorer, block_columns, thoughts_of
from coconut.losses import Loss, Term, ratio
from coconut.methods import get_method
from coconut.methods.method import LossContext, Views
from coconut.model import Model, Parameters, Template
from coconut.sharding import constrain, constrain_tree, own_rows, put_rows, replicate, replicated, row_sharding
from coconut.tasks import Task
from coconut.tokenizers import Tokenizer
from coconut.training.config import RunConfig
from coconut.training.learning import StepViews
from coconut.training.samplers import make_sampler
from coconut.training.scoring import chosen, contrastive_loss, labels_of
from coconut.training.state import TrainState
from coconut.training.step import Metrics, TrainStep, make_train_step, make_update, skipped_of
from coconut.types import Batch, Example


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectories(Batch):
    """What is given of each question, with trajectories of its thoughts, labelled.

    Attributes:
      thoughts: what the columns of the thoughts were fed.
      labels_of_thoughts: see `coconut.training.scoring.labels_of`.
      right: whether the own answer of each trajectory is right.
      counted: questions that are part of the loss.
    """

    thoughts: Float[Any, "B G K D"]
    labels_of_thoughts: Float[Any, "B G K"]
    right: Bool[Any, "B G"]
    counted: Bool[Any, " B"]


class Scoring:
    """Learns to score trajectories of thoughts (`coconut.training.scoring`).

    Args:
      config: of the run, which has a ``scorer``.
      template: how to make the model.
      optimizer: of the run.
      mesh: the devices.
      tokenizer: of the run.
      task: judges answers.
      examples: the questions, by the numbers that batches name them by.
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
        examples: Sequence[Example],
    ):
        assert config.scorer is not None
        own = get_method(config.method)
        self._config, self._scorer, self._template, self._mesh = config, config.scorer, template, mesh
        self._tokenizer, self._task, self._examples = tokenizer, task, examples
        self._questions = config.pipeline.batch_size
        self._rows = own_rows(mesh, self._questions, config.microbatches)
        # Only the page that is answered: nothing else is read.
        self.method = dataclasses.replace(own, pages={"main": own.write_to_answer}, loss=self._loss)
        self.step = self._make_step(optimizer)
        self._programs: dict[Any, Any] = {}
        self._compile_seconds = 0.0
        self._key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(config.seed)

    # --- Drawing and labelling ----------------------------------------------------------------------------------

    def views(self, state: TrainState, batches: Iterator[Views], number: int) -> StepViews:
        """Draws trajectories and continuations, and labels each thought by what came of it.

        Raises:
          NotFiniteError: the generator gives numbers that are not finite.
        """
        config, wanted = self._scorer, self._questions
        hosts, drawn, seen = [], [], []
        for attempt in range(config.most_draws):
            hosts.append(next(batches))
            one, own = self._draw(state, hosts[-1], number, attempt)
            drawn.append(one)
            seen.append(own)
            if sum(int(own.live.sum()) for own in seen) >= wanted:
                break
        joined = lambda name: np.concatenate([getattr(own, name) for own in seen])
        real, live, right, examples = (joined(name) for name in ("real", "live", "right", "examples"))
        # Those that are live, in the order in which they were drawn; behind them others, which do not count.
        chosen_rows = np.argsort(~live, kind="stable")[:wanted]
        given, thoughts = self._run(("gather", len(drawn), drawn[0][0].schedule), _gathered, drawn, chosen_rows)
        counted, right_of_chosen = live[chosen_rows], right[chosen_rows]
        labels = np.zeros((*right_of_chosen.shape, thoughts.shape[2]), np.float32)
        if counted.any():
            labels = self._labels(state, given, thoughts, right_of_chosen, examples[chosen_rows], counted, number)
        put = lambda x: put_rows(np.ascontiguousarray(x[self._rows]), self._mesh, wanted)
        views = Trajectories(
            **_fields(given),
            thoughts=thoughts,
            labels_of_thoughts=put(labels),
            right=put(right_of_chosen),
            counted=put(counted),
        )
        mean = lambda values: (float(np.sum(values)), float(np.size(values)))
        metrics = {"right": mean(right[real]), "live": mean(live[real])}
        if counted.any():
            metrics["label"] = mean(labels[counted])
        return StepViews(tuple(hosts), {"main": views}, metrics)

    def abstract_views(self, state: TrainState, host: Views) -> Views:
        """The shapes of the trajectories of a batch, which lie where the questions do."""
        given = put_rows(given_columns(host["main"]), self._mesh, self._questions)
        number = np.int32(0)
        _, thoughts, _ = jax.eval_shape(self._sample, state.parameters, given, self._key, number, number)
        Q, G, K, _ = thoughts.shape
        views = Trajectories(
            **_fields(given),
            thoughts=thoughts,
            labels_of_thoughts=jax.ShapeDtypeStruct((Q, G, K), "float32"),
            right=jax.ShapeDtypeStruct((Q, G), "bool"),
            counted=jax.ShapeDtypeStruct((Q,), "bool"),
        )
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(self._mesh))
        return {"main": jax.tree.map(place, views)}

    def shown(self, state: TrainState, host: Views) -> Mapping[str, Any]:
        """Nothing: what is drawn is the generator's, which does not change."""
        del state, host
        return {}

    def compile_seconds(self) -> float:
        """Seconds that the programs which draw were compiled for since the last call."""
        seconds, self._compile_seconds = self._compile_seconds, 0.0
        return seconds

    def _draw(self, state: TrainState, host: Views, number: int, attempt: int) -> tuple[tuple[Batch, Array], "_Seen"]:
        """Trajectories of a batch, with what is given of its questions, and what came of them."""
        given = put_rows(given_columns(host["main"]), self._mesh, self._questions)
        arguments = (state.parameters, given, self._key, np.int32(number), np.int32(attempt))
        given, thoughts, seen = self._run(("sample", given.schedule), self._sample, *arguments)
        written, examples = jax.tree.map(np.asarray, seen)
        real = examples >= 0
        right = self._right(written, np.repeat(examples, self._scorer.trajectories))
        right = right.reshape(len(examples), -1)
        live = real & right.any(1) & ~right.all(1)
        return (given, thoughts), _Seen(examples, real, live, right)

    def _labels(
        self,
        state: TrainState,
        given: Batch,
        thoughts: Array,
        right: Bool[np.ndarray, "Q G"],
        examples: Int[np.ndarray, " Q"],
        counted: Bool[np.ndarray, " Q"],
        number: int,
    ) -> Float[np.ndarray, "Q G K"]:
        """The labels of some trajectories; those of questions that do not count mean nothing."""
        config, (Q, G, K, _) = self._scorer, thoughts.shape
        arguments = (state.parameters, given, thoughts, self._key, np.int32(number))
        written, counts = jax.tree.map(np.asarray, self._run(("continue", given.schedule), self._continue, *arguments))
        asked = np.where(counted, examples, -1)
        of_rows = np.repeat(asked, G * config.continuations)
        continued = [
            self._right(jax.tree.map(lambda x, k=k: x[k], written), of_rows).reshape(Q, G, config.continuations)
            for k in range(K - 1)
        ]
        none = np.zeros((0, Q, G, config.continuations), bool)
        return labels_of(right, np.stack(continued) if continued else none, counts)

    def _right(self, written: Written, examples: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Which answers are right; those of no example are not."""
        asked = examples >= 0
        if not written.finite[asked].all():
            example = int(examples[asked][np.argmin(written.finite[asked])])
            raise NotFiniteError(f"its samples of training example {example} are not finite")
        # Greedy answers of a question are few.
        known: dict[tuple[int, bytes], bool] = {}
        found = np.zeros(len(examples), bool)
        for row in np.flatnonzero(asked):
            tokens = written.tokens[row, : written.lengths[row]]
            question = (int(examples[row]), tokens.tobytes())
            if question not in known:
                text = self._tokenizer.decode(tokens.tolist())
                known[question] = self._task.check(text, self._examples[examples[row]])
            found[row] = known[question]
        return found

    def _run(self, name: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a program, which is compiled the first time that its name comes up."""
        if name not in self._programs:
            started = time.perf_counter()
            self._programs[name] = jax.jit(function).lower(*arguments).compile()
            self._compile_seconds += time.perf_counter() - started
        return self._programs[name](*arguments)

    # --- Compiled -----------------------------------------------------------------------------------------------

    def _sampler(self, model: Model) -> tuple[Sampler, DrawingPolicy]:
        sampler = make_sampler(self._config, self._tokenizer, model)
        if not isinstance(sampler.policy, DrawingPolicy):
            raise CoconutError(f"ScorerConfig.policy: a {type(sampler.policy).__name__} draws no thoughts")
        return sampler, sampler.policy

    def _keys(self, key: Key[Array, ""], what: int, number: Array, attempt: Array | int, rows: int) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, what), number), attempt)
        return jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(rows))

    def _sample(
        self, parameters: Parameters, given: Batch, key: Key[Array, ""], number: Array, attempt: Array
    ) -> tuple[Batch, Array, Any]:
        """The questions again, the thoughts of their trajectories, and what the host has to see of them."""
        model, group = self._template.model(parameters), self._scorer.trajectories
        sampler, policy = self._sampler(model)
        keys = self._keys(key, _SAMPLING, number, attempt, len(given.tokens) * group)
        samples, written = sampler.sample(model.decoder, given, keys, group, active=given.examples >= 0)
        thoughts = policy.inputs(model.decoder, samples.records)
        used = samples.valid[:, block_columns(samples.schedule)]
        thoughts = jnp.where(used[..., None], thoughts, 0.0).reshape(-1, group, *thoughts.shape[1:])
        return _placed(given), _placed(thoughts), replicate((written, given.examples))

    def _continue(
        self, parameters: Parameters, given: Batch, thoughts: Array, key: Key[Array, ""], number: Array
    ) -> tuple[Written, Array]:
        """What is written behind thoughts drawn anew behind the first ``1, 2, .., K - 1`` of each trajectory."""
        model, many = self._template.model(parameters), self._scorer.continuations
        sampler, _ = self._sampler(model)
        Q, G, K, D = thoughts.shape
        inputs = jnp.repeat(thoughts.reshape(Q * G, K, D), many, axis=0)

        def behind(count: Int[Array, ""]) -> Written:
            keys = self._keys(key, _CONTINUING, number, count, Q * G * many)
            active, begun = given.examples >= 0, Given(inputs, count)
            return sampler.sample(model.decoder, given, keys, G * many, active=active, begun=begun)[1]

        return replicate((jax.lax.map(behind, 1 + jnp.arange(K - 1)), thoughts_of(given)))

    # --- Updating -----------------------------------------------------------------------------------------------

    def _loss(self, model: Model, views: Views, context: LossContext) -> Loss:
        """The loss of some questions' trajectories, and how often the best one by the scorer is right."""
        del context  # No dropout: scores of a trajectory are compared.
        rows = views["main"]
        assert isinstance(rows, Trajectories)
        Q, G, K, D = rows.thoughts.shape
        scorer = scorer_of(model.parts)
        used = jnp.asarray(rows.valid)[:, block_columns(rows.schedule)]
        prefix = scorer.read(rows, rows.examples >= 0)
        scores = scorer.scores(prefix, rows.thoughts.reshape(Q * G, K, D), jnp.repeat(used, G, axis=0))
        scores = scores.reshape(Q, G, K)
        loss = contrastive_loss(scores, rows.labels_of_thoughts, used & rows.counted[:, None])
        seen = jax.lax.stop_gradient(scores)
        metrics = {
            "loss": jax.tree.map(jax.lax.stop_gradient, loss),
            "accuracy": ratio(chosen(seen, rows.right), rows.counted),
            "accuracy_of_one": ratio(rows.right.astype(seen.dtype).mean(1), rows.counted),
        }
        return Loss({"scorer": Term(loss)}, metrics)

    def _make_step(self, optimizer: optax.GradientTransformation) -> TrainStep:
        """The train step: one update, or several by the same trajectories."""
        config, template = self._scorer, self._template
        fields = ("options", "microbatches", "spikes")
        settings = {name: getattr(self._config, name) for name in fields}
        settings["correction_rate"] = self._config.optimizer.correction_rate
        if config.epochs == 1:
            return make_train_step(template, self.method, optimizer, **settings)
        update = make_update(template, self.method, optimizer, **settings)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(
            state: TrainState, views: Views, learning_rate: Float[Array, ""], key: Key[Array, ""]
        ) -> tuple[TrainState, Metrics]:
            one = lambda state, _: update(state, views, learning_rate, key)
            following, metrics = jax.lax.scan(one, state, length=config.epochs)
            metrics = jax.tree.map(lambda x: x.sum(0), metrics)
            metrics["skipped"] = skipped_of(metrics, config.epochs)
            following = dataclasses.replace(following, step=state.step + 1)
            return constrain_tree(following, template.axes), replicate(metrics)

        return step


_SAMPLING, _CONTINUING = zlib.crc32(b"trajectories"), zlib.crc32(b"continuations")  # Keep the run's draws apart.


class _Seen(NamedTuple):
    """What the host knows of the trajectories of a batch."""

    examples: Int[np.ndarray, " Q"]
    real: Bool[np.ndarray, " Q"]
    live: Bool[np.ndarray, " Q"]
    right: Bool[np.ndarray, "Q G"]


def scorer_of(parts: Mapping[str, Any]) -> LatentScorer:
    """The scorer of a model's parts, which has one."""
    return LatentScorer(parts[DECODER_PART], parts[HEAD_PART])


def _placed(tree: Any) -> Any:
    """Arrays whose rows lie where those of a batch do."""
    return jax.tree.map(lambda x: constrain(jnp.asarray(x), "rows", *["features"] * (x.ndim - 1)), tree)


def _gathered(drawn: Sequence[tuple[Batch, Array]], rows: Int[Array, " Q"]) -> tuple[Batch, Array]:
    """Some rows of several batches."""
    return _placed(jax.tree.map(lambda *parts: jnp.concatenate(parts)[rows], *drawn))


def _fields(batch: Batch) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
