"""What it costs to know that a checkpoint is whole: restoring and saving 1 GB, with SHA-256 and without.

    python -m experiments.benchmarks.verification

Files are read from the system's cache, as just after they were written: the usual case of a run that was preempted and
goes on elsewhere reads them from a disk or a store, where hashing weighs less.
"""

import contextlib
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from coconut.storage import files_below
from coconut.training.checkpoint import Checkpoints
from coconut.training.manifest import digests
from coconut.training.progress import Progress
from coconut.training.state import TrainState
from experiments.benchmarks import timing

GIGABYTE = 10**9


def main(arguments: list[str] | None = None) -> None:
    """Measures and reports."""
    options = timing.parser("What verifying a checkpoint costs.").parse_args(arguments)
    size = 10**6 if options.smoke else GIGABYTE
    rows = size // (4 * 3 * 1024)
    key = jax.random.key(0)
    state = TrainState(
        parameters={"w": jax.random.normal(key, (rows, 1024))},
        opt_state={name: jax.random.normal(key, (rows, 1024)) for name in ("mu", "nu")},
        step=jnp.zeros((), jnp.int32),
    )
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as opened:
        workdir = Path(name)
        make = lambda **settings: opened.enter_context(contextlib.closing(Checkpoints(workdir, **settings)))
        saving, verified, unverified = make(), make(read_only=True), make(read_only=True, verify=False)
        saving.save(state, Progress(step=1), {}, proven=True)
        folder = workdir / "checkpoints" / "1"
        plain = opened.enter_context(contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())))
        arrays = state.parameters | state.opt_state
        variants = {
            "restore, verified": lambda: jax.block_until_ready(verified.restore(1, state)[0]),
            "restore": lambda: jax.block_until_ready(unverified.restore(1, state)[0]),
            "verify alone": lambda: digests(folder, files_below(folder)),
            "save": lambda: saving.save(state, Progress(step=2), {}, proven=True),
            "save by Orbax alone": lambda: plain.save(workdir / "plain", arrays, force=True),
        }
        seconds = timing.interleave(variants, options.repeats or 5, title="verification")
    result = {
        "bytes": 4 * 3 * 1024 * rows,
        **{variant: timing.summary(values) for variant, values in seconds.items()},
        "restore_ratio": timing.ratio(seconds["restore, verified"], seconds["restore"]),
        "save_ratio": timing.ratio(seconds["save"], seconds["save by Orbax alone"]),
    }
    print(f"restoring 1 GB: {result['restore_ratio']['ratio']:.2f} of the time without verification")
    print(f"saving 1 GB: {result['save_ratio']['ratio']:.2f} of the time of Orbax alone, which flushes nothing")
    report = timing.Report("verification", options)
    report.add("gigabyte", result)
    report.finish()


if __name__ == "__main__":
    main()
