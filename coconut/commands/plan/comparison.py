"""The estimate against a step that really runs, on the devices at hand."""

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from coconut.commands.plan.planning import Columns, Plan, Step
from coconut.model import parameters_of
from coconut.sharding import put_rows, replicated
from coconut.training.config import RunConfig
from coconut.training.optimizer import make_optimizer
from coconut.training.setup import fresh_model
from coconut.training.state import make_state
from coconut.types import IGNORED_LABEL, Batch


def measure(config: RunConfig, step: Step, columns: Columns, plan: Plan, steps: int = 3) -> Mapping[str, float]:
    """Runs the planned step with random tokens and compares.

    Args:
      config: the run.
      step: its step on the devices at hand.
      columns: of the batch.
      plan: what was estimated for these.
      steps: how many to time; the fastest counts.

    Returns:
      ``seconds`` measured, ``expected`` and ``fastest`` as estimated, and ``error``: how much more or less was expected
      than measured, as a share of what was measured.
    """
    assert plan.cost is not None
    optimizer = make_optimizer(config.optimizer)
    places = jax.tree.map(lambda leaf: leaf.sharding, step.state)
    make = lambda: make_state(step.template, parameters_of(fresh_model(config)), optimizer)
    state = jax.jit(make, out_shardings=places)()
    rows, total = config.pipeline.batch_size, columns.total
    tokens = np.random.default_rng(0).integers(0, config.decoder.vocabulary, (rows, total), np.int32)
    scored = np.arange(total) >= total - columns.suffix + 1
    fill = lambda schedule: Batch(
        schedule=schedule,
        tokens=tokens,
        positions=np.broadcast_to(np.arange(total, dtype=np.int32), tokens.shape),
        valid=np.ones(tokens.shape, bool),
        labels=np.where(scored, tokens, IGNORED_LABEL).astype(np.int32),
        pieces=np.where(scored, 0, np.full(tokens.shape, -1)).astype(np.int32),
        answers=np.broadcast_to(scored, tokens.shape),
        before_answer=np.full(rows, total - columns.suffix, np.int32),
        examples=np.arange(rows, dtype=np.int32),
    )
    with jax.set_mesh(step.mesh):
        views = {view: put_rows(fill(batch.schedule), step.mesh, rows) for view, batch in step.views.items()}
        place = replicated(step.mesh)
        key, rate = jax.device_put(jax.random.key(0), place), jax.device_put(jnp.float32(1e-5), place)
        times = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            state, metrics = step.compiled(state, views, rate, key)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - started)
    seconds = min(times[1:])  # The first one may load what the others find.
    expected, fastest = plan.cost.roofline.expected, plan.cost.roofline.fastest
    return {"seconds": seconds, "expected": expected, "fastest": fastest, "error": expected / seconds - 1}
