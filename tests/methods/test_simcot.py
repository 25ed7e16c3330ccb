"""SIM-CoT against what the original computed, and against the methods it stands beside."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.methods import METHODS
from coconut.methods.codi import CodiOptions
from coconut.methods.method import LossContext
from coconut.methods.simcot import ReaderOptions, SimcotCodiOptions, steps_of_slots, write_to_read
from coconut.model import Model
from coconut.pages import Markers, Placing, Thoughts
from coconut.tokenizers import TokenizedExample
from tests.official_methods import aligned, decoder_of_case, read_case, relative_error, text
from tests.tiny_huggingface import tensors_of_decoder
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder


def original(name, folder, **changed):
    """Model and views of a case, and what was computed. Its rows lose the newline that the original cuts off."""
    content, weights, expected = read_case(name)
    ids, settings = content["vocabulary"], {**content["settings"], **changed}
    part = lambda name: {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(name)}
    decoder = decoder_of_case(part("base"), content["gpt2_config_base"], folder, "float64")
    reader = decoder_of_case(part("decoder"), content["gpt2_config_decoder"], folder, "float64")
    count, most, stage = settings["c_thought"], settings["max_latent_stage"], settings["scheduled_stage"]
    slots, pages, read = min(stage, most), [], []
    for row in content["rows"]:
        hidden = row["steps"] if stage > most else row["steps"][:stage]
        written = [token for step in row["steps"][len(hidden) :] for token in step]
        answer = text(*row["answer"], scored=True, piece=1, answer=True, prefix=1)
        steps = text(*written, scored=True, piece=0)
        question = text(*row["question"], ids["start"])
        pages.append((question, Thoughts(slots * count), text(ids["end"]), *([steps] if written else []), answer))
        texts = steps_of_slots(
            [np.asarray(step, np.int32) for step in hidden], slots, np.asarray(row["answer"], np.int32), "answer"
        )
        cut = [[*one[:-2], one[-1]] if one[-2] == ids["newline"] else one for one in texts]
        parts = [part for one in cut for part in (Thoughts(count), text(*one, scored=True, piece=0))]
        read.append((text(*row["question"]), *parts))
    make = lambda pages: aligned(pages, pad_id=ids["pad"], latent_id=ids["latent"])
    model = Model(decoder, {"feedback": Identity(), "reader": reader})
    return model, {"main": make(pages), "read": make(read)}, content, expected


def loss_of(model, views, options, method="simcot"):
    loss = METHODS[method].loss(model, views, LossContext(options=options))
    terms = {name: term.ratio.mean() for name, term in loss.terms.items()}
    return sum(loss.terms[name].factor * mean for name, mean in terms.items()), terms


@pytest.mark.parametrize("name", ["simcot_ragged", pytest.param("simcot_equal", marks=pytest.mark.slow)])
def test_agrees_with_the_original(name: str, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        model, views, content, expected = original(name, tmp_path)
        derive = jax.value_and_grad(lambda model, views: loss_of(model, views, ReaderOptions()), has_aux=True)
        (total, terms), gradients = quick_jit(derive)(model, views)
        losses = content["losses"]
        for ours, theirs in ((terms["language"], "ce"), (terms["steps"], "step"), (total, "total")):
            np.testing.assert_allclose(float(ours), losses[theirs], rtol=1e-10)
        for part, decoder in (("base", gradients.decoder), ("decoder", gradients.parts["reader"])):
            for own, value in tensors_of_decoder(decoder).items():
                name = own if own.startswith("transformer.") else f"transformer.{own}"
                assert relative_error(value, expected[f"grad_total/{part}.{name}"]) <= 1e-10, own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "options", "changed"),
    [
        ("token_level", ReaderOptions(average="tokens"), {}),
        ("stage1", ReaderOptions(), {"scheduled_stage": 1}),
        ("c_thought1", ReaderOptions(), {"c_thought": 1}),
    ],
)
def test_variants_of_the_original(variant, options, changed, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        model, views, content, _ = original("simcot_ragged", tmp_path, **changed)
        _, terms = quick_jit(lambda model, views: loss_of(model, views, options))(model, views)
        losses = content["variants"][variant]["losses"]
        for ours, theirs in (("language", "ce"), ("steps", "step")):
            np.testing.assert_allclose(float(terms[ours]), losses[theirs], rtol=1e-10)


def example(*steps: list[int]) -> TokenizedExample:
    return TokenizedExample(
        question=np.asarray([1, 2], np.int32),
        steps=tuple(np.asarray(step, np.int32) for step in steps),
        answer=np.asarray([3, 4, 0], np.int32),
        answer_prefix=1,
    )


def test_what_a_slot_is_read_as() -> None:
    ids = lambda texts: [np.asarray(one).tolist() for one in texts]
    answer = np.asarray([3, 4, 0], np.int32)
    steps = example([5], [6, 7], [8]).written_steps
    assert ids(steps_of_slots(steps, 3, answer, "answer")) == [[5, 0], [6, 7, 0], [8, 0]]
    assert ids(steps_of_slots(steps, 2, answer, "answer")) == [[5, 0], [6, 7, 8, 0]]
    assert ids(steps_of_slots(steps[:1], 3, answer, "answer")) == [[5, 0], [3, 4, 0], [3, 4, 0]]
    assert ids(steps_of_slots(steps[:1], 2, answer, "nothing")) == [[5, 0], []]
    assert ids(steps_of_slots([], 1, answer, "nothing")) == [[]]
    with pytest.raises(CoconutError, match="1 steps for 2 slots"):
        steps_of_slots(steps[:1], 2, answer, "error")


def views_of(method: str, options) -> dict:
    curriculum = CurriculumConfig(c_thought=1, max_latent_stage=2)
    placing = Placing(curriculum=curriculum, stage=3, options=options, markers=Markers(start=9, latent=10, end=11))
    examples = [example([5], [6, 7], [8]), example([5, 6]), example([8], [7])]
    return {
        name: aligned([write(one, placing) for one in examples], pad_id=0, latent_id=10)
        for name, write in METHODS[method].pages.items()
    }


@pytest.mark.parametrize(
    ("name", "base", "options", "base_options"),
    [
        ("simcot", "coconut", ReaderOptions(reader=0.0), None),
        pytest.param("simcot_codi", "codi", SimcotCodiOptions(reader=0.0), CodiOptions(), marks=pytest.mark.slow),
    ],
)
def test_weight_0_is_the_method_without_it_to_the_bit(name, base, options, base_options) -> None:
    decoder = random_decoder(GPT2_STYLE)
    views = views_of(name, options)
    derive = lambda method, options: quick_jit(
        jax.grad(lambda model, views: loss_of(model, views, options, method)[0], allow_int=True)
    )
    with_reader = Model(decoder, {"feedback": Identity(), "reader": random_decoder(GPT2_STYLE, 1)})
    own = derive(name, options)(with_reader, views)
    views.pop("read")
    without = derive(base, base_options)(Model(decoder, {"feedback": Identity()}), views)
    jax.tree.map(np.testing.assert_array_equal, own.decoder, without.decoder)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(own.parts["reader"]))


@pytest.mark.slow
def test_the_thought_behind_the_last_is_read_too() -> None:
    decoder, options = random_decoder(GPT2_STYLE), SimcotCodiOptions(distill=0.0, teacher=0.0)
    model = Model(decoder, {"feedback": Identity(), "reader": random_decoder(GPT2_STYLE, 1)})
    views = views_of("simcot_codi", options)
    assert [span.length for span in views["read"].schedule] == [2, 1, 2, 1, 3, 1]  # the third slot has nothing to read
    gradient = quick_jit(jax.grad(lambda model: loss_of(model, views, options, "simcot_codi")[0]))(model)
    assert np.abs(np.asarray(jax.tree.leaves(gradient.parts["reader"])[0])).max() > 0


def test_without_thoughts_nothing_is_read() -> None:
    curriculum = CurriculumConfig(max_latent_stage=2)
    placing = Placing(
        curriculum=curriculum, stage=0, options=ReaderOptions(), markers=Markers(start=9, latent=10, end=11)
    )
    page = write_to_read(example([5]), placing)
    assert not any(isinstance(part, Thoughts) for part in page)
    deeper = write_to_read(example([5]), dataclasses.replace(placing, stage=2))
    assert [len(jnp.atleast_1d(part.ids)) for part in deeper if not isinstance(part, Thoughts)] == [2, 2, 3]
