"""What a rollout does not do: columns that nobody reads, a pass for the last thought, and keeping a span K times."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from coconut.latent.rollout import rollout
from coconut.models.decoder import Decoder
from coconut.types import Language, Latent, Schedule
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder

pytestmark = pytest.mark.slow

# One head: what attention weighs is a square anyway, but not as wide as what it reads.
WIDE = dataclasses.replace(GPT2_STYLE, embed_dim=64, num_heads=1)
IMPLEMENTATIONS = {
    "dense": {},
    "scanned and made again": {"scan_layers": True, "remat": "full"},
    "scanned, products kept": {"scan_layers": True, "remat": "dots"},
    "in blocks": {"attention": "xla"},
}


def columns_alone(decoder: Decoder, schedule: Schedule, *, every_hidden: bool) -> Any:
    """The rollout of one row of zeros, traced."""
    T = sum(span.length for span in schedule)
    row = jnp.zeros((1, T), jnp.int32)
    run = lambda decoder: rollout(
        decoder,
        schedule,
        tokens=row,
        positions=row,
        valid=jnp.ones((1, T), bool),
        every_hidden=every_hidden,
    ).predictors.sum()
    return jax.jit(run).trace(decoder)


@pytest.mark.parametrize("schedule", [(Language(28), Latent(2), Language(2, 1)), (Language(32, 2),)])
def test_no_work_is_done_for_what_nobody_reads(schedule: Schedule) -> None:
    decoder = random_decoder(GPT2_STYLE)
    operations: list[float] = []
    for every_hidden in (True, False):
        cost: Any = columns_alone(decoder, schedule, every_hidden=every_hidden).lower().cost_analysis()
        operations.append(cost["flops"])
    # One of two layers needs a sixth of its products for nearly all columns.
    assert operations[1] < 0.7 * operations[0]


@pytest.mark.parametrize("thoughts", [1, 2, 5])
def test_the_last_thought_is_no_pass_of_its_own(thoughts: int) -> None:
    schedule = (Language(3), Latent(thoughts), Language(2, 1))
    traced = columns_alone(random_decoder(GPT2_STYLE), schedule, every_hidden=False)
    lengths = [found.params["length"] for found in equations(traced.jaxpr.jaxpr) if found.primitive.name == "scan"]
    assert lengths == ([thoughts - 1] if thoughts > 1 else [])


@pytest.mark.parametrize("execution", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_memory_of_a_gradient_grows_with_the_thoughts_and_not_with_their_square(execution: dict[str, Any]) -> None:
    """The keys and values of a span are as long as the span: to keep what each thought saw of them is its square."""
    layers = 2 if "scan_layers" in execution else 1
    decoder, used = random_decoder(dataclasses.replace(WIDE, num_layers=layers), **execution), []
    for thoughts in (32, 64, 128):
        schedule = (Language(3), Latent(thoughts), Language(2, 1))
        T = sum(span.length for span in schedule)
        zeros = jax.ShapeDtypeStruct((2, T), jnp.int32)
        valid = jax.ShapeDtypeStruct((2, T), bool)
        loss = lambda decoder, tokens, positions, valid, schedule=schedule: rollout(
            decoder, schedule, tokens=tokens, positions=positions, valid=valid
        ).predictors.sum()
        compiled = quick_jit(jax.grad(loss)).lower(decoder, zeros, zeros, valid).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes)
    # 2 where the growth is linear, 4 where it is quadratic.
    assert used[2] - used[1] < 2.5 * (used[1] - used[0])


def test_the_gradient_of_a_thought_does_not_attend_to_the_prompt_again() -> None:
    decoder = random_decoder(GPT2_STYLE, attention="tpu_interpret")
    row = jnp.zeros((1, 11), jnp.int32)
    loss = lambda decoder: rollout(
        decoder, (Language(3), Latent(6), Language(2, 1)), tokens=row, positions=row, valid=row == 0
    ).predictors.sum()
    loops = [found for found in equations(jax.make_jaxpr(jax.grad(loss))(decoder).jaxpr) if is_loop(found, length=5)]
    kernels = [
        found for loop in loops for found in equations(loop.params["jaxpr"].jaxpr) if is_kernel(found, columns=3)
    ]
    assert len(loops) == 2 and len(kernels) == 2 * decoder.config.num_layers


def is_loop(equation: Any, *, length: int) -> bool:
    """Whether it is a scan of so many turns."""
    return equation.primitive.name == "scan" and equation.params["length"] == length


def is_kernel(equation: Any, *, columns: int) -> bool:
    """Whether it is a kernel that reads keys of so many columns."""
    shapes = [getattr(operand.aval, "shape", ()) for operand in equation.invars]
    return equation.primitive.name == "pallas_call" and any(len(s) == 4 and s[2] == columns for s in shapes)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_only_a_single_column_is_written_into_a_segment() -> None:
    """Several would look ahead in it: nothing there says which of them came first."""
    decoder, two = random_decoder(GPT2_STYLE), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="write_at is for a pass of one column, this one has 2"):
        decoder.trunk(decoder.embed(two), positions=two, valid=two == 0, write_at=jnp.asarray(0))
