"""What a batch is worth: examples per second of the whole way from a prompt to a text, by batch size.

    python -m experiments.benchmarks.generate [--case a|b|all] [--against transformers]

Case (a) is a small decoder, (b) GPT-2 small. Prompt, thoughts, end marker and new tokens go through the programs of
`coconut.latent.generate`, as evaluation sends them (`coconut.evaluation.answers`), from numpy and back. Tokens are the
most likely ones, and the id of EOS is one behind the vocabulary, which no logit belongs to: no row ends early, and
every row writes all of its tokens.

``--against transformers`` adds Hugging Face's cached `generate` of as many tokens without thoughts, with the same
weights: with both of its attentions as they ship them, and with PyTorch's own kernel of the activation.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coconut.latent.generate import SamplingConfig, decode, prefill, prefill_program, think_on, think_program
from coconut.model import Model, make_model
from coconut.models.config import DecoderConfig, ExecutionConfig
from experiments.benchmarks import pytorch_rollouts, timing
from experiments.benchmarks.latent_step import GPT2_SMALL


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is generated.

    Attributes:
      decoder: the model.
      execution: how it is run.
      batches: batch sizes, rising; each divides the last.
      prompt: tokens read first.
      thoughts: thoughts of every row.
      new_tokens: tokens written by every row.
      rounds: rounds timed where the command line does not say.
    """

    decoder: DecoderConfig
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    batches: tuple[int, ...] = (1, 16, 64)
    prompt: int = 160
    thoughts: int = 6
    new_tokens: int = 32
    rounds: int = 7


WORKLOADS = {
    "a": Workload(DecoderConfig(vocab_size=2_000, num_layers=2, embed_dim=256, num_heads=8, max_positions=256)),
    "b": Workload(GPT2_SMALL, batches=(1, 8), rounds=5),
}
SMOKE = Workload(
    DecoderConfig(vocab_size=50, num_layers=2, embed_dim=32, num_heads=2, max_positions=64),
    batches=(1, 2, 4),
    prompt=16,
    thoughts=2,
    new_tokens=4,
    rounds=2,
)

PROGRAMS: dict[str, Any] = {"prefill": prefill_program, "think_on": think_program, "decode": decode}


class Generator:
    """Answers batches, and counts the programs compiled for them.

    Attributes:
      compilations: programs compiled so far, by what they do.
    """

    def __init__(self, workload: Workload, model: Model) -> None:
        self.workload, self.model = workload, model
        self.compilations: Counter[str] = Counter()

    def answer(self, prompts: np.ndarray) -> np.ndarray:
        """The tokens written behind ``prompts`` of shape ``[B, P]``."""
        model, workload, rows = self.model, self.workload, len(prompts)
        before = {name: program._cache_size() for name, program in PROGRAMS.items()}
        prefix = prefill(model.decoder, jnp.asarray(prompts), jnp.ones(prompts.shape, bool))
        counts = jnp.full(rows, workload.thoughts, jnp.int32)
        prefix, thoughts = think_on(model.decoder, model.feedback, prefix, counts, room=workload.thoughts)
        np.asarray(thoughts)
        generated = decode(
            model.decoder,
            prefix,
            jnp.ones(rows, bool),
            jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(rows)),
            forced=jnp.zeros((rows, 1), jnp.int32),  # where the end marker stands
            sampling=SamplingConfig(max_new_tokens=workload.new_tokens),
            eos_id=workload.decoder.vocabulary,
        )
        if not (np.asarray(generated.lengths) == workload.new_tokens).all():
            raise AssertionError("a row ended early")
        for name, program in PROGRAMS.items():
            self.compilations[name] += program._cache_size() - before[name]
        return np.asarray(generated.tokens)


