"""What thoughts cost: a training step with K of them over a plain teacher-forced step on the same tokens.

    python -m experiments.benchmarks.latent_step [--case a|b|c|all] [--against transformers] [--attention xla]

A step is the project's own (`coconut.training.step.make_train_step`): loss, gradients, metrics, AdamW, the state
donated. Both alternatives have ``prompt + K + answer`` columns, make logits at the labels alone, and no dropout; the
plain one reads all columns in one parallel pass, where the other makes its K in the middle one after the other. It is
timed in two forms: ``ratio`` is over this project's own, which like the step with thoughts leaves out the columns of
the last layer that nobody reads (`Decoder.trunk`); ``ratio_to_every_column`` is over the usual one, with all columns in
all layers.

Case (a) is a small decoder, (b) GPT-2 small, (c) is (a) with 0 to 32 thoughts. ``--against transformers`` times Hugging
Face's GPT-2 (PyTorch, CPU) without thoughts against this project's with thoughts, on (a) and (b).
"""

import dataclasses
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from coconut.methods.coconut import COCONUT
from coconut.model import Template, make_model, parameters_of
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.training.optimizer import OptimizerConfig, make_optimizer
from coconut.training.state import TrainState, make_state
from coconut.training.step import make_train_step
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, Schedule
from experiments.benchmarks import pytorch_steps, timing

