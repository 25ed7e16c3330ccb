"""The benchmark of packing measures every data set it is given, on sizes that say nothing about speed."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import packing
from tests.tiny_models import quick_compilation


@pytest.mark.slow
def test_both_forms_are_measured_on_each_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"{'how many ' * (1 + n % 7)}?||<<{n}*2={2 * n}>> <<{2 * n}+1={2 * n + 1}>> #### {2 * n + 1}" for n in range(40)
    ]
    questions, output = tmp_path / "lines.txt", tmp_path / "packing.json"
    questions.write_text("\n".join(lines) + "\n")
    with quick_compilation():
        packing.main(["--smoke", "--gsm8k", str(questions), "--note", "a test", "--output", str(output)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(output.read_text()) == result and str(tmp_path) not in output.read_text()
    assert result["cases"].pop("note") == "a test"
    assert result["cases"].keys() == {f"{name}, 2 thoughts, narrow" for name in ("ProsQA", "lines.txt")}
    for case in result["cases"].values():
        one, two = case["forms"]["1 a row"], case["forms"]["2 a row"]
        assert 0 < two["padding"] < one["padding"] < 1 and one["ratio"] == 1.0
        assert two["rows"] == 2 and one["columns"] < two["columns"] < 2 * one["columns"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
