"""The benchmark of rollouts runs, and each side does the work that it is compared by."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from coconut.model import make_model
from experiments.benchmarks import rollouts

SIZES = ("num_layers", "embed_dim", "num_heads", "max_positions")
OURS = {"thoughts", "text", "unshared thoughts"}
THEIRS = {*rollouts.STOCK, rollouts.FUSED}


def test_the_sizes_are_those_of_the_small_config():
    text = (Path(__file__).parents[2] / "gin_configs" / "models" / "small_4l128.gin").read_text()
    written = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
    for size in SIZES:
        assert int(written[f"DecoderConfig.{size}"]) == getattr(rollouts.WORKLOAD.decoder, size), size


def test_a_speedup_is_over_the_faster_attention_round_by_round():
    eager, sdpa = rollouts.STOCK
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
@pytest.mark.parametrize("absent", [False, True])
def test_every_side_is_measured_or_refused(tmp_path, capsys, monkeypatch, absent):
    if absent:
        monkeypatch.setattr(rollouts.importlib.util, "find_spec", lambda name: None)
    elif rollouts.absence():
        pytest.skip(f"transformers: {rollouts.absence()}")
    path = tmp_path / "rollouts.json"
    rollouts.main(["--smoke", "--repeats", "2", "--output", str(path)])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert json.loads(printed[-1]) == result
    assert result["smoke"]
    theirs = set() if absent else THEIRS
    assert ("needs torch and transformers: pip install" in printed[0]) == absent
    for group, case in zip(rollouts.SMOKE.groups, result["cases"].values(), strict=True):
        assert case["group"] == group and case["questions"] * group == case["samples"]
        ours = OURS if group > 1 else OURS - {"unshared thoughts"}
        assert case["sides"].keys() == ours | theirs
        for side in case["sides"].values():
            assert 0 < side["lower_quartile_seconds"] <= side["median_seconds"] <= side["upper_quartile_seconds"]
            assert side["examples_per_second"] > 0
        others = set() if absent else {"transformers", rollouts.FUSED}
        expected = {f"{mine} over {other}" for mine in ours for other in others} | {"thoughts over text"}
        assert case["speedups"].keys() == expected | ({"thoughts over unshared thoughts"} if group > 1 else set())
        assert ("refused" in case) == absent
    assert result["cases"]["groups of 2"]["memory_ratio"] > 1  # keys and values of a prompt are held once a group


@pytest.mark.slow
def test_the_samples_of_a_question_do_not_depend_on_sharing_and_differ():
    decoder = make_model(rollouts.SMOKE.decoder, jax.random.key(0)).decoder
    prompts = rollouts.random_prompts(rollouts.SMOKE, 2)
    shared = rollouts.our_side(decoder, prompts, 2, thoughts=2, new_tokens=4).draw()
    unshared = rollouts.our_side(decoder, np.repeat(prompts, 2, axis=0), 1, thoughts=2, new_tokens=4).draw()
    np.testing.assert_array_equal(shared, unshared)
    assert (shared[0] != shared[1]).any()


@pytest.mark.slow
def test_another_model_is_not_compared():
    if reason := rollouts.absence():
        pytest.skip(f"transformers: {reason}")
    workload = rollouts.SMOKE
    decoder, another = (make_model(workload.decoder, jax.random.key(seed)).decoder for seed in range(2))
    models, _ = rollouts.load_transformers(decoder)
    prompts = rollouts.random_prompts(workload, 2)
    rollouts.check_same(decoder, models, prompts)
    tokens = rollouts.their_side(models[rollouts.FUSED], prompts, 2, new_tokens=6).draw()
    assert tokens.shape == (4, 6) and (tokens < workload.decoder.vocabulary).all()
    assert (tokens[0] != tokens[1]).any()
    with pytest.raises(AssertionError, match="transformers, eager is another model"):
        rollouts.check_same(another, models, prompts)
