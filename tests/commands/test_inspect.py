"""``coconut inspect`` on a model that nobody trained: what it writes fits together."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from coconut.commands.inspect.command import InspectConfig, describe, inspect_model
from coconut.errors import CoconutError
from coconut.model import make_model
from coconut.models.experts_config import ExpertsConfig
from coconut.tasks import get_task, save_examples
from coconut.training.progress import Progress
from tests.commands.test_evaluate_thoughts import untrained
from tests.tiny_models import quick_compilation
from tests.training.trained_runs import QUIET

# Of three thoughts, two, and none.
EXAMPLES = [
    dataclasses.replace(example, steps=example.steps[:count])
    for example, count in zip(get_task("small_graphs").generate(3, 0, config="e8"), (3, 2, 0), strict=True)
]


# Two of three experts, chosen by softmax.
EXPERTS = {"mlp": "swiglu", "mlp_bias": False, "experts": ExpertsConfig(count=3, chosen=2, width=8, router="softmax")}


def inspected(folder: Path, method: str = "coconut", **decoder: Any) -> dict:
    save_examples(folder / "questions.json", EXAMPLES)
    run, model = untrained(method)
    if decoder:
        config = dataclasses.replace(run.config, decoder=dataclasses.replace(run.config.decoder, **decoder))
        run, model = dataclasses.replace(run, config=config), make_model(config.decoder, jax.random.key(0))
    config = InspectConfig(output=folder / "out", split=str(folder / "questions.json"), top=2, allow_overlap=True)
    progress = Progress(stage=run.config.curriculum.final_stage)
    with quick_compilation():
        return inspect_model(run, model, progress, config, command="coconut inspect", console=QUIET)


@pytest.mark.slow
def test_everything_is_written_and_fits_together(tmp_path: Path) -> None:
    content = inspected(tmp_path, **EXPERTS)
    out = tmp_path / "out"
    assert json.loads((out / "inspect.json").read_text())["measures"] == json.loads(json.dumps(content["measures"]))
    numbers = {effect["label"]: effect["examples"] for effect in content["effects"]}
    assert numbers["noise (all)"] == numbers["removed (all)"] == numbers["noise (2)"] == 2
    # Behind the second thought of two there is none that could be made again.
    assert numbers["noise (3)"] == numbers["noise (2, later made again)"] == 1
    assert numbers["stopped after 2 thoughts"] == 1 and numbers["sent on to 4 thoughts"] == 2
    assert numbers["intact (all), answer forced"] == 2
    assert "noise (2, later made again)" in describe(content, out)
    arrays = np.load(out / "arrays.npz")
    for index, (question, example) in enumerate(zip(content["questions"], EXAMPLES, strict=True)):
        count = len(example.steps)
        assert question["thoughts"] == count == len(question["after"]) - 1 == len(question["lens"])
        assert all(len(tokens) == 2 for tokens in question["lens"])
        assert len(arrays[f"thoughts/{index}"]) == arrays[f"attention/{index}"].shape[1] == count
        assert arrays[f"attention/{index}"].shape[2] == len(question["tokens"])
        assert (arrays[f"attention/{index}"].sum(-1) <= 1 + 1e-5).all()
        for held in question["after"]:
            assert 0 < sum(held["belief"]) < 1 + 1e-5
        # What is shown after all of its thoughts is its answer.
        assert question["after"][-1]["text"] == question["answer"]
        assert ("noise (3)" in question["interventions"]) == (count == 3)
    use = json.loads((out / "inspect.json").read_text())["experts"]
    kinds = {"thought 1": 2, "thought 2": 2, "thought 3": 1, "start marker": 3, "end marker": 3}
    assert kinds.items() <= dict(zip(use["kinds"], use["columns"], strict=True)).items()
    np.testing.assert_allclose(np.sum(use["shares"], -1), np.ones((1, len(use["kinds"]))))
    assert use["interval"][0][0] <= use["interval"][1][0] and 0 <= use["of_tokens"][0] <= 1
    assert {"expert_shares", "expert_distances"} <= {Path(figure["file"]).stem for figure in content["figures"]}
    for figure in content["figures"]:
        drawn = out / figure["file"]
        assert drawn.stat().st_size and drawn.with_suffix(".svg").stat().st_size and figure["caption"]
    assert EXAMPLES[0].question.replace("<", "\\u003c") in (out / "index.html").read_text()


def test_a_model_without_thoughts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoconutError, match="the method 'cot' feeds no thoughts back"):
        inspected(tmp_path, "cot")
    with pytest.raises(CoconutError, match="--questions 0: must be at least 1"):
        InspectConfig(output=tmp_path, questions=0)
    with pytest.raises(CoconutError, match="--batch_size 0: must be at least 1"):
        InspectConfig(output=tmp_path, batch_size=0)
    with pytest.raises(CoconutError, match="--seed -1: must be at least 0"):
        InspectConfig(output=tmp_path, seed=-1)
