"""What cannot be sampled is refused before anything is trained."""

import pytest

from coconut.errors import CoconutError
from coconut.latent.halting import HaltingConfig
from coconut.latent.policies.config import PolicyConfig
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.setup import prepare
from tests.tiny_runs import tiny_run

GAUSSIAN = PolicyConfig(kind="gaussian")
LAST = {"first_stage": 1}


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (GAUSSIAN, {"method": "cot"}, "'cot' at stage 0 has no block of thoughts that PolicyConfig.kind = 'gaussian'"),
        (GAUSSIAN, {"method": "pause", "curriculum": LAST}, "'pause' at stage 1 has no block of thoughts"),
        (GAUSSIAN, {}, "'coconut' at stage 0 has no block of thoughts"),
        (PolicyConfig(), {"method": "ponder", "curriculum": LAST}, "opens or ends blocks by itself"),
        (
            PolicyConfig(learnt_stop=True),
            {"curriculum": LAST, "halting": HaltingConfig(stop="head", threshold=0.5, most=6)},
            "HaltingConfig.most = 6: samples have at most 1 thoughts",
        ),
        (PolicyConfig(), {"sampling": {"max_new_tokens": 40}}, "DecoderConfig.max_positions = 48: a question, its"),
    ],
)
def test_runs_that_cannot_be_sampled_are_refused(policy, settings, message):
    with pytest.raises(CoconutError, match=message):
        prepare(tiny_run(reinforcement=ReinforcementConfig(policy=policy), **settings))


def test_answers_alone_can_be_learnt_from_any_page():
    for method in ("cot", "no_cot", "pause"):
        prepare(tiny_run(method=method, reinforcement=ReinforcementConfig()))
