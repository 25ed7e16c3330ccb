"""The benchmark of rollouts runs, and each side does the work that it is compared by."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import pytorch_rollouts, rollouts
from tests.tiny_models import quick_compilation, random_decoder

WORKLOAD = dataclasses.replace(
    rollouts.SMOKE, decoder=dataclasses.replace(rollouts.SMOKE.decoder, num_layers=1), groups=(2,)
)
GROUP, EVERY = 2, WORKLOAD.thoughts + WORKLOAD.new_tokens
OURS = {"thoughts", "text", "unshared thoughts"}
THEIRS = {*pytorch_rollouts.STOCK, pytorch_rollouts.FUSED}


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(WORKLOAD.decoder)


@pytest.fixture(scope="module")
def prompts():
    return rollouts.random_prompts(WORKLOAD, WORKLOAD.samples // GROUP)


@pytest.fixture(scope="module")
def our_sides(decoder, prompts):
    with quick_compilation():
        return rollouts.sides_of(WORKLOAD, decoder, prompts, GROUP, {})


def test_the_sizes_are_those_of_the_small_config():
    text = (Path(__file__).parents[2] / "gin_configs" / "models" / "small_4l128.gin").read_text()
    written = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
    for size in ("num_layers", "embed_dim", "num_heads", "max_positions"):
        assert int(written[f"DecoderConfig.{size}"]) == getattr(rollouts.WORKLOAD.decoder, size), size


def test_a_speedup_is_over_the_faster_attention_round_by_round():
    eager, sdpa = pytorch_rollouts.STOCK
    seconds = {
        "thoughts": [1.0, 2.0, 4.0],
        "text": [2.0, 2.0, 2.0],
        eager: [9.0, 9.0, 1.0],  # the faster at its best, and the slower at its median
        sdpa: [3.0, 8.0, 8.0],
    }
    found = rollouts.speedups({name: np.asarray(x) for name, x in seconds.items()})
    assert {name: x["ratio"] for name, x in found.items()} == {
        "thoughts over text": 1.0,
        "thoughts over transformers": 3.0,
        "text over transformers": 4.0,
    }
    assert found["text over transformers"]["ratio_lower_quartile"] == 2.75


@pytest.mark.slow
def test_sharing_saves_memory_and_changes_no_sample(our_sides):
    assert our_sides.keys() == OURS
    shared, unshared, text = (our_sides[name].draw() for name in ("thoughts", "unshared thoughts", "text"))
    np.testing.assert_array_equal(shared, unshared)
    assert (shared[0] != shared[1]).any()  # two samples of one question
    assert shared.shape == (WORKLOAD.samples, WORKLOAD.new_tokens)
    assert text.shape == (WORKLOAD.samples, EVERY)
    assert our_sides["thoughts"].temporary_bytes < our_sides["unshared thoughts"].temporary_bytes


@pytest.mark.slow
def test_hugging_faces_model_is_ours_and_samples_as_many_tokens(decoder, prompts):
    if reason := pytorch_rollouts.absence():
        pytest.skip(f"transformers: {reason}")
    models, _ = pytorch_rollouts.load(decoder)
    assert models.keys() == THEIRS
    with quick_compilation():
        pytorch_rollouts.check_same(decoder, models, prompts)
        for model in models.values():
            tokens = pytorch_rollouts.sampling(model, prompts, GROUP, new_tokens=EVERY)()
            assert tokens.shape == (WORKLOAD.samples, EVERY)
            assert (tokens[0] != tokens[1]).any()
        with pytest.raises(AssertionError, match="transformers, eager is another model"):
            pytorch_rollouts.check_same(random_decoder(WORKLOAD.decoder, seed=1), models, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("absent", [False, True])
def test_every_side_is_measured_or_refused(our_sides, decoder, monkeypatch, tmp_path, capsys, absent):
    if absent:
        monkeypatch.setattr(pytorch_rollouts.importlib.util, "find_spec", lambda name: None)
    elif reason := pytorch_rollouts.absence():
        pytest.skip(f"transformers: {reason}")
    # What is compiled already is timed; only the model of the program itself has other weights.
    monkeypatch.setattr(rollouts, "our_side", lambda *_, **how: our_sides["thoughts" if how["thoughts"] else "text"])
    monkeypatch.setattr(rollouts, "SMOKE", WORKLOAD)
    path = tmp_path / "rollouts.json"
    with quick_compilation():
        rollouts.main(["--smoke", "--repeats", "2", "--output", str(path)])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert json.loads(printed[-1]) == result
    assert result["smoke"]
    assert ("needs torch and transformers: pip install" in printed[0]) == absent
    case = result["cases"]["groups of 2"]
    assert (case["questions"], case["group"], case["rounds"]) == (2, 2, 2)
    assert case["sides"].keys() == (OURS if absent else OURS | THEIRS)
    for side in case["sides"].values():
        assert 0 < side["lower_quartile_seconds"] <= side["median_seconds"] <= side["upper_quartile_seconds"]
        assert side["examples_per_second"] > 0
    others = set() if absent else {"transformers", pytorch_rollouts.FUSED}
    expected = {f"{mine} over {other}" for mine in OURS for other in others}
    assert case["speedups"].keys() == expected | {"thoughts over text", "thoughts over unshared thoughts"}
    assert ("refused" in case) == absent
