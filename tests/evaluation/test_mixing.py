"""Vectors mixed by weights, by the cross-entropy method, by a classifier; and by the command."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.errors import CoconutError
from coconut.evaluation.mixing import (
    CrossEntropyConfig,
    QuestionClassifier,
    check_mixable,
    cross_entropy_search,
    question_states,
)
from coconut.models.adapters import add_singular_values, mix_singular_values, with_scales
from coconut.models.decoder import Decoder
from coconut.models.parameters import decoder_parameters
from coconut.models.singular_values import ScaleForm, SingularValueConfig
from tests.tiny_models import GPT2_STYLE, quick_compilation, quick_jit, random_decoder
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import trained


def vectors(form: ScaleForm, seeds: int, **execution: Any) -> list[Decoder]:
    """Decoders alike but for their vectors."""
    config = SingularValueConfig(form=form, targets=("layers.*.mlp.up",))
    start = quick_jit(lambda plain: add_singular_values(plain, config, jax.random.key(0)))(
        random_decoder(GPT2_STYLE, **execution)
    )

    def moved(seed: int) -> Decoder:
        rng = np.random.default_rng(seed)
        draw = lambda path, x: (
            x + 0.5 * rng.normal(size=x.shape).astype(x.dtype) * ("singular_z" in jax.tree_util.keystr(path))
        )
        return jax.tree_util.tree_map_with_path(draw, start)

    return [moved(seed) for seed in range(seeds)]


@pytest.mark.parametrize("form", ["scales", "masks"])
def test_mixed_vectors_are_those_of_the_formula(form: ScaleForm) -> None:
    decoders = vectors(form, 2)
    weights = jnp.asarray([[0.7, 0.2], [0.5, 0.9]])
    mixed = decoder_parameters(mix_singular_values(decoders, weights))
    own = [decoder_parameters(decoder) for decoder in decoders]
    for layer in range(2):
        name = f"layers.{layer}.mlp.up.singular_"
        z, s = [np.asarray(one[f"{name}z"]) for one in own], np.asarray(own[0][f"{name}s"])
        first, second = weights[:, layer]
        expected = first * z[0] + second * z[1]
        if form == "masks":
            mask = first / (1 + np.exp(-z[0])) + second / (1 + np.exp(-z[1]))
            expected = mask * s.sum() / (mask * s).sum()
        np.testing.assert_allclose(mixed[f"{name}z"], expected, rtol=1e-5)
    # Of one decoder alone it is that decoder, in the structure that all mixtures share.
    alone = with_scales(decoders[1], lambda name, scale: scale)
    one = mix_singular_values(decoders, jnp.asarray([0.0, 1.0]))
    assert jax.tree.structure(alone) == jax.tree.structure(one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone, one)
    with quick_compilation():
        questions = [np.asarray([1, 2, 3], np.int32), np.asarray([4, 5], np.int32)]
        states = [question_states(decoder, questions, batch_size=2) for decoder in (alone, decoders[1])]
    np.testing.assert_allclose(*states, rtol=2e-5, atol=2e-5)


def test_stacked_layers_are_mixed_layer_by_layer() -> None:
    weights = jnp.asarray([[0.7, 0.2], [0.5, 0.9]])
    decoders = vectors("masks", 2, scan_layers=True)
    found = decoder_parameters(mix_singular_values(decoders, weights))["layers.mlp.up.singular_z"]
    own = [decoder_parameters(decoder) for decoder in decoders]
    for layer in range(2):
        mask = sum(
            weights[index, layer] / (1 + np.exp(-np.asarray(one["layers.mlp.up.singular_z"])[layer]))
            for index, one in enumerate(own)
        )
        s = np.asarray(own[0]["layers.mlp.up.singular_s"])[layer]
        np.testing.assert_allclose(found[layer], mask * s.sum() / (mask * s).sum(), rtol=1e-5)


def test_the_cross_entropy_method_finds_a_maximum_and_keeps_the_best() -> None:
    goal, asked = np.asarray([0.9, 0.1, 0.6]), []

    def score(weights: np.ndarray) -> tuple[float, float]:
        asked.append(weights)
        distance = float(np.abs(weights - goal).max())
        return float(distance < 0.3), -distance  # The first says little, as accuracy on ten questions.

    found = cross_entropy_search(score, np.full(3, 1 / 3), CrossEntropyConfig(seed=1))
    np.testing.assert_allclose(found.weights, goal, atol=0.02)
    assert found.tried == len(asked)
    assert found.score == max(score(weights) for weights in tuple(asked))
    assert list(found.history) == sorted(found.history) and len(found.history) < 50
    assert all(((weights >= 0) & (weights <= 1)).all() for weights in asked)
    first = np.asarray(asked[1:32])
    assert first.min() < 0.1 and first.max() > 0.9  # drawn evenly
    for changes, message in (({"elites": 32}, "elites = 32: must be below the population"), ({"population": 1}, "pop")):
        with pytest.raises(CoconutError, match=re.escape(message)):
            CrossEntropyConfig(**changes)


def test_questions_are_told_apart_by_their_last_state() -> None:
    rng = np.random.default_rng(0)
    scale = np.asarray([1.0, 100.0], np.float32)
    draw = lambda middle, count: (np.asarray(middle) + scale * rng.normal(size=(count, 2))).astype(np.float32)
    classifier = QuestionClassifier.fitted([draw((-4, 0), 40), draw((4, 50), 40)])
    found = classifier(np.concatenate([draw((-4, 0), 30), draw((4, 50), 30)]))
    assert (found == [0] * 30 + [1] * 30).mean() > 0.95


def test_what_cannot_be_mixed_is_named() -> None:
    one = {"decoder.a.singular_z": np.ones(2), "decoder.a.singular_u": np.ones(2), "decoder.b": np.ones(2)}
    check_mixable(["one", "two"], [one, {**one, "decoder.a.singular_z": np.zeros(2)}])
    for other, message in (
        ({**one, "decoder.b": np.zeros(2)}, "two: parameter decoder.b is not that of one; vectors can be mixed where"),
        ({**one, "decoder.a.singular_u": np.zeros(2)}, "decoder.a.singular_u is not that of one; start both runs from"),
        ({**one, "feedback.scale": np.ones(1)}, "two: parameter feedback.scale is in one of it and one alone"),
    ):
        with pytest.raises(CoconutError, match=re.escape(message)):
            check_mixable(["one", "two"], [one, other])
    with pytest.raises(CoconutError, match="one: its run trained no vectors"):
        check_mixable(["one", "two"], [{"decoder.b": np.ones(2)}] * 2)


@pytest.mark.slow
def test_the_command_mixes_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with quick_compilation():
        trained(tiny_run(curriculum={"steps_per_stage": 1}, save_every=None), tmp_path / "base")
        for seed in (1, 2):
            changes = {"adapter": SingularValueConfig(), "optimizer": {"weight_decay": 0.0, "learning_rate": 0.1}}
            changes |= {"curriculum": {"steps_per_stage": 2}, "data": {"seed": seed}}
            run = tiny_run(**changes, init_from="base", save_every=None)
            trained(run, tmp_path / f"run_{seed}")
        mixing = ["mix", "run_1", "run_2", "--split", "validation", "--output", "mixed.json"]
        assert main(mixing) == EXIT_DONE
        result = json.loads(Path("mixed.json").read_text())
        assert [own["name"] for own in result["sets"]] == ["run_1", "run_2"]
        for own in result["sets"]:
            assert list(own["accuracy"]) == ["without vectors", "run_1", "run_2", "mixed"]
            assert sum(own["chosen"].values()) == own["questions"] == 4
        assert main(["mix", "run_1", "run_1", "--split", "validation"]) == EXIT_BAD_INPUT
        assert "two of the runs have the same validation questions" in capsys.readouterr().err
        assert main([*mixing, "--by", "weights", "--weights", "1,0"]) == EXIT_DONE
        accuracy = json.loads(Path("mixed.json").read_text())["sets"][0]["accuracy"]
        assert accuracy["mixed"] == accuracy["run_1"]
        assert main([*mixing, "--by", "cross_entropy", "--shots", "2", "--iterations", "1"]) == EXIT_DONE
        [first, _] = json.loads(Path("mixed.json").read_text())["sets"]
        assert (first["questions"], first["shots"], len(first["weights"])) == (2, 2, 2)
    assert "not counted" in capsys.readouterr().out
    for flags, message in {
        ("--weights", "1,0"): "--weights: belongs to --by weights, which needs it",
        ("--by", "weights", "--weights", "1"): "--weights: 1 are given for 2 runs",
        ("--by", "cross_entropy", "--shots", "4"): "run_1: --shots 4 leave none of 4 questions to answer",
        ("--per_layer",): "--per_layer: belongs to --by cross_entropy, not to --by classifier",
    }.items():
        assert main([*mixing, *flags]) == EXIT_BAD_INPUT
        assert message in capsys.readouterr().err
    assert main(["mix", "run_1", "base"]) == EXIT_BAD_INPUT
    assert "is in one of it and run_1 alone" in capsys.readouterr().err