OPTIMIZER = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a case.

    Attributes:
      decoder: the model.
      batch: rows.
      thoughts: columns between prompt and answer; where they are several, all are timed.
      rounds: rounds timed where the command line does not say.
      prompt: columns before the thoughts.
      answer: columns behind the thoughts, all of them labelled.
      execution: how the model is run.
    """

    decoder: DecoderConfig
    batch: int
    thoughts: tuple[int, ...]
    rounds: int
    prompt: int = 160
    answer: int = 20
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)


SMALL = DecoderConfig(vocab_size=2_000, num_layers=2, embed_dim=256, num_heads=8, max_positions=256)
GPT2_SMALL = DecoderConfig(vocab_size=50_260, num_layers=12, embed_dim=768, num_heads=12, max_positions=1_024)
CASES = {
    "a": Geometry(SMALL, batch=32, thoughts=(6,), rounds=7),
    "b": Geometry(GPT2_SMALL, batch=4, thoughts=(6,), rounds=5),
    "c": Geometry(SMALL, batch=32, thoughts=(0, 1, 2, 4, 8, 16, 32), rounds=7),
}


def smoke(geometry: Geometry) -> Geometry:
    """The same case with sizes that run in seconds."""
    return dataclasses.replace(
        geometry,
        decoder=DecoderConfig(vocab_size=50, num_layers=2, embed_dim=32, num_heads=2, max_positions=64),
        batch=2,
        thoughts=geometry.thoughts if len(geometry.thoughts) == 1 else (0, 1, 2),
        rounds=2,
        prompt=16,
        answer=4,
    )


def random_batch(geometry: Geometry, thoughts: int, schedule: Schedule) -> Batch:
    """Rows without padding, the same tokens whatever the schedule."""
    rows, columns = geometry.batch, geometry.prompt + thoughts + geometry.answer
    tokens = np.random.default_rng(0).integers(0, geometry.decoder.vocabulary, (rows, columns)).astype(np.int32)
    labels = np.full(tokens.shape, IGNORED_LABEL, np.int32)
    labels[:, -geometry.answer :] = tokens[:, -geometry.answer :]
    labelled = labels != IGNORED_LABEL
    return Batch(
        schedule=schedule,
        tokens=tokens,
        positions=np.tile(np.arange(columns, dtype=np.int32), (rows, 1)),
        valid=np.ones(tokens.shape, bool),
        labels=labels,
        pieces=np.where(labelled, 0, -1).astype(np.int32),
        answers=labelled,
        before_answer=np.full(rows, columns - geometry.answer - 1, np.int32),
        examples=np.arange(rows, dtype=np.int32),
    )


def plain_schedule(geometry: Geometry, thoughts: int) -> Schedule:
    """All columns in one parallel pass."""
    return (Language(geometry.prompt + thoughts + geometry.answer, geometry.answer),)


def latent_schedule(geometry: Geometry, thoughts: int) -> Schedule:
    """Thoughts between prompt and answer; the plain schedule where there are none."""
    if not thoughts:
        return plain_schedule(geometry, 0)
    return (Language(geometry.prompt), Latent(thoughts), Language(geometry.answer, geometry.answer))


class Asked(NamedTuple):
    """A step that a `Trainer` is asked for; the arguments of `Trainer.step`."""

    thoughts: int
    schedule: Schedule
    every_column: bool = False


class Trainer:
    """A model in training, with a compiled step for each batch it was shown.

    All steps train the one state, which each of them donates: alternatives share its memory.

    Attributes:
      metrics: of the step that was taken last.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.optimizer = make_optimizer(OPTIMIZER)
        make = lambda key: make_model(geometry.decoder, key, execution=geometry.execution)
        key = jax.random.key(0)
        self.template = Template.of(jax.eval_shape(make, key))
        start = lambda key: make_state(self.template, parameters_of(make(key)), self.optimizer)
        self.state: TrainState = jax.jit(start)(key)
        self.metrics: Mapping[str, Any] = {}
        self._compiled: dict[Asked, tuple[Callable[[], None], int | None]] = {}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.state.parameters))

    def step(
        self, thoughts: int, schedule: Schedule, *, every_column: bool = False
    ) -> tuple[Callable[[], None], int | None]:
        """A function that takes one step, and the temporary memory of its program in bytes, where XLA tells.

        Args:
          thoughts: columns between prompt and answer.
          schedule: their spans.
          every_column: run the columns that nobody reads through the last layer, too.
        """
        [step] = self.steps([Asked(thoughts, schedule, every_column)])
        return step

    def steps(self, asked: Sequence["Asked"]) -> list[tuple[Callable[[], None], int | None]]:
        """As `step`, for several at once: their programs are compiled beside each other."""
        missing = [one for one in dict.fromkeys(asked) if one not in self._compiled]
        lowered = [self._lower(one) for one in missing]
        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(lambda x: x[0].compile(), lowered))
        for one, program, (_, inputs) in zip(missing, programs, lowered, strict=True):
            self._compiled[one] = self._runner(program, inputs)
        return [self._compiled[one] for one in asked]

    def _lower(self, asked: "Asked") -> tuple[Any, tuple[Any, ...]]:
        """The step before it is compiled, and its inputs besides the state."""
        views = {"main": jax.device_put(random_batch(self.geometry, asked.thoughts, asked.schedule))}
        inputs = (views, jnp.asarray(OPTIMIZER.learning_rate), jax.random.key(1))
        train_step: Any = make_train_step(self.template, COCONUT, self.optimizer)
        every = lambda decoder, columns, wanted, *, drops=False: columns
        skips = mock.patch.object(Decoder, "seen_by_last_layer", every) if asked.every_column else nullcontext()
        with skips:
            return train_step.lower(self.state, *inputs), inputs

    def _runner(self, program: Any, inputs: tuple[Any, ...]) -> tuple[Callable[[], None], int | None]:
        memory = program.memory_analysis()

        def take() -> None:
            self.state, self.metrics = program(self.state, *inputs)
            jax.block_until_ready((self.state, self.metrics))

        return take, None if memory is None else int(memory.temp_size_in_bytes)


def measure_ratio(name: str, geometry: Geometry, rounds: int) -> dict[str, Any]:
    """Cases (a) and (b): time and memory with thoughts over those without."""
    trainer, [thoughts] = Trainer(geometry), geometry.thoughts
    latent, latent_memory = trainer.step(thoughts, latent_schedule(geometry, thoughts))
    plain, plain_memory = trainer.step(thoughts, plain_schedule(geometry, thoughts))
    whole, whole_memory = trainer.step(thoughts, plain_schedule(geometry, thoughts), every_column=True)
    variants = {"latent": latent, "plain": plain, "plain, every column": whole}
    seconds = timing.interleave(variants, rounds, title=f"({name})")
    to_whole = seconds["latent"] / seconds["plain, every column"]
    result = {
        **describe(geometry, trainer, rounds),
        "thoughts": thoughts,
        **timing.ratio(seconds["latent"], seconds["plain"]),
        **timing.quartiles("ratio_to_every_column", to_whole),
        "latent": {**timing.summary(seconds["latent"]), "temporary_bytes": latent_memory},
        "plain": {**timing.summary(seconds["plain"]), "temporary_bytes": plain_memory},
        "plain, every column": {
            **timing.summary(seconds["plain, every column"]),
            "temporary_bytes": whole_memory,
        },
        "memory_ratio": latent_memory / plain_memory if latent_memory and plain_memory else None,
    }
    print(
        f"({name}) {thoughts} thoughts over plain, time: {result['ratio']:.3f}; "
        f"over plain with every column in every layer: {result['ratio_to_every_column']:.3f}"
    )
    if result["memory_ratio"] is not None:
        print(f"({name}) {thoughts} thoughts over plain, temporary memory: {result['memory_ratio']:.3f}")
    return result


