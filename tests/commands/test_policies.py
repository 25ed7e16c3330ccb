"""The gin files of policies, and a dry run of a run that learns from rewards."""

import re
from pathlib import Path

import pytest

from coconut.commands.configuration import resolve_run
from coconut.commands.train import dry_run
from coconut.latent.policies.config import POLICIES
from coconut.training.config import from_json, to_json
from coconut.training.state import fresh_parts

FOLDER = Path(__file__).parents[2] / "gin_configs" / "policies"
FILES = sorted(FOLDER.glob("*.gin"))
RUN = ["gin_configs/runs/small_graphs_reinforcement.gin", "gin_configs/methods/coconut.gin"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_policy_file_resolves(file: Path) -> None:
    config = resolve_run([*RUN, f"gin_configs/policies/{file.name}"])
    assert config.reinforcement is not None
    policy = config.reinforcement.policy
    assert f"'{policy.kind}'" in file.read_text() or file.stem == "learnt_stop"
    assert policy.learnt_stop == (file.stem == "learnt_stop")
    assert from_json(type(config), to_json(config), file.name) == config


def test_every_policy_has_a_file_and_a_row_in_its_page() -> None:
    kinds = {
        re.findall(r"PolicyConfig.kind = '(\w+)'", file.read_text())[0] for file in FILES if file.stem != "learnt_stop"
    }
    assert kinds == POLICIES.keys()
    page = (FOLDER.parents[1] / "docs" / "how_to" / "rewards.md").read_text()
    for file in FILES:
        assert f"`{file.stem}`" in page


def test_the_scorers_run_resolves() -> None:
    config = resolve_run(["gin_configs/runs/small_graphs_scorer.gin", RUN[1]], ["ScorerConfig.epochs = 2"])
    assert config.scorer is not None and config.reinforcement is None
    assert config.scorer.policy.options["share"] == 0.1 and config.scorer.epochs == 2
    assert from_json(type(config), to_json(config), "scorer") == config


@pytest.mark.slow
def test_a_dry_run_compiles_the_step_on_samples() -> None:
    bindings = (
        "DataConfig.train = 40",
        "DataConfig.validation = 0",
        "DataConfig.test = 0",
        "ReinforcementConfig.epochs = 2",
        "DecoderConfig.num_layers = 1",
    )
    run, summary = dry_run(resolve_run([*RUN, "gin_configs/policies/gaussian_learnt.gin"], bindings))
    assert "policy" in fresh_parts(run.config)
    [stage] = summary.stages
    assert stage.flops > 0
    # The end marker, and up to eight tokens that are scored.
    assert stage.schedule.endswith("Language(length=9, scored=8)"), stage.schedule
