"""What a batch is worth: examples per second of the whole way from a prompt to a text, by batch size.

    python -m experiments.benchmarks.generate

Prompt, thoughts, end marker and new tokens go through the programs of `coconut.latent.generate`, as evaluation sends
them (`coconut.evaluation.answers`), from numpy and back. Tokens are the most likely ones, and the id of EOS is one
behind the vocabulary, which no logit belongs to: no row ends early, and every row writes all of its tokens.
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
from experiments.benchmarks import timing


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


WORKLOAD = Workload(DecoderConfig(vocab_size=2_000, num_layers=2, embed_dim=256, num_heads=8, max_positions=256))
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


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Examples per second by batch size. In every round each batch size answers the same examples."""
    examples = workload.batches[-1]
    prompts = np.random.default_rng(0).integers(0, workload.decoder.vocabulary, (examples, workload.prompt), np.int32)
    model = jax.jit(lambda key: make_model(workload.decoder, key, execution=workload.execution))(jax.random.key(0))
    generators = {batch: Generator(workload, model) for batch in workload.batches}

    def variant(batch: int) -> Callable[[], None]:
        def take() -> None:
            for start in range(0, examples, batch):
                generators[batch].answer(prompts[start : start + batch])

        return take

    seconds = timing.interleave({str(batch): variant(batch) for batch in workload.batches}, rounds, title="generate")
    rows = {}
    for batch in workload.batches:
        times = seconds[str(batch)]
        rows[str(batch)] = {
            "examples_per_second": float(examples / np.median(times)),
            "best_examples_per_second": float(examples / times.min()),
            **timing.summary(times),
            "compilations": dict(generators[batch].compilations),
        }
        print(f"batch {batch:2d}: {rows[str(batch)]['examples_per_second']:.2f} examples/s")
    speedup = timing.ratio(seconds[str(workload.batches[0])], seconds[str(examples)])
    compilations = sum((generator.compilations for generator in generators.values()), Counter())
    print(f"batch {examples} over batch {workload.batches[0]}: {speedup['ratio']:.2f} times the examples/s")
    for name, count in compilations.items():
        print(f"{name}: {count} compilations for {len(workload.batches)} batch sizes")
    return {
        **{field: getattr(workload.decoder, field) for field in ("num_layers", "embed_dim", "num_heads", "vocab_size")},
        "prompt": workload.prompt,
        "thoughts": workload.thoughts,
        "new_tokens": workload.new_tokens,
        "examples": examples,
        "rounds": rounds,
        **speedup,
        "compilations": dict(compilations),
        "batches": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = timing.parser("Examples per second of generation with thoughts, by batch size.").parse_args(arguments)
    workload = SMOKE if options.smoke else WORKLOAD
    cases = {"a": measure(workload, options.repeats or workload.rounds)}
    timing.report("generate", cases, smoke=options.smoke, output=options.output)


if __name__ == "__main__":
    main()