def measure_slope(name: str, geometry: Geometry, rounds: int) -> dict[str, Any]:
    """Case (c): how the cost grows with the number of thoughts.

    ``slope`` is that of the step with thoughts, in plain steps without thoughts per thought; ``plain_slope`` is that of
    the plain step by the same columns, and contained in it; ``slope_to_every_column`` is ``slope`` in plain steps with
    all columns in all layers. Without thoughts both are one program, timed twice: how far the first ratio is from 1
    tells how well ratios were measured.
    """
    trainer, variants = Trainer(geometry), {}
    for thoughts in geometry.thoughts:
        variants[f"latent {thoughts}"], _ = trainer.step(thoughts, latent_schedule(geometry, thoughts))
        variants[f"plain {thoughts}"], _ = trainer.step(thoughts, plain_schedule(geometry, thoughts))
    variants["every column"], _ = trainer.step(0, plain_schedule(geometry, 0), every_column=True)
    seconds = timing.interleave(variants, rounds, title=f"({name})")
    unit, whole = seconds["plain 0"], seconds["every column"]
    rows = []
    for thoughts in geometry.thoughts:
        latent, plain = seconds[f"latent {thoughts}"], seconds[f"plain {thoughts}"]
        rows.append(
            {
                "thoughts": thoughts,
                **timing.ratio(latent, plain),
                "latent_plain_steps": float(np.median(latent / unit)),
                "plain_plain_steps": float(np.median(plain / unit)),
                "latent_whole_steps": float(np.median(latent / whole)),
                "latent": timing.summary(latent),
                "plain": timing.summary(plain),
            }
        )
        print(
            f"({name}) {thoughts:2d} thoughts over plain: {rows[-1]['ratio']:.3f}; "
            f"over plain without their columns: {rows[-1]['latent_plain_steps']:.3f}"
        )
    latent_fit = fit_line(geometry.thoughts, [row["latent_plain_steps"] for row in rows])
    plain_fit = fit_line(geometry.thoughts, [row["plain_plain_steps"] for row in rows])
    whole_fit = fit_line(geometry.thoughts, [row["latent_whole_steps"] for row in rows])
    print(
        f"({name}) plain steps per thought: {latent_fit['slope']:.4f} (plain columns: {plain_fit['slope']:.4f}), "
        f"residual {latent_fit['residual']:.4f}; plain steps with every column: {whole_fit['slope']:.4f}"
    )
    return {
        **describe(geometry, trainer, rounds),
        **latent_fit,
        **{f"plain_{key}": value for key, value in plain_fit.items()},
        "slope_to_every_column": whole_fit["slope"],
        "every column": timing.summary(whole),
        "rows": rows,
    }


