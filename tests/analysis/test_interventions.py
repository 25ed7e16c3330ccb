"""Effects of interventions: on hand-made models whose answer is known, and against one question at a time."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest

from coconut.analysis.interventions import Effect, Intervention, NumberOfThoughts, Outcome, intervene
from coconut.errors import CoconutError
from coconut.evaluation.answers import answer_questions
from coconut.evaluation.evaluate import wilson_interval
from coconut.evaluation.interventions import without_directions
from coconut.evaluation.subject import Subject
from coconut.latent.feedback import Identity
from coconut.latent.thinkers import Sweeps
from coconut.methods import METHODS
from coconut.model import Model
from coconut.models.decoder import Decoder
from coconut.tasks import get_task
from coconut.tokenizers import SYMBOLS
from tests.one_question_at_a_time import (
    CONFIG,
    COUNTS,
    EXAMPLES,
    MODEL,
    PLACING,
    SETTINGS,
    TOKENIZED,
    TOKENIZER,
    embedded,
    logits_behind,
    row_of,
    slow_answer,
    states_of,
)
from tests.tiny_models import quick_compilation, random_decoder

SUBJECT = Subject(
    model=MODEL,
    tokenizer=TOKENIZER,
    method=METHODS["coconut"],
    placing=PLACING,
    task=get_task("small_graphs"),
    text_format=SYMBOLS,
)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def effect_of(outcome: Outcome) -> Effect:
    assert outcome.effect is not None
    return outcome.effect


def with_parameters(decoder: Decoder, **values: float | np.ndarray) -> Decoder:
    """The decoder with every parameter whose name ends so at a value: ``query_kernel`` is that of all queries."""

    def change(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path).removesuffix(".value").replace(".", "_")
        value = next((value for ending, value in values.items() if name.endswith(f"_{ending}")), None)
        return leaf if value is None else jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape)

    return jax.tree_util.tree_map_with_path(change, decoder)


def reader_of_thought_2() -> Decoder:
    """It adds to each state what the second thought holds, once there is one, and looks at nothing else there.

    One feature of the positions marks the second thought's; the keys of both heads hold it, all queries ask for it.
    """
    (length,) = {len(example.question) for example in TOKENIZED}
    width = CONFIG.embed_dim
    mark = np.eye(width)[0]
    of_heads = np.eye(width)[0] + np.eye(width)[width // 2]
    positions = np.zeros((CONFIG.max_positions, width))
    positions[length + 2] = 20 * mark  # Behind the question and the start marker stand the thoughts.
    decoder = random_decoder(CONFIG, seed=3)
    return with_parameters(
        decoder,
        positions_embedding=positions,
        attention_norm_scale=1.0,
        attention_norm_bias=0.0,
        query_kernel=0.0,
        query_bias=100 * of_heads,
        key_kernel=np.outer(mark, of_heads),
        key_bias=0.0,
        value_kernel=np.diag(1 - mark),
        value_bias=0.0,
        output_kernel=30 * np.eye(width),
        output_bias=0.0,
        down_kernel=0.0,
        down_bias=0.0,
        # No thought and no token has the feature itself.
        tokens_embedding=np.asarray(decoder.tokens.embedding[...]) * (1 - mark),
        norm_scale=1 - mark,
        norm_bias=0.0,
    )


def asked(decoder: Decoder) -> Subject:
    return dataclasses.replace(SUBJECT, model=Model(decoder, {"feedback": Identity()}))


def test_a_model_that_ignores_its_thoughts_shows_no_effect() -> None:
    blind = asked(with_parameters(MODEL.decoder, output_kernel=0.0))
    kinds = ("zero", "noise", "mean", "mean_of_all", "other", "permuted", "repeated")
    interventions = [Intervention(kind=kind) for kind in kinds]
    found = intervene(blind, EXAMPLES, SETTINGS, [*interventions, Intervention(kind="removed")], averaged=EXAMPLES)
    for outcome in found.outcomes[:-1]:
        effect = effect_of(outcome)
        least = 2 if effect.kind in ("permuted", "repeated") else 1
        assert effect.examples == sum(count >= least for count in COUNTS)
        assert effect.flips == effect.to_wrong == effect.to_right == 0 and effect.p_value == 1
        assert effect.log_probability_change == effect.kl == 0 and effect.accuracy == effect.accuracy_before
        assert effect.flips_interval == wilson_interval(0, effect.examples)
    # Whatever stands at the end marker's place, it does not even see the question. (Positions are another matter.)
    assert effect_of(found.outcomes[-1]).examples == sum(count > 0 for count in COUNTS)


def test_the_effect_is_at_the_thought_that_is_read_alone_and_other_questions_do_not_dilute_it() -> None:
    reader = asked(reader_of_thought_2())
    each = [Intervention(kind="noise", thoughts=(number,)) for number in (1, 2, 3, 4)]
    again = Intervention(kind="noise", thoughts=(1,), later="made again")
    first_two = Intervention(kind="noise", thoughts=(1, 2))
    found = intervene(reader, EXAMPLES, SETTINGS, [*each, again, first_two])
    *effects, of_first, of_both = (outcome.effect for outcome in found.outcomes)
    assert [None if effect is None else effect.examples for effect in effects] == [
        *(sum(count >= number for count in COUNTS) for number in (1, 2, 3)),
        None,  # No question has a fourth one.
    ]
    one, two, three = (effect_of(outcome) for outcome in found.outcomes[:3])
    assert one.flips == three.flips == 0 and max(one.kl, three.kl) < 1e-6
    # All that have a second thought, of which there are fewer than questions.
    assert two.flips == 1 and two.kl > 0.1 and 0 < two.examples < len(COUNTS)
    assert two.log_probability_change != 0
    # The second thought is made of the first one; a question without a second one is not asked.
    assert of_first is not None and of_first.examples == two.examples
    assert of_both is not None
    assert of_first.flips > 0 and of_first.kl > 0.1 and of_first.kl_of_later_thoughts is not None
    assert of_first.kl_of_later_thoughts > 0.1 and one.kl_of_later_thoughts is None
    assert of_both.examples == two.examples and of_both.flips == 1
    # Without the feature that is read, nothing else changes.
    features = np.eye(CONFIG.embed_dim)
    out = [Intervention(kind="out", alter=without_directions(features[rows])) for rows in ([0], slice(1, None))]
    mark, others = (effect_of(outcome) for outcome in intervene(reader, EXAMPLES, SETTINGS, out).outcomes)
    assert mark.flips == 0 and mark.kl < 1e-6 and others.kl > 0.1


INTERVENTIONS = (
    Intervention(kind="zero"),
    Intervention(kind="other", thoughts=(2,)),
    Intervention(kind="zero", thoughts=(1,), later="made again"),
    Intervention(kind="removed", thoughts=(2,)),
    Intervention(kind="removed"),
    NumberOfThoughts(count=1),
    NumberOfThoughts(count=3, beyond=True),
)


def slow_thoughts(question: np.ndarray, given: np.ndarray, count: int) -> np.ndarray:
    """The first thoughts as they are given, the others made one by one of the last state of the whole row."""
    thoughts = list(given)
    while len(thoughts) < count:
        row = np.concatenate([embedded(question), embedded([TOKENIZER.start_latent_id]), *(x[None] for x in thoughts)])
        thoughts.append(states_of(row)[-1])
    return np.asarray(thoughts, np.float32).reshape(count, CONFIG.embed_dim)


def slow_inputs(intervention: Intervention | NumberOfThoughts, index: int, own: np.ndarray) -> np.ndarray | None:
    question = TOKENIZED[index].question
    if isinstance(intervention, NumberOfThoughts):
        applies = 0 < len(own) < intervention.count if intervention.beyond else len(own) > intervention.count
        return slow_thoughts(question, own[: intervention.count], intervention.count) if applies else None
    if len(own) < max(intervention.thoughts or (1,)) + (intervention.later == "made again"):
        return None
    places = [number - 1 for number in intervention.thoughts or range(1, len(own) + 1)]
    if intervention.kind == "removed":
        return own[[place for place in range(len(own)) if place not in places]]
    new = own.copy()
    new[places] = 0
    return slow_thoughts(question, new[:1], len(own)) if intervention.later == "made again" else new


def test_effects_are_those_of_one_question_at_a_time() -> None:
    found = intervene(SUBJECT, EXAMPLES, SETTINGS, INTERVENTIONS, seed=5)
    plain = list(answer_questions(*SUBJECT.asked, TOKENIZED, SETTINGS))
    assert [answer.text for answer in found.answers] == [answer.text for answer in plain]
    extract = SUBJECT.task.extract_answer
    for outcome in found.outcomes:
        if isinstance(outcome.intervention, Intervention) and outcome.intervention.kind == "other":
            continue  # Whose they are is drawn.
        changes, divergences, flips = [], [], []
        for index, (example, own) in enumerate(zip(TOKENIZED, found.thoughts, strict=True)):
            new = slow_inputs(outcome.intervention, index, own)
            assert (new is None) == (outcome.texts[index] is None), (outcome.intervention, index)
            if new is None:
                continue
            rows = [np.concatenate([row_of(example, inputs), embedded(example.answer)]) for inputs in (own, new)]
            likely = [jax.nn.log_softmax(logits_behind(row)[-len(example.answer) - 1 : -1]) for row in rows]
            picked = [np.asarray(x)[np.arange(len(x)), example.answer][example.answer_prefix :].sum() for x in likely]
            changes.append(picked[1] - picked[0])
            before, after = (distributions[example.answer_prefix :] for distributions in likely)
            divergences.append(float((jnp.exp(before) * (before - after)).sum(-1).mean()))
            if not effect_of(outcome).forced:
                assert outcome.texts[index] == slow_answer(example, new)
            flips.append(extract(outcome.texts[index] or "") != extract(plain[index].text))
            assert outcome.flipped[index] == flips[-1]
        effect = effect_of(outcome)
        assert effect.examples == len(changes)
        np.testing.assert_allclose(effect.log_probability_change, np.mean(changes), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(effect.kl, np.mean(divergences), rtol=1e-3, atol=1e-5)
        assert effect.flips == np.mean(flips)
        low, high = effect.kl_interval
        assert low < effect.kl < high
        discordant = effect.to_wrong + effect.to_right
        assert effect.p_value == (binomtest(effect.to_wrong, discordant).pvalue if discordant else 1.0)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(CoconutError, match="unknown intervention: 'zeros'; did you mean 'zero'"):
        Intervention(kind="zeros")
    for thoughts in ((), (0,), (2, 1), (1, 1)):
        with pytest.raises(CoconutError, match=r"Intervention.thoughts = \(.*must be numbers from 1 on"):
            Intervention(kind="zero", thoughts=thoughts)
    with pytest.raises(CoconutError, match="later = 'made again': thoughts = None leaves none behind"):
        Intervention(kind="zero", later="made again")
    with pytest.raises(CoconutError, match=r"NumberOfThoughts.count = -1: must be at least 0"):
        NumberOfThoughts(count=-1)
    with pytest.raises(CoconutError, match="there are no questions to intervene on"):
        intervene(SUBJECT, [], SETTINGS, ())
    with pytest.raises(CoconutError, match="'mean': there are no questions to take the mean thought from"):
        intervene(SUBJECT, EXAMPLES, SETTINGS, [Intervention(kind="mean")])
    with pytest.raises(CoconutError, match="the method 'cot' feeds no thoughts back"):
        intervene(dataclasses.replace(SUBJECT, method=METHODS["cot"]), EXAMPLES, SETTINGS, ())
    together = dataclasses.replace(SUBJECT.method, think=lambda options: Sweeps(count=1))
    again = Intervention(kind="zero", thoughts=(1,), later="made again")
    with pytest.raises(
        CoconutError, match=r"zero \(1, later made again\): Sweeps\(count=1\) makes all thoughts together"
    ):
        intervene(dataclasses.replace(SUBJECT, method=together), EXAMPLES, SETTINGS, [again])
