"""An optimizer that the method starts anew, within a stage: that of iCoT, also in a run that was interrupted."""

import dataclasses
from pathlib import Path

import pytest

from coconut.methods import METHODS
from coconut.methods.icot import IcotOptions
from coconut.tokenizers import symbol_tokenizer
from coconut.training import loop
from coconut.training.progress import Progress
from tests.tiny_pages import placing_at
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, final_state, interrupt_at, trained

# Chains of three tokens, two a stage of four steps from stage 1 on: the third goes in the middle of stage 2.
CONFIG = tiny_run(
    method="icot",
    options=IcotOptions(tokens_per_stage=2, smoothing=1.0),
    curriculum={"last_stage": 3, "reset_optimizer": "never", "steps_per_stage": 4},
    pipeline={"multiple_of": 8},  # One shape for all stages, and one program.
    data={"validation": 0},
)
RESTARTS = [6, 8, 10]


def test_it_starts_anew_at_each_removal_also_where_a_stage_begins() -> None:
    def restarts(step: int, **options: bool) -> bool:
        stage, stage_step = divmod(step, 4)
        placing = placing_at(
            symbol_tokenizer(["a"]), CONFIG.curriculum, stage, options=dataclasses.replace(CONFIG.options, **options)
        )
        return loop._method_restarts(METHODS["icot"], placing, Progress(stage=stage, stage_step=stage_step), 4, 3)

    assert [step for step in range(1, 16) if restarts(step)] == RESTARTS
    assert not any(restarts(step, restart_optimizer=False) for step in range(1, 16))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_that_is_interrupted_before_a_removal_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarted, steps = [], []
    restart, rate_at = loop.restart_optimizer, loop.learning_rate_at
    with monkeypatch.context() as patched:
        patched.setattr(loop, "restart_optimizer", lambda *a: restarted.append(len(steps)) or restart(*a))
        patched.setattr(loop, "learning_rate_at", lambda *a, **k: steps.append(k["step"]) or rate_at(*a, **k))
        trained(CONFIG, tmp_path / "whole")
    assert restarted == RESTARTS
    (count,) = (value for name, value in final_state(tmp_path / "whole")[0].items() if "count" in name)
    assert count == 6
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5)
        assert trained(CONFIG, tmp_path / "stopped").progress.step == RESTARTS[0]
    trained(CONFIG, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
