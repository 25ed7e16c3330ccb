"""An optimizer that the method starts anew, within a stage: that of iCoT, also in a run that was interrupted."""

from pathlib import Path

import pytest

from coconut.methods.icot import IcotOptions
from coconut.training import loop
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, final_state, interrupt_at, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]


def test_a_run_starts_its_optimizer_at_removals_and_is_the_same_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(
        method="icot",
        options=IcotOptions(tokens_per_stage=2, smoothing=1.0),
        curriculum={"last_stage": 3, "reset_optimizer": "never", "steps_per_stage": 4},
        pipeline={"multiple_of": 8},  # One shape for all stages, and one program.
        data={"validation": 0},
    )
    restarted, steps = [], []
    restart, rate_at = loop.restart_optimizer, loop.learning_rate_at
    with monkeypatch.context() as patched:
        patched.setattr(loop, "restart_optimizer", lambda *a: restarted.append(len(steps)) or restart(*a))
        patched.setattr(loop, "learning_rate_at", lambda *a, **k: steps.append(k["step"]) or rate_at(*a, **k))
        trained(config, tmp_path / "whole")
    # Chains of three tokens, two a stage of four steps from step 4 on: the third goes in the middle of stage 2.
    assert restarted == [6, 8, 10]
    (count,) = (value for name, value in final_state(tmp_path / "whole")[0].items() if "count" in name)
    assert count == 6
    # Stopped before the first removal, which is in the middle of a stage, and before the second, where a stage begins.
    for step in (6, 8):
        with monkeypatch.context() as patched:
            interrupt_at(patched, step - 1)
            assert trained(config, tmp_path / "stopped").progress.step == step
    trained(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
