"""The benchmark of kernels runs, on sizes that say nothing about speed."""

import json

import pytest

from experiments.benchmarks import kernels, pytorch_attention

ATTENTION = {"flash_attention, smoke, forward", "flash_attention, smoke, backward", "decode_attention, smoke"}
OURS = "pallas_kernels, xla"


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(kernels, "SHORTEST_TURN", 0.0)


@pytest.mark.slow
def test_every_case_is_measured_against_what_there_is(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    kernels.main(["--smoke", "--repeats", "2", "--output", str(path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(path.read_text()) == result
    cases = result["cases"]
    assert cases.keys() == ATTENTION | {"linear_cross_entropy, smoke"}
    for name, case in cases.items():
        expected = {"jax.nn, xla", "PyTorch"} if name in ATTENTION else {"full logits"}
        absent = {"PyTorch"} if name in ATTENTION and pytorch_attention.absence() else set()
        assert case["refused"].keys() == absent
        assert case["sides"].keys() == {OURS} | expected - absent
        assert case["ratios"].keys() == {f"{OURS} / {other}" for other in expected - absent}
        unit = "gigabytes_per_second" if name.startswith("decode") else "tflop_per_second"
        for side in (case["peak"], *case["sides"].values()):
            assert 0 < side["lower_quartile_seconds"] <= side["median_seconds"] <= side["upper_quartile_seconds"]
            assert side[unit] > 0 and side["share_of_peak"] > 0
        assert case["sides"][OURS]["temporary_bytes"] is not None


@pytest.mark.slow
def test_what_does_not_run_is_reported_after_the_rest(capsys):
    asked = ["--smoke", "--op", "decode_attention", "--implementation", "tpu", "xla", "--dtype", "bfloat16"]
    with pytest.raises(SystemExit, match="did not run: decode_attention, smoke: pallas_kernels, tpu"):
        kernels.main(asked)
    case = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]["decode_attention, smoke"]
    assert "this program is for a cpu" in case["refused"]["pallas_kernels, tpu"]
    assert OURS in case["sides"]
