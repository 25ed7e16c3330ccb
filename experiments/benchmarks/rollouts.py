"""Examples per second of sampled rollouts: thoughts against as many text tokens, and against Hugging Face's `generate`.

    python -m experiments.benchmarks.rollouts [--output FILE]

64 samples are drawn at once: groups of 8 and of 16 samples of a question, and 64 questions with one each. The sides are

* ``thoughts``: Gaussian thoughts and then tokens; a group shares the keys and values of its prompt;
* ``text``: a token in the place of each thought, shared in the same way;
* ``unshared thoughts``: as the first, but every sample reads the prompt and keeps keys and values of its own;
* ``transformers``: `generate(do_sample=True, num_return_sequences=group)` of Hugging Face's GPT-2 (PyTorch) with our
  weights, its cache and every core. It writes as many tokens as ``text`` does, and reads a prompt once a sample.

All of them go from numpy to numpy and write all of their tokens: the id of EOS is one behind the vocabulary, so that it
is never drawn, and `generate` has none. Ours also return what a replay needs, records and log-probabilities, which are
not asked of `generate`. The sizes are those of ``gin_configs/models/small_4l128.gin`` and of its ProntoQA in symbols;
the choices are GPT-2's, since no model of Hugging Face's computes what that config does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.latent.policies.config import PolicyConfig, make_policy
from coconut.latent.sampling import Sampler
from coconut.model import make_model
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.types import IGNORED_LABEL, Batch, Language, Latent
from experiments.benchmarks import pytorch_rollouts, timing

LATENT = 0  # Stands in latent columns, where no token is read.
TARGET = 3.0  # Times the examples per second of `generate`, with as many tokens.


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is sampled.

    Attributes:
      decoder: the model.
      samples: samples drawn at once.
      groups: samples of a question; each divides ``samples``.
      prompt: tokens of each question.
      thoughts: thoughts of a sample.
      new_tokens: tokens written behind the thoughts.
      rounds: rounds timed where the command line does not say.
    """

    decoder: DecoderConfig
    samples: int = 64
    groups: tuple[int, ...] = (8, 16, 1)
    prompt: int = 160
    thoughts: int = 6
    new_tokens: int = 32
    rounds: int = 5


WORKLOAD = Workload(DecoderConfig(vocab_size=363, num_layers=4, embed_dim=128, num_heads=4, max_positions=256))
SMOKE = Workload(
    DecoderConfig(vocab_size=50, num_layers=2, embed_dim=32, num_heads=2, max_positions=64),
    samples=4,
    groups=(2, 1),
    prompt=16,
    thoughts=2,
    new_tokens=4,
    rounds=2,
)


def random_prompts(workload: Workload, questions: int) -> np.ndarray:
    """Prompts of one length, ``[questions, prompt]``."""
    shape = (questions, workload.prompt)
    return np.random.default_rng(0).integers(0, workload.decoder.vocabulary, shape, np.int32)


class Side(NamedTuple):
    """One way to draw the samples of a case.

    Attributes:
      draw: draws them all and gives their tokens, ``[samples, new tokens]``.
      temporary_bytes: temporary memory of its program, where XLA tells.
    """

    draw: Callable[[], np.ndarray]
    temporary_bytes: int | None = None


def our_side(decoder: Decoder, prompts: np.ndarray, group: int, *, thoughts: int, new_tokens: int) -> Side:
    """`Sampler.sample`, compiled as one program.

    Args:
      decoder: the decoder.
      prompts: tokens of the questions, ``[B, P]``.
      group: samples of each, which share what was read of it.
      thoughts: Gaussian thoughts of each sample; 0 for none.
      new_tokens: tokens of each sample.
    """
    sampler = Sampler(
        policy=make_policy(PolicyConfig(kind="gaussian"), decoder, {"feedback": Identity()}),
        sampling=SamplingConfig(max_new_tokens=new_tokens, temperature=1.0),
        eos_id=decoder.config.vocabulary,
        latent_id=LATENT,
    )
    batch, keys = given(prompts, thoughts), jax.random.split(jax.random.key(0), len(prompts) * group)
    sample = jax.jit(lambda decoder, batch, keys: sampler.sample(decoder, batch, keys, group))
    program = sample.lower(decoder, batch, keys).compile()
    memory = program.memory_analysis()

    def draw() -> np.ndarray:
        _, written = jax.block_until_ready(program(decoder, batch, keys))
        if np.any(np.asarray(written.thoughts) != thoughts) or np.any(np.asarray(written.lengths) != new_tokens):
            raise AssertionError("a sample ended early")
        return np.asarray(written.tokens)

    return Side(draw, None if memory is None else int(memory.temp_size_in_bytes))


