"""Runs whose rows hold several examples: the numbers of rows of one, to the bit where they go on."""

from pathlib import Path
from typing import Any

import jax
import pytest

from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.methods.multi_token import MultiTokenConfig
from coconut.models.config import ExecutionConfig
from coconut.sharding import check_rows
from coconut.training.setup import prepare
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, final_state, interrupt_at, lines_of, trained

pytestmark = pytest.mark.usefixtures("compiled_once")

PACKED = {"batch_size": 8, "examples_per_row": 4}
# Two thoughts, the first in a pass of its own; and pages of several stages in a batch.
CHANGES: dict[str, Any] = {"curriculum": {"c_thought": 2, "uniform_prob": 0.5, "steps_per_stage": 9}}


@pytest.mark.slow
def test_a_packed_run_has_the_numbers_of_one_that_is_not(tmp_path: Path) -> None:
    one = trained(tiny_run(**CHANGES), tmp_path / "one")
    many = trained(tiny_run(**CHANGES, pipeline=PACKED), tmp_path / "many")
    assert one.progress.finished and many.progress.finished
    lines, packed = lines_of(tmp_path / "one", "train"), lines_of(tmp_path / "many", "train")
    assert len(lines) == len(packed) == 10
    for line, own in zip(lines, packed, strict=True):
        assert line.keys() == own.keys() and line["tokens"] == own["tokens"]
        assert own["padding"] <= line["padding"]
        for name in (
            "loss",
            "answer_accuracy",
            "first_loss",
            "token_norm",
            *(["thought_cosine"] if line["stage"] else []),
        ):
            assert own[name] == pytest.approx(line[name], rel=1e-3, abs=1e-4), name
    assert packed[-1]["padding"] < lines[-1]["padding"]
    assert packed[-1]["loss"] < 0.8 * packed[0]["loss"]
    # At most two shapes a stage, and both stages have one without packing.
    assert one.compilations == 1 and many.compilations <= 4


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits_and_may_go_on_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(**CHANGES, pipeline={**PACKED, "threads": 2}, decoder={"dropout": 0.2})
    trained(config, tmp_path / "whole")
    with monkeypatch.context() as context:
        interrupt_at(context, 11)
        trained(config, tmp_path / "parts")
    assert final_state(tmp_path / "parts")[1].step == 12
    other = tmp_path / "other"
    for path in (tmp_path / "parts").rglob("*"):
        target = other / path.relative_to(tmp_path / "parts")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    trained(tiny_run(**CHANGES, pipeline={**PACKED, "threads": 1}, decoder={"dropout": 0.2}), tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert trained(tiny_run(**CHANGES, decoder={"dropout": 0.2}), other).progress.finished


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_packs_or_is_refused_by_name(name: str) -> None:
    own_loss = name in ("codi", "pccot", "kava", "colar", "ponder", "ponder_codi", "simcot", "simcot_codi")
    assert METHODS[name].packs == (not own_loss)
    if own_loss:
        with pytest.raises(
            CoconutError, match=f"examples_per_row = 4: the loss of method = '{name}' reads a row as one"
        ):
            tiny_run(method=name, options=None, pipeline=PACKED)


def test_what_cannot_be_packed_is_refused_before_any_work() -> None:
    for message, changes in (
        ("attention = 'xla': kernels do not know the examples", {"execution": ExecutionConfig(attention="xla")}),
        ("RunConfig.multi_token reads a row as one example", {"multi_token": MultiTokenConfig()}),
        ("microbatches = 4 must divide the 2 rows of a batch of 8", {"microbatches": 4}),
    ):
        with pytest.raises(CoconutError, match=f"examples_per_row = 4: .*{message}"):
            tiny_run(pipeline=PACKED, **changes)
    with pytest.raises(CoconutError, match=r"FeedbackConfig.kind = 'gaussian' draws thoughts by rows"):
        prepare(tiny_run(pipeline=PACKED, feedback={"kind": "gaussian"}))


def test_a_mesh_that_does_not_split_packed_rows_is_refused() -> None:
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "sequence"))
    with pytest.raises(CoconutError, match=r"batch_size = 8 .*examples_per_row = 8: the rows of each are no multiple"):
        check_rows(mesh, 8, examples_per_row=8)
    with pytest.raises(CoconutError, match="sequence = 2 splits the columns of a row, and packed rows stay whole"):
        check_rows(mesh, 8, examples_per_row=4)
