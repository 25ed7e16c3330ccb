"""What is measured of samples, on a hand-made case; and the flags that ask for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coconut.analysis.sample_plots import plot_samples
from coconut.commands.evaluate import EvaluateConfig
from coconut.commands.evaluate_samples import (
    CURVES,
    SamplesConfig,
    measure,
    plan_samples,
    policy_from,
    sample_costs,
    sample_table,
)
from coconut.commands.flags import check_together, parse_arguments
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.samples import Sample
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.policies.config import PolicyConfig


def samples_of(
    example: int, answers: str, right: str, passes: Sequence[int], log_probs: Sequence[float]
) -> list[Sample]:
    return [
        Sample(
            example=example,
            number=number,
            text=answer.strip(),
            answer=answer.strip(),
            right=answer == right,
            thoughts=2,
            new_tokens=own_passes - 3,
            drawn_tokens=2,
            passes=own_passes,
            log_probs={"tokens": log_prob},
            ended=True,
        )
        for number, (answer, own_passes, log_prob) in enumerate(zip(answers, passes, log_probs, strict=True))
    ]


SAMPLES = [
    # The majority is right, the fastest one and the likeliest one are not.
    samples_of(0, "abca", "a", (8, 5, 9, 8), (-2.0, -3.0, -1.0, -4.0)),
    # The fastest one and the likeliest one are right. Blanks have no vote, and d was seen before b.
    samples_of(1, "  db", "b", (9, 9, 9, 4), (-2.0, -3.0, -5.0, -1.0)),
]


def content_of(sizes: Sequence[int] = (1, 2, 4), budgets: Sequence[int | None] = (None,)) -> dict[str, Any]:
    curves, costs = measure(SAMPLES, sizes)
    costs |= {"seconds_per_question": 0.25, "samples_at_once": 8}
    whole = [{"thoughts": thoughts, "examples": 2, "curves": curves, "costs": costs} for thoughts in budgets]
    return {"count": 4, "budgets": whole}


def test_curves_by_hand() -> None:
    content = content_of()
    curves, costs = content["budgets"][0]["curves"], content["budgets"][0]["costs"]
    accuracy = {name: [point["accuracy"] for point in points] for name, points in curves.items()}
    # Two of four and one of four are right; 5 of 6 and 3 of 6 pairs hold a right one.
    assert accuracy["pass_at"] == pytest.approx([3 / 8, 8 / 12, 1.0])
    # Pairs of the first question: ab a, ac a, aa a, bc b, ba b, ca c; of the second, with blanks: d, b, d, b, and db d.
    assert accuracy["majority"] == pytest.approx([3 / 8, 5 / 12, 0.5])
    # The fastest of a pair: ab b, ac a, aa a, bc b, ba b, ca a; b of all three.
    assert accuracy["first_finish"] == pytest.approx([3 / 8, 6 / 12, 0.5])
    # The likeliest of a pair: ab a, ac c, aa a, bc c, ba b, ca c; b of all three.
    assert accuracy["likelihood"] == pytest.approx([3 / 8, 5 / 12, 0.5])
    last, first = curves["majority"], curves["first_finish"]
    assert [point["passes"] for point in last] == pytest.approx([61 / 8, (51 / 6 + 54 / 6) / 2, 9.0])
    assert [point["passes"] for point in first] == pytest.approx([61 / 8, (39 / 6 + 39 / 6) / 2, 4.5])
    assert [point["all_passes"] for point in last] == pytest.approx([61 / 8, 61 / 4, 61 / 2])
    assert [point["all_passes"] for point in first] == pytest.approx([61 / 8, 13.0, 18.0])
    for points in curves.values():
        for point in points:
            low, high = point["interval_95"]
            assert 0 <= low <= point["accuracy"] <= high <= 1
    assert curves["majority"][-1]["interval_95"] == [0.0, 1.0]
    assert costs["passes"] == 61 / 8 and costs["tokens"] == 37 / 8 and costs["thoughts"] == 2 and costs["ended"] == 1


def test_the_table_and_the_costs_name_every_measure() -> None:
    content = content_of()
    header, rows = sample_table(content)
    assert header == ("thoughts", "samples", *CURVES.values(), "passes, all / first")
    assert [row[:2] for row in rows] == [["as trained", "1"], ["as trained", "2"], ["as trained", "4"]]
    assert rows[-1][3] == "50.0 (0.0-100.0)" and rows[-1][-1] == "9.0 / 4.5"
    (line,) = sample_costs(content)
    assert "7.6 passes" in line and "all 4 took 0.25 s, 8 at once" in line and "2 questions" in line


@pytest.mark.parametrize("budgets", [(None,), (1, 4, 2)])
def test_curves_as_a_picture(budgets: Sequence[int | None], tmp_path: Path) -> None:
    figure = plot_samples(content_of(budgets=budgets), CURVES, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (axes,) = figure.axes
    drawn = {container.get_label(): container.lines[0].get_ydata() for container in axes.containers}  # type: ignore[attr-defined] - error bars, to matplotlib any container
    if budgets == (None,):
        assert list(drawn) == list(CURVES.values())
        assert list(drawn["majority"]) == pytest.approx([3 / 8, 5 / 12, 0.5])
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    else:
        assert list(drawn) == ["one sample", *CURVES.values()]
        assert list(drawn["one sample"]) == pytest.approx([3 / 8] * 3)
        assert list(drawn["most likely"]) == pytest.approx([0.5] * 3)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    with pytest.raises(CoconutError, match="no samples to draw"):
        plot_samples({"count": 4, "budgets": []}, CURVES, tmp_path / "none.png")


def test_flags_make_a_policy() -> None:
    arguments = ["--samples", "4", "--policy", "kind=gaussian", "--policy", "share=0.2", "--policy", "learnt_stop=True"]
    arguments += ["--policy", "least=1", "--budgets", "1,2", "--pass_at", "3", "--top_p", "0.9"]
    options = parse_arguments(["evaluate", "--workdir", "run", *arguments])
    check_together(options)
    assert policy_from(dict(options.policy)) == PolicyConfig(
        kind="gaussian", options={"share": 0.2}, learnt_stop=True, least=1
    )
    assert (options.samples, options.budgets, options.pass_at, options.top_p) == (4, (1, 2), (3,), 0.9)
    with pytest.raises(CoconutError, match="kind = 'gaussian' has no 'rate'; it has: share, learnt, over"):
        policy_from({"kind": "gaussian", "rate": 0.2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "kind=gaussian"], "--policy: says how samples are drawn or measured, it needs --samples"),
        (["--budgets", "1"], "--budgets: says how"),
        (["--pass_at", "1"], "--pass_at: says how"),
        (["--samples", "2", "--halting", "stop=count"], "--samples 2: not with --halting"),
        (["--samples", "2", "--method", "soft_thinking"], "--samples 2: not with --method soft_thinking"),
        (["--plot", "a.png"], "--plot draws a curve: it needs --halting_thresholds or --samples"),
    ],
)
def test_flags_that_mean_nothing_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(CoconutError) as caught:
        check_together(parse_arguments(["evaluate", "--workdir", "run", *arguments]))
    assert message in str(caught.value)


def test_numbers_of_samples_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CoconutError, match="--samples 0: must be at least 1"):
        SamplesConfig(count=0)
    with pytest.raises(CoconutError, match="pass@5: must be of at least 1 sample, and of at most the 4"):
        SamplesConfig(count=4, pass_at=(2, 5))
    with pytest.raises(SystemExit):
        parse_arguments(["evaluate", "--workdir", "run", "--budgets", "1,x"])
    assert "'1,x': must be whole numbers with commas between them" in capsys.readouterr().err


def test_a_run_whose_own_stop_ends_blocks_is_refused() -> None:
    default = AnswerConfig(halting=HaltingConfig())
    with pytest.raises(CoconutError, match="stop = 'count': the run ends its blocks so, and samples do not"):
        plan_samples(None, [], [], default, SamplesConfig(count=2))  # type: ignore[arg-type] - not looked at


def test_what_the_flags_say_of_tokens_replaces_what_the_run_says() -> None:
    own = SamplingConfig(max_new_tokens=7, temperature=0.5, top_k=4)
    assert EvaluateConfig(temperature=0.0).sampling_from(own) == SamplingConfig(max_new_tokens=7, top_k=4)
    given = EvaluateConfig(top_p=0.9, min_p=0.1).sampling_from(own)
    assert given == SamplingConfig(max_new_tokens=7, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1)
    with pytest.raises(CoconutError, match=r"--min_p 0\.1: at temperature 0 the likeliest token is taken"):
        EvaluateConfig(min_p=0.1).sampling_from(SamplingConfig())
