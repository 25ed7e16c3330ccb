"""Behind a learned table of positions there are no numbers, so nothing is computed there; rotary ones have no end."""

import functools

import jax
import jax.numpy as jnp
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig, decode, prefill, think_on
from coconut.latent.rollout import rollout
from coconut.models.parameters import abstract_decoder
from coconut.types import Language, Latent
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE

ROWS = 2
LIMIT = GPT2_STYLE.max_positions


def read_and_go_on(decoder, columns: int, thoughts: int = 0, forced: int = 0, new: int = 1):
    """A prefill, thoughts, and language, of which nothing is computed: the error is in the shapes."""
    tokens = jnp.zeros((ROWS, columns), jnp.int32)
    # One column of the row alone is no padding: columns count, for their places are static.
    prefix = prefill(decoder, tokens, jnp.arange(columns) == columns - 1 + tokens)
    if thoughts:
        prefix, _ = think_on(decoder, Identity(), prefix, jnp.zeros(ROWS, jnp.int32), room=thoughts)
    keys = jax.random.split(jax.random.key(0), ROWS)
    go_on = functools.partial(decode, sampling=SamplingConfig(max_new_tokens=new), eos_id=0)
    return go_on(decoder, prefix, jnp.ones(ROWS, bool), keys, forced=jnp.zeros((ROWS, forced), jnp.int32))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"columns": LIMIT + 1}, "0 columns of a prefix and 33 behind it, padding included, need 33 positions"),
        ({"columns": 20, "thoughts": 13}, "20 columns of a prefix and 13 behind it"),
        ({"columns": 20, "thoughts": 5, "forced": 8}, "25 columns of a prefix and 8 behind it"),
        ({"columns": 20, "thoughts": 5, "forced": 3, "new": 5}, "28 columns of a prefix and 5 behind it"),
    ],
)
def test_decoding_stays_within_the_table(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(CoconutError, match=f"DecoderConfig.max_positions = 32: {message}"):
        jax.eval_shape(functools.partial(read_and_go_on, **sizes), abstract_decoder(GPT2_STYLE))
    jax.eval_shape(functools.partial(read_and_go_on, **sizes), abstract_decoder(LLAMA_STYLE))


def test_the_last_position_is_used() -> None:
    sizes = {"columns": 20, "thoughts": 5, "forced": 3, "new": 4}
    jax.eval_shape(functools.partial(read_and_go_on, **sizes), abstract_decoder(GPT2_STYLE))


def test_a_rollout_whose_positions_are_known_looks_at_them() -> None:
    schedule = (Language(LIMIT - 1), Latent(1), Language(2))
    tokens = jnp.zeros((ROWS, LIMIT + 2), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LIMIT + 2), tokens.shape)

    def walk(columns: int) -> None:
        valid = jnp.broadcast_to(jnp.arange(LIMIT + 2) < columns, tokens.shape)
        known = functools.partial(rollout, schedule=schedule, tokens=tokens, positions=positions, valid=valid)
        jax.eval_shape(known, abstract_decoder(GPT2_STYLE))

    walk(LIMIT)
    with pytest.raises(CoconutError, match="max_positions = 32: the valid columns need 33 positions"):
        walk(LIMIT + 1)
