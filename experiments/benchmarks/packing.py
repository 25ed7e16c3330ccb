"""What packing saves: padding, and the time of a training step, with several examples a row over one.

    taskset -c 1 python -m experiments.benchmarks.packing --gsm8k gsm8k_train.jsonl icot_train.txt

A step is the project's own: loss, gradients, metrics, AdamW, on a batch of the data pipeline, without dropout. It is
packed in two ways, with two and with four examples a row; all three forms hold the same examples and take turns.
Time is that of a first batch; the share of padding is that of an epoch, and of one in batches of 128, as the papers do.

ProsQA is generated; questions of GSM8K come from files, in any form that the task reads. A decoder of two layers is
timed at stages that make no, two and six thoughts, as the papers' curricula have them, and a wide one at the last of
them: rows as many times as long cost attention, which weighs less the wider a model is.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coconut.batching import Shape
from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig, load_dataset, make_tokenizer
from coconut.methods.coconut import COCONUT
from coconut.model import Template, make_model, parameters_of
from coconut.models.config import DecoderConfig
from coconut.pages import Markers, Placing
from coconut.pipeline import BatchSource, PipelineConfig
from coconut.tokenizers import TokenizedExample, Tokenizer
from coconut.training.optimizer import OptimizerConfig, make_optimizer
from coconut.training.state import TrainState, make_state
from coconut.training.step import make_train_step
from coconut.types import Batch
from experiments.benchmarks import timing

OPTIMIZER = OptimizerConfig()
BATCH_OF_THE_PAPERS = 128


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is timed of each data set.

    Attributes:
      width: of the decoder.
      batch: examples of a batch.
      thoughts: of the stages.
      per_row: examples a row, beside one.
      layers: of the decoder.
    """

    width: int
    batch: int
    thoughts: tuple[int, ...]
    per_row: tuple[int, ...] = (2, 4)
    layers: int = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      cases: what is timed, by name.
      questions: questions of a data set, at most.
      vocab_size: of the tokenizer that is trained on questions of GSM8K.
      rounds: rounds timed where the command line does not say.
    """

    cases: Mapping[str, Geometry]
    questions: int = 3_000
    vocab_size: int = 2_000
    rounds: int = 5


CASES = {
    "narrow": Geometry(width=256, batch=32, thoughts=(0, 2, 6)),
    "wide": Geometry(width=768, batch=16, thoughts=(6,)),
}
SIZES = Sizes(CASES)
SMOKE = Sizes(
    {"narrow": Geometry(width=16, batch=4, thoughts=(2,), per_row=(2,), layers=1)},
    questions=24,
    vocab_size=300,
    rounds=2,
)


@dataclasses.dataclass(frozen=True)
class Questions:
    """A data set that is measured.

    Attributes:
      name: in the report.
      tokenizer: its tokenizer.
      kind: which that is.
      examples: its questions.
      curriculum: that of its paper.
    """

    name: str
    tokenizer: Tokenizer
    kind: str
    examples: Sequence[TokenizedExample]
    curriculum: CurriculumConfig


def read_questions(task: str, name: str, train: int | str, kind: str, c_thought: int, sizes: Sizes) -> Questions:
    """The first questions of a data set, and a tokenizer trained on all of them.

    Raises:
      CoconutError: the data cannot be read.
    """
    own: dict[str, Any] = {"vocab_size": sizes.vocab_size} if kind == "byte_pair" else {}
    config = DataConfig(task=task, train=train, validation=0, test=0, tokenizer=kind, **own)  # pyright: ignore[reportArgumentType]
    dataset = load_dataset(config)
    tokenizer = make_tokenizer(config, dataset.splits["train"])
    examples = dataset.tokenized("train", tokenizer)[: sizes.questions]
    curriculum = CurriculumConfig(c_thought=c_thought, max_latent_stage=6 // c_thought)
    return Questions(name, tokenizer, kind, examples, curriculum)


def sources(questions: Questions, thoughts: int, per_row: Sequence[int], batch: int) -> dict[int, BatchSource]:
    """The batches of a stage, by the number of examples a row."""
    curriculum = questions.curriculum
    placing = Placing(
        curriculum=curriculum,
        stage=thoughts // curriculum.c_thought,
        options=COCONUT.options(),
        markers=Markers.of(questions.tokenizer),
    )
    return {
        number: BatchSource(
            *(questions.examples, questions.tokenizer, COCONUT, placing),
            PipelineConfig(batch_size=batch, examples_per_row=number),
            seed=0,
        )
        for number in (1, *per_row)
    }


def padding_of(source: BatchSource) -> dict[str, Any]:
    """The share of an epoch's columns that are padding, what its batches are shaped like, and how many are wide.

    The last batch of the epoch, which is not full, is left out: its empty rows are the same however it is packed.
    """
    batches = [source[number]["main"] for number in range(source.batches_per_epoch - 1)]
    schedules = [batch.schedule for batch in batches]
    [columns] = {batch.tokens.shape[1] for batch in batches[:1]}
    packed = source.packed_shapes[0]["main"] if source.packed_shapes else []
    narrow: Shape | None = packed[0] if packed else None
    return {
        "rows": len(batches[0].tokens),
        "columns": columns,
        "padding": float(np.mean([1 - batch.valid.mean() for batch in batches])),
        "wide_batches": sum(schedule != narrow.schedule(feeds_back=True) for schedule in schedules) if narrow else 0,
    }


class Trainer:
    """A model in training, whose compiled steps train the one state, which each of them donates."""

    def __init__(self, decoder: DecoderConfig):
        self._optimizer = make_optimizer(OPTIMIZER)
        make = lambda key: make_model(decoder, key)
        self._template = Template.of(jax.eval_shape(make, jax.random.key(0)))
        start = lambda key: make_state(self._template, parameters_of(make(key)), self._optimizer)
        self.state: TrainState = jax.jit(start)(jax.random.key(0))
        self.losses: dict[int, float] = {}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.state.parameters))

    def step(self, per_row: int, batch: Batch) -> tuple[Callable[[], None], int | None]:
        """A function that takes one step, and the temporary memory of its program in bytes, where XLA tells.

        Its first loss, from the parameters the model starts with, is kept in ``losses``.
        """
        inputs = ({"main": jax.device_put(batch)}, jnp.asarray(OPTIMIZER.learning_rate), jax.random.key(1))
        train_step: Any = make_train_step(self._template, COCONUT, self._optimizer)
        program = train_step.lower(self.state, *inputs).compile()
        memory = program.memory_analysis()
        _, metrics = program(jax.tree.map(jnp.copy, self.state), *inputs)
        self.losses[per_row] = float(metrics["loss"].mean())

        def take() -> None:
            self.state, metrics = program(self.state, *inputs)
            jax.block_until_ready((self.state, metrics))

        return take, None if memory is None else int(memory.temp_size_in_bytes)


def measure(questions: Questions, thoughts: int, geometry: Geometry, rounds: int) -> dict[str, Any]:
    """One stage of one data set by one decoder."""
    width = geometry.width
    title = f"{questions.name}, {thoughts} thoughts, width {width}"
    batches = sources(questions, thoughts, geometry.per_row, geometry.batch)
    large = min(BATCH_OF_THE_PAPERS, len(questions.examples) // 8 * 4)
    padding = {n: padding_of(source) for n, source in sources(questions, thoughts, geometry.per_row, large).items()}
    longest = max(shape["main"].positions for shape in batches[1].shapes)
    decoder = DecoderConfig(
        vocab_size=questions.tokenizer.vocab_size,
        num_layers=geometry.layers,
        embed_dim=width,
        num_heads=max(width // 64, 1),
        max_positions=longest,
    )
    trainer = Trainer(decoder)
    steps = {per_row: trainer.step(per_row, source[0]["main"]) for per_row, source in batches.items()}
    seconds = timing.interleave({f"{n} a row": take for n, (take, _) in steps.items()}, rounds, title=title)
    forms = {}
    for per_row, source in batches.items():
        name = f"{per_row} a row"
        forms[name] = {
            **padding_of(source),
            f"at_batch_{large}": padding[per_row],
            **timing.ratio(seconds[name], seconds["1 a row"]),
            **timing.summary(seconds[name]),
            "temporary_bytes": steps[per_row][1],
            "loss": trainer.losses[per_row],
        }
    shown = "; ".join(
        f"{name}: padding {x['padding']:.1%} ({x[f'at_batch_{large}']['padding']:.1%}), time {x['ratio']:.3f}"
        for name, x in forms.items()
    )
    print(f"({title}) {shown}", flush=True)
    return {
        "questions": len(questions.examples),
        "tokenizer": questions.kind,
        "vocab_size": questions.tokenizer.vocab_size,
        "batch": geometry.batch,
        "thoughts": thoughts,
        "num_layers": geometry.layers,
        "embed_dim": width,
        "num_heads": decoder.num_heads,
        "dtype": "float32",
        "parameters": trainer.parameters,
        "rounds": rounds,
        "forms": forms,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures and reports."""
    parser = timing.parser("What packing saves: padding and time.")
    parser.add_argument(
        "--gsm8k", type=Path, nargs="*", default=[], help="files of GSM8K's questions; each is measured"
    )
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help="which decoder")
    parser.add_argument("--note", help="kept in the report, such as what ran beside it")
    options = parser.parse_args(arguments)
    sizes = SMOKE if options.smoke else SIZES
    sets = [read_questions("prosqa", "ProsQA", sizes.questions, "words", 1, sizes)]
    sets += [read_questions("gsm8k", path.name, str(path), "byte_pair", 2, sizes) for path in options.gsm8k]
    report = timing.Report("packing", options)
    if options.note is not None:
        report.add("note", options.note)
    for name, geometry in sizes.cases.items():
        if options.case not in (name, "all"):
            continue
        for questions in sets:
            for thoughts in geometry.thoughts:
                case = measure(questions, thoughts, geometry, options.repeats or sizes.rounds)
                report.add(f"{questions.name}, {thoughts} thoughts, {name}", case)
    report.finish()


if __name__ == "__main__":
    main()