def measure(name: str, workload: Workload, rounds: int, *, against_transformers: bool) -> dict[str, Any]:
    """Examples per second by batch size. In every round each side answers the same examples at each batch size."""
    examples = workload.batches[-1]
    prompts = np.random.default_rng(0).integers(0, workload.decoder.vocabulary, (examples, workload.prompt), np.int32)
    model = jax.jit(lambda key: make_model(workload.decoder, key, execution=workload.execution))(jax.random.key(0))
    generators = {batch: Generator(workload, model) for batch in workload.batches}
    sides: dict[str, tuple[int, Callable[[np.ndarray], object]]] = {
        f"batch {batch}": (batch, generator.answer) for batch, generator in generators.items()
    }
    described: dict[str, Any] = {}
    if against_transformers:
        models, described = pytorch_rollouts.load(model.decoder)
        pytorch_rollouts.check_same(model.decoder, models, prompts[:2])
        for batch in workload.batches:
            for other, theirs in models.items():
                writing = pytorch_rollouts.writing(theirs, new_tokens=workload.new_tokens)
                sides[f"batch {batch}, {other}"] = (batch, writing)

    def turn(batch: int, answer: Callable[[np.ndarray], object]) -> Callable[[], None]:
        def take() -> None:
            for start in range(0, examples, batch):
                answer(prompts[start : start + batch])

        return take

    turns = {side: turn(*what) for side, what in sides.items()}
    seconds = timing.interleave(turns, rounds, title=f"generate {name}")
    rows = {}
    for side, times in seconds.items():
        rows[side] = {
            **timing.quartiles("examples_per_second", examples / times),
            "best_examples_per_second": float(examples / times.min()),
            **timing.summary(times),
        }
        print(f"({name}) {side}: {rows[side]['examples_per_second']:.2f} examples/s")
    for batch, generator in generators.items():
        rows[f"batch {batch}"]["compilations"] = dict(generator.compilations)
    speedups = {}
    for batch in workload.batches:
        ours = seconds[f"batch {batch}"]
        if batch != examples:
            speedups[f"batch {examples} over batch {batch}"] = timing.ratio(ours, seconds[f"batch {examples}"])
        if against_transformers:
            stock = [f"batch {batch}, {other}" for other in pytorch_rollouts.STOCK]
            fastest = min(stock, key=lambda side: float(np.median(seconds[side])))
            speedups[f"batch {batch} over transformers"] = timing.ratio(seconds[fastest], ours)
            fused = f"batch {batch}, {pytorch_rollouts.FUSED}"
            speedups[f"batch {batch} over {pytorch_rollouts.FUSED}"] = timing.ratio(seconds[fused], ours)
    for what, speedup in speedups.items():
        print(f"({name}) {what}: {speedup['ratio']:.2f} times the examples/s")
    compilations = sum((generator.compilations for generator in generators.values()), Counter())
    for program, count in compilations.items():
        print(f"({name}) {program}: {count} compilations for {len(workload.batches)} batch sizes")
    return {
        **{field: getattr(workload.decoder, field) for field in ("num_layers", "embed_dim", "num_heads", "vocab_size")},
        "prompt": workload.prompt,
        "thoughts": workload.thoughts,
        "new_tokens": workload.new_tokens,
        "examples": examples,
        "rounds": rounds,
        "speedups": speedups,
        "compilations": dict(compilations),
        "sides": rows,
        **described,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark.

    Raises:
      SystemExit: Hugging Face's model is asked for and cannot take part.
    """
    parser = timing.parser("Examples per second of generation with thoughts, by batch size.")
    parser.add_argument("--case", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--against", choices=["transformers"], help="time Hugging Face's generate without thoughts")
    options = parser.parse_args(arguments)
    if options.against and (reason := pytorch_rollouts.absence()):
        parser.error(f"--against transformers: {reason}")
    report = timing.Report("generate", options)
    for name in WORKLOADS if options.case == "all" else [options.case]:
        workload = SMOKE if options.smoke else WORKLOADS[name]
        rounds = options.repeats or workload.rounds
        report.add(name, measure(name, workload, rounds, against_transformers=options.against is not None))
    report.finish()


if __name__ == "__main__":
    main()
