"""The tests that need a GPU, and whether kernels repeat their results bit by bit."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.on_gpu.record import Measurement, Progress
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

TESTS = "tests/pallas_kernels"
OUTCOME = r"(PASSED|FAILED|ERROR|SKIPPED)"
LINE = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] )?{OUTCOME} (tests/\S+)|^(tests/\S+::\S+) {OUTCOME}")
"""Of pytest's verbose output, on several processes and on one."""
PROCESSES = 8
REPEATS = 20
"""A race shows when it is lost: the same call so often, and no bit may differ."""


def measurements(*, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """The tests marked ``gpu``; on tiny sizes some of those that interpret the same kernels."""
    del work
    return {
        "tests": functools.partial(run_tests, smoke=smoke),
        **{f"{op} repeats": functools.partial(repeat, op, smoke=smoke) for op in OPS},
    }


def run_tests(progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """Runs pytest; counts outcomes as they come.

    Raises:
      RuntimeError: no test ran.
    """
    # The platform is named, or the tests would ask for a CPU.
    platforms = "cpu" if smoke else "cuda,cpu"
    chosen = ["-k", "several_blocks and gpu-interpreted"] if smoke else ["-m", "gpu", "-n", str(PROCESSES)]
    command = [sys.executable, "-m", "pytest", TESTS, "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    counts: dict[str, int] = {}
    failed: list[str] = []
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := LINE.match(line):
                outcome, name = (found[1], found[2]) if found[1] else (found[4], found[3])
                counts[outcome] = counts.get(outcome, 0) + 1
                if outcome in ("FAILED", "ERROR"):
                    failed.append(name)
                progress({"outcomes": counts, "failed_tests": failed})
    text = "".join(lines)
    if not counts:
        raise RuntimeError(f"no test ran: {text[-1_500:]}")
    result = {"command": " ".join(["JAX_PLATFORMS=" + platforms, "python", *command[1:]])}
    result |= {"outcomes": counts, "failed_tests": failed, "last_line": lines[-1].strip()}
    if process.returncode:
        result["output"] = text[-12_000:]
    print(lines[-1].strip(), *failed, sep="\n", flush=True)
    return result


def attention(implementation: dict[str, Any], *, smoke: bool) -> tuple[Any, tuple[jax.Array, ...]]:
    """Values and gradients of `flash_attention`."""
    shape = (1, 1, 70, 16) if smoke else (8, 16, 2_048, 128)
    q, k, v, d_out = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))

    def call(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(flash_attention, causal=True, **implementation), q, k, v)
        return out, pull(d_out)

    return call, (q, k, v, d_out)


def decoding(implementation: dict[str, Any], *, smoke: bool) -> tuple[Any, tuple[jax.Array, ...]]:
    """Values of `decode_attention`."""
    rows, columns, features = (2, 64, 16) if smoke else (32, 4_096, 128)
    heads, shared = (2, 1) if smoke else (32, 8)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (rows, heads, 1, features), jnp.bfloat16)
    k, v = (jax.random.normal(key, (rows, shared, columns, features), jnp.bfloat16) for key in keys[1:])
    start, length = jnp.arange(rows) % 7, columns - jnp.arange(rows) % 11
    return functools.partial(decode_attention, **implementation), (q, k, v, start, length)


def loss(implementation: dict[str, Any], *, smoke: bool) -> tuple[Any, tuple[jax.Array, ...]]:
    """Losses and gradients of `linear_cross_entropy`."""
    rows, features, columns = (64, 32, 300) if smoke else (8_192, 768, 50_257)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, features), jnp.bfloat16)
    vocabulary = jax.random.normal(keys[1], (columns, features), jnp.bfloat16) * 0.02
    labels = jax.random.randint(keys[2], (rows,), 0, columns)

    def call(hidden: jax.Array, vocabulary: jax.Array, labels: jax.Array) -> Any:
        of = lambda hidden, vocabulary: linear_cross_entropy(hidden, vocabulary, labels, **implementation).losses
        losses, pull = jax.vjp(of, hidden, vocabulary)
        return losses, pull(jnp.ones_like(losses))

    return call, (hidden, vocabulary, labels)


OPS = {"flash_attention": attention, "decode_attention": decoding, "linear_cross_entropy": loss}


def repeat(op: str, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """How many of the repeated calls of a kernel differ from the first in any bit, or are not finite."""
    del progress
    implementation: dict[str, Any] = {"implementation": "gpu"} | ({"interpret": True} if smoke else {})
    call, arrays = OPS[op](implementation, smoke=smoke)
    program = jax.jit(call).lower(*arrays).compile()
    same = jax.jit(lambda x, y: jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x, y: (x == y).all(), x, y)))
    first, repeats = program(*arrays), 2 if smoke else REPEATS
    # NaN differs from itself, so a result that is not a number counts as different.
    different = sum(not same(first, program(*arrays)) for _ in range(repeats))
    print(f"{op}: {different} of {repeats} calls differ from the first", flush=True)
    return {"shapes": [list(x.shape) for x in arrays], "repeats": repeats, "different": different}