def fit_line(x: tuple[int, ...], y: list[float]) -> dict[str, float]:
    """The least-squares line, the root mean square and the largest of its residuals, and the variance it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - (intercept + slope * np.asarray(x))
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "residual": float(np.sqrt(np.mean(residuals**2))),
        "largest_residual": float(np.abs(residuals).max()),
        "r_squared": float(1 - residuals.var() / np.var(y)),
    }


def measure_against_transformers(name: str, geometry: Geometry, rounds: int) -> dict[str, Any]:
    """This project's step with thoughts over Hugging Face's step without.

    ``ratio`` is over the faster of their two attentions, in GPT-2 as they ship it. Its activation is many elementwise
    passes; ``ratio_fused_activation`` is over theirs with PyTorch's own kernel of the same function.
    """
    trainer, [thoughts] = Trainer(geometry), geometry.thoughts
    latent, _ = trainer.step(thoughts, latent_schedule(geometry, thoughts))
    others, described = transformers_steps(geometry, thoughts, trainer.parameters)
    seconds = timing.interleave({"latent": latent, **others}, rounds, title=f"({name})")
    stock = min(("eager", "sdpa"), key=lambda variant: float(np.median(seconds[variant])))
    result = {
        **describe(geometry, trainer, rounds),
        **described,
        "thoughts": thoughts,
        "attention": stock,
        **timing.ratio(seconds["latent"], seconds[stock]),
        "ratio_fused_activation": timing.ratio(seconds["latent"], seconds["sdpa, fused activation"])["ratio"],
        "latent": timing.summary(seconds["latent"]),
        "transformers": {variant: timing.summary(seconds[variant]) for variant in others},
    }
    print(
        f"({name}) {thoughts} thoughts over transformers without ({stock} attention): {result['ratio']:.3f}; "
        f"with a fused activation: {result['ratio_fused_activation']:.3f}"
    )
    return result


def transformers_steps(
    geometry: Geometry, thoughts: int, parameters: int
) -> tuple[Mapping[str, Callable[[], None]], dict[str, Any]]:
    """Plain training steps of Hugging Face's GPT-2, by what they differ in, and what they were run with.

    As favourable to it as to this project: logits at the labels alone, no dropout, no cache, PyTorch's fused AdamW,
    every core. All of them train one model.
    """
    trainer = pytorch_steps.TorchTrainer(geometry.decoder, OPTIMIZER, parameters)
    batch = random_batch(geometry, thoughts, plain_schedule(geometry, thoughts))
    plain = functools.partial(trainer.plain, batch.tokens, geometry.answer)
    return {
        "eager": plain(attention="eager"),
        "sdpa": plain(attention="sdpa"),
        "sdpa, fused activation": plain(attention="sdpa", fused_activation=True),
    }, trainer.described


def describe(geometry: Geometry, trainer: Trainer, rounds: int) -> dict[str, Any]:
    """The sizes a case was run with."""
    sizes = ("num_layers", "embed_dim", "num_heads", "vocab_size")
    return {
        **{field: getattr(geometry.decoder, field) for field in sizes},
        "dtype": geometry.execution.dtype,
        "attention": geometry.execution.attention,
        "parameters": trainer.parameters,
        "batch": geometry.batch,
        "prompt": geometry.prompt,
        "answer": geometry.answer,
        "rounds": rounds,
    }


MEASURES = {"a": measure_ratio, "b": measure_ratio, "c": measure_slope}


def main(arguments: list[str] | None = None) -> None:
    """Runs the cases asked for."""
    parser = timing.parser("Training step with thoughts over a plain step on the same tokens.")
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--against", choices=["transformers"], help="time Hugging Face's GPT-2 without thoughts")
    parser.add_argument("--attention", choices=["dense", "xla"], default="dense", help="ExecutionConfig.attention")
    options = parser.parse_args(arguments)
    measures = MEASURES
    if options.against:
        if options.case == "c":
            parser.error("--against transformers has the cases a and b")
        if jax.default_backend() != "cpu":
            parser.error(f"--against transformers compares CPUs, and JAX runs on {jax.default_backend()}")
        for package in ("torch", "transformers"):
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                parser.error(f"--against transformers needs {package}: pip install 'coconut-jax[test]'")
        measures = dict.fromkeys("ab", measure_against_transformers)
    report = timing.Report("latent_step", options)
    for name in measures if options.case == "all" else [options.case]:
        geometry = smoke(CASES[name]) if options.smoke else CASES[name]
        geometry = dataclasses.replace(geometry, execution=ExecutionConfig(attention=options.attention))
        case = measures[name](name, geometry, options.repeats or geometry.rounds)
        report.add(f"{name} against {options.against}" if options.against else name, case)
        sys.stdout.flush()
    report.finish()


if __name__ == "__main__":
    main()
