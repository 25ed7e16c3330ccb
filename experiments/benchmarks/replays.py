"""What a replay costs, for each policy: seconds and memory of drawing, of looking again, and of an update.

    python -m experiments.benchmarks.replays [--output FILE]

A policy that draws its thoughts is replayed in one parallel pass; where the thoughts are the model's own, they are made
again one after the other (`coconut.latent.sampling`). Which of the two a policy has decides what an update costs and
how that grows with the number of thoughts. The policies are those of ``gin_configs/policies``, each with the feedback
that its file asks for. 64 samples, 8 of a question, are drawn once, and replayed by

* ``sample``: the program that drew them;
* ``values``: log-probabilities of all draws;
* ``update``: these and the gradient of their sum for all parameters, without an optimizer.

All have the same number of columns: nothing ends early. Memory is what XLA's plan says of temporary arrays, beside
parameters and results.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from coconut.commands.configuration import SHIPPED_IN, resolve_run
from coconut.latent.feedback import FeedbackConfig
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import LinearHalt
from coconut.latent.policies.config import POLICIES, PolicyConfig, make_policy
from coconut.latent.sampling import Sampler, Samples
from coconut.model import Model, make_model
from coconut.models.config import DecoderConfig
from experiments.benchmarks import timing
from experiments.benchmarks.rollouts import LATENT, given

PARTS = ("sample", "values", "update")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is sampled and replayed.

    Attributes:
      decoder: the model.
      questions: questions.
      group: samples of each.
      prompt: tokens of each question.
      thoughts: numbers of thoughts, a case each.
      new_tokens: tokens written behind the thoughts.
      rounds: rounds timed where the command line does not say.
    """

    decoder: DecoderConfig
    questions: int = 8
    group: int = 8
    prompt: int = 160
    thoughts: tuple[int, ...] = (6, 32)
    new_tokens: int = 32
    rounds: int = 5


WORKLOAD = Workload(DecoderConfig(vocab_size=363, num_layers=4, embed_dim=128, num_heads=4, max_positions=256))
SMOKE = Workload(
    DecoderConfig(vocab_size=50, num_layers=1, embed_dim=16, num_heads=2, max_positions=64),
    questions=2,
    group=2,
    prompt=8,
    thoughts=(2,),
    new_tokens=3,
    rounds=2,
)


def policies() -> dict[str, tuple[PolicyConfig, FeedbackConfig]]:
    """Every policy of ``gin_configs/policies`` by the name of its file, and the feedback that the file asks for."""
    found = {}
    for path in sorted((SHIPPED_IN / "gin_configs" / "policies").glob("*.gin")):
        run = resolve_run(
            [
                "gin_configs/runs/small_graphs_reinforcement.gin",
                "gin_configs/methods/coconut.gin",
                f"gin_configs/policies/{path.name}",
            ]
        )
        assert run.reinforcement is not None
        found[path.stem] = run.reinforcement.policy, run.feedback
    return found


def make_case(
    workload: Workload, thoughts: int, policy: PolicyConfig, feedback: FeedbackConfig
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """The programs of a policy, ready to run, and the bytes of temporary memory that each needs.

    Raises:
      AssertionError: a sample ended early.
    """
    config = workload.decoder

    def parts(decoder: DecoderConfig, key: Any) -> dict[str, Any]:
        own = POLICIES[policy.kind].part(policy.kind_options(), decoder, key)
        halt = {"halt": LinearHalt.fresh(decoder)} if policy.learnt_stop else {}
        return halt if own is None else {**halt, "policy": own}

    model = jax.jit(lambda key: make_model(config, key, feedback=feedback, parts=parts))(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, config.vocabulary, (workload.questions, workload.prompt), np.int32)
    batch = given(prompts, thoughts)
    keys = jax.random.split(jax.random.key(0), workload.questions * workload.group)

    def sampler_of(model: Model) -> Sampler:
        return Sampler(
            policy=make_policy(policy, model.decoder, model.parts),
            sampling=SamplingConfig(max_new_tokens=workload.new_tokens, temperature=1.0),
            halt=model.parts["halt"] if policy.learnt_stop else None,
            # It is to be asked, and still to leave every sample as long as those of the others.
            least=thoughts - 1 if policy.learnt_stop else 0,
            eos_id=config.vocabulary,
            latent_id=LATENT,
        )

    def sample(model: Model, batch: Any, keys: Any) -> Any:
        return sampler_of(model).sample(model.decoder, batch, keys, workload.group)

    def total(model: Model, samples: Samples) -> Any:
        return sum(draws.log_probs.sum() for draws in sampler_of(model).replay(model.decoder, samples).values())

    programs, memory = {}, {}

    def add(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        program = jax.jit(function).lower(*arguments).compile()
        programs[name] = lambda: jax.block_until_ready(program(*arguments))
        analysis = program.memory_analysis()
        if analysis is not None:
            memory[name] = int(analysis.temp_size_in_bytes)
        return program(*arguments)

    samples, written = add("sample", sample, model, batch, keys)
    if np.any(np.asarray(written.lengths) != workload.new_tokens):
        raise AssertionError("a sample ended early")
    add("values", total, model, samples)
    add("update", jax.value_and_grad(total, allow_int=True), model, samples)
    return programs, memory


def _replay_of(policy: PolicyConfig) -> str:
    """How the thoughts of a policy come about at replay."""
    return "one after the other" if policy.kind in ("deterministic", "dropout") else "one parallel pass"


def measure(
    workload: Workload, thoughts: int, rounds: int, known: Mapping[str, tuple[PolicyConfig, FeedbackConfig]]
) -> dict[str, Any]:
    """Seconds and memory of policies with one number of thoughts, and their updates over that of ``gaussian``."""
    programs, memory, replays = {}, {}, {}
    for name, (policy, feedback) in known.items():
        own, bytes_of = make_case(workload, thoughts, policy, feedback)
        programs |= {f"{name} {part}": call for part, call in own.items()}
        memory |= {f"{name} {part}": value for part, value in bytes_of.items()}
        replays[name] = _replay_of(policy)
    seconds = timing.interleave(programs, rounds, title=f"{thoughts} thoughts")
    result: dict[str, Any] = {"thoughts": thoughts, "rounds": rounds, "policies": {}}
    for name, how in replays.items():
        rows = {
            part: {**timing.summary(seconds[f"{name} {part}"]), "temporary_bytes": memory.get(f"{name} {part}")}
            for part in PARTS
        }
        over = timing.ratio(seconds[f"{name} update"], seconds["gaussian update"])
        result["policies"][name] = {"replay": how, **rows, "update_over_gaussian": over}
        update = rows["update"]
        print(
            f"{thoughts} thoughts, {name} ({how}): "
            + ", ".join(f"{part} {1000 * rows[part]['median_seconds']:.0f} ms" for part in PARTS)
            + f", update {over['ratio']:.2f} times that of gaussian, {(update['temporary_bytes'] or 0) / 2**20:.0f} MiB"
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = timing.parser("What a replay costs, for each policy.").parse_args(arguments)
    workload = SMOKE if options.smoke else WORKLOAD
    sizes = ("num_layers", "embed_dim", "num_heads", "vocab_size")
    described = {
        **{field: getattr(workload.decoder, field) for field in sizes},
        **{field: getattr(workload, field) for field in ("questions", "group", "prompt", "new_tokens")},
    }
    report = timing.Report("replays", options)
    for thoughts in workload.thoughts:
        measured = measure(workload, thoughts, options.repeats or workload.rounds, policies())
        report.add(f"{thoughts} thoughts", {**described, **measured})
    report.finish()


if __name__ == "__main__":
    main()
