"""The benchmark of generation runs, and Hugging Face's side has our weights and writes without a draw."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from coconut.latent.generate import prefill
from experiments.benchmarks import generate, pytorch_rollouts
from tests.tiny_models import random_decoder

WORKLOAD = dataclasses.replace(generate.SMOKE, batches=(1, 2))


@pytest.mark.slow
def test_every_batch_size_is_measured_against_every_way_to_run_theirs(tmp_path, monkeypatch, capsys):
    if reason := pytorch_rollouts.absence():
        pytest.skip(reason)
    monkeypatch.setattr(generate, "SMOKE", WORKLOAD)
    path = tmp_path / "generate.json"
    generate.main(["--smoke", "--case", "a", "--against", "transformers", "--repeats", "2", "--output", str(path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(path.read_text()) == result
    case = result["cases"]["a"]
    theirs = (*pytorch_rollouts.STOCK, pytorch_rollouts.FUSED)
    assert case["sides"].keys() == {f"batch {b}{other}" for b in (1, 2) for other in ("", *(f", {x}" for x in theirs))}
    for side in case["sides"].values():
        assert side["examples_per_second"] > 0
    faster = {f"batch {b} over {other}" for b in (1, 2) for other in ("transformers", pytorch_rollouts.FUSED)}
    assert case["speedups"].keys() == {"batch 2 over batch 1", *faster}


def test_their_side_writes_the_most_likely_tokens_of_our_decoder():
    if reason := pytorch_rollouts.absence():
        pytest.skip(reason)
    decoder = random_decoder(WORKLOAD.decoder)
    prompts = np.random.default_rng(0).integers(0, 50, (2, WORKLOAD.prompt), np.int32)
    columns = prompts
    for _ in range(WORKLOAD.new_tokens):
        last = prefill(decoder, jnp.asarray(columns), jnp.ones(columns.shape, bool)).last
        columns = np.concatenate([columns, np.argmax(decoder.unembed(last), -1)[:, None].astype(np.int32)], 1)
    models, _ = pytorch_rollouts.load(decoder)
    for name, theirs in models.items():
        written = pytorch_rollouts.writing(theirs, new_tokens=WORKLOAD.new_tokens)(prompts)
        np.testing.assert_array_equal(written, columns[:, WORKLOAD.prompt :], err_msg=name)
