"""Which checkpoints are kept, and what is not restored."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from coconut.errors import CoconutError
from coconut.training.checkpoint import Checkpoints
from coconut.training.progress import Progress
from coconut.training.state import TrainState


@pytest.mark.parametrize(
    "saved,kept,best",
    [
        # (stage, accuracy or None) of steps 1, 2, ..; what was not validated is proven by the step behind it.
        ([(0, 0.5), (0, 0.9), (0, 0.7)], [2, 3], 2),
        ([(0, 0.5), (0, 0.9), (0, 0.9)], [3], 3),
        ([(0, 1.0), (1, 0.0), (1, None)], [2, 3], 2),
        ([(0, 1.0), (1, None), (1, None)], [2, 3], 2),
        ([(0, 0.3), (0, None), (0, None)], [1, 2, 3], 1),
        ([(0, 0.0), (1, 0.2), (1, 0.1), (2, 0.05)], [4], 4),
        ([(0, None)], [1], 1),
    ],
)
def test_the_best_the_latest_and_what_is_not_proven_are_kept(
    tmp_path: Path, saved: list, kept: list[int], best: int
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    for step, (stage, accuracy) in enumerate(saved, 1):
        validation = {} if accuracy is None else {"accuracy": accuracy, "loss": 3.0}
        proven = accuracy is not None
        checkpoints.save(small_state(step), Progress(step=step, stage=stage), validation, proven=proven)
    assert (checkpoints.step("best"), checkpoints.step("latest")) == (best, len(saved))
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept
    # Another process comes to the same conclusion.
    reader = Checkpoints(tmp_path, read_only=True)
    assert (reader.step("best"), reader.step("latest")) == (best, len(saved))
    state, progress = reader.restore(best, small_state(0))
    assert (int(state.step), progress.step, progress.stage) == (best, best, saved[best - 1][0])
    reader.close()


def small_state(step: int) -> TrainState:
    return TrainState(
        parameters={"w": jnp.full(3, step, jnp.float32)},
        opt_state={"m": jnp.zeros(3)},
        step=jnp.asarray(step, jnp.int32),
    )


def test_a_checkpoint_of_other_arrays_is_an_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small_state(1), Progress(step=1), {})
    other = dataclasses.replace(small_state(0), parameters={"w": jnp.zeros(4)})
    with pytest.raises(CoconutError, match=r"'parameters/w' is \(\(3,\), .*\) there, \(\(4,\), .*\) here"):
        checkpoints.restore(1, other)
    with pytest.raises(CoconutError, match="'parameters/v' is missing"):
        checkpoints.restore(1, dataclasses.replace(small_state(0), parameters={"v": jnp.zeros(3)}))
    checkpoints.close()


def test_a_part_that_the_model_has_not_is_an_error_but_where_it_is_for_training_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    state = small_state(1)
    with_reader = dataclasses.replace(state, parameters={**state.parameters, "reader.scale": jnp.ones(2)})
    checkpoints.save(with_reader, Progress(step=1), {})
    with pytest.raises(CoconutError, match=r"parameter 'reader\.scale' is none of this run's model"):
        checkpoints.restore_parameters(1, state.parameters)
    parameters, _ = checkpoints.restore_parameters(1, state.parameters, left_out={"reader"})
    assert parameters.keys() == {"w"}
    checkpoints.close()