def given(prompts: np.ndarray, thoughts: int) -> Batch:
    """What is given of questions of one length: the prompt, and room for thoughts."""
    rows, prompt = prompts.shape
    columns = prompt + thoughts
    tokens = np.full((rows, columns), LATENT, np.int32)
    tokens[:, :prompt] = prompts
    return Batch(
        schedule=(Language(prompt), Latent(thoughts)) if thoughts else (Language(prompt),),
        tokens=tokens,
        positions=np.tile(np.arange(columns, dtype=np.int32), (rows, 1)),
        valid=np.ones((rows, columns), bool),
        labels=np.full((rows, columns), IGNORED_LABEL, np.int32),
        pieces=np.full((rows, columns), -1, np.int32),
        answers=np.zeros((rows, columns), bool),
        before_answer=np.full(rows, -1, np.int32),
        examples=np.arange(rows, dtype=np.int32),
    )


def sides_of(
    workload: Workload, decoder: Decoder, prompts: np.ndarray, group: int, models: dict[str, Any]
) -> dict[str, Side]:
    """The sides of a case, each of them with ``thoughts + new_tokens`` columns behind every prompt."""
    thoughts, new_tokens = workload.thoughts, workload.new_tokens
    sides = {
        "thoughts": our_side(decoder, prompts, group, thoughts=thoughts, new_tokens=new_tokens),
        "text": our_side(decoder, prompts, group, thoughts=0, new_tokens=thoughts + new_tokens),
    }
    if group > 1:
        repeated = np.repeat(prompts, group, axis=0)
        sides["unshared thoughts"] = our_side(decoder, repeated, 1, thoughts=thoughts, new_tokens=new_tokens)
    for name, model in models.items():
        sides[name] = Side(pytorch_rollouts.sampling(model, prompts, group, new_tokens=thoughts + new_tokens))
    return sides


def speedups(seconds: timing.Seconds) -> dict[str, dict[str, float]]:
    """How many times the examples per second of another side ours have, round by round.

    ``transformers`` is the faster of its two attentions, as they ship them.
    """
    seconds = dict(seconds)
    if pytorch_rollouts.STOCK.keys() <= seconds.keys():
        seconds["transformers"] = seconds[min(pytorch_rollouts.STOCK, key=lambda name: float(np.median(seconds[name])))]
    pairs = [("thoughts", "text"), ("thoughts", "unshared thoughts")]
    pairs += [
        (mine, other)
        for other in ("transformers", pytorch_rollouts.FUSED)
        for mine in ("thoughts", "text", "unshared thoughts")
    ]
    return {
        f"{mine} over {other}": timing.ratio(seconds[other], seconds[mine])
        for mine, other in pairs
        if mine in seconds and other in seconds
    }


def measure(workload: Workload, decoder: Decoder, group: int, rounds: int, models: dict[str, Any]) -> dict[str, Any]:
    """Examples per second of all sides, for groups of one size."""
    questions = workload.samples // group
    title = f"{questions} x {group}"
    prompts = random_prompts(workload, questions)
    sides = sides_of(workload, decoder, prompts, group, models)
    seconds = timing.interleave({name: side.draw for name, side in sides.items()}, rounds, title=title)
    rows = {
        name: {
            **timing.quartiles("examples_per_second", workload.samples / seconds[name]),
            **timing.summary(seconds[name]),
            "temporary_bytes": side.temporary_bytes,
        }
        for name, side in sides.items()
    }
    shared, unshared = (rows.get(name, {}).get("temporary_bytes") for name in ("thoughts", "unshared thoughts"))
    result = {
        "questions": questions,
        "group": group,
        "rounds": rounds,
        "sides": rows,
        "speedups": speedups(seconds),
        "memory_ratio": unshared / shared if shared and unshared else None,
    }
    for name, row in rows.items():
        print(f"{title}, {name}: {row['examples_per_second']:.1f} examples/s")
    for name, ratio in result["speedups"].items():
        target = f" (target: {TARGET:g})" if name.endswith("over transformers") else ""
        print(f"{title}, {name}: {ratio['ratio']:.2f} times the examples/s{target}")
    if result["memory_ratio"] is not None:
        print(f"{title}, temporary memory of unshared thoughts over thoughts: {result['memory_ratio']:.2f}")
    return result


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = timing.parser("Examples per second of sampled rollouts.").parse_args(arguments)
    workload = SMOKE if options.smoke else WORKLOAD
    decoder = jax.jit(lambda key: make_model(workload.decoder, key))(jax.random.key(0)).decoder
    sizes = ("num_layers", "embed_dim", "num_heads", "vocab_size")
    described = {
        **{field: getattr(workload.decoder, field) for field in sizes},
        **{field: getattr(workload, field) for field in ("samples", "prompt", "thoughts", "new_tokens")},
    }
    models: dict[str, Any] = {}
    if reason := pytorch_rollouts.absence():
        print(f"transformers does not take part: {reason}", flush=True)
        described["refused"] = {"transformers": reason}
    else:
        models, versions = pytorch_rollouts.load(decoder)
        pytorch_rollouts.check_same(decoder, models, random_prompts(workload, 2))
        described |= versions
    report = timing.Report("rollouts", options)
    for group in workload.groups:
        measured = measure(workload, decoder, group, options.repeats or workload.rounds, models)
        report.add(f"groups of {group}", {**described, **measured})
    report.finish()


if __name__ == "__main__":
    main()
