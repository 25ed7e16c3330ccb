"""What a rollout does not do: columns that nobody reads, and a pass for the last thought."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from coconut.latent.rollout import rollout
from coconut.models.decoder import Decoder
from coconut.types import Language, Latent, Schedule
from tests.tiny_models import GPT2_STYLE, random_decoder


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
