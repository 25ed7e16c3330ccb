"""CODI against what the original computed, and against itself without its terms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.latent.feedback import Identity
from coconut.latent.projection import Projection
from coconut.methods import METHODS
from coconut.methods.codi import CodiOptions
from coconut.methods.method import LossContext
from coconut.model import Model
from coconut.pages import Thoughts
from tests.official_methods import aligned, decoder_of_case, read_case, relative_error, text
from tests.tiny_huggingface import tensors_of_decoder
from tests.tiny_models import quick_jit

PROJECTION = {"up.kernel": "1.weight", "up.bias": "1.bias", "down.kernel": "3.weight", "down.bias": "3.bias"}
PROJECTION |= {"norm.scale": "ln.weight", "norm.bias": "ln.bias"}


def original(name, folder, dtype, thoughts=6):
    """Model and views of a case, and what was computed."""
    content, weights, expected = read_case(name)
    ids = content["vocabulary"]
    decoder = decoder_of_case(weights, content["gpt2_config"], folder, dtype)
    projection = Projection(decoder.config, content["prj"]["hidden"], rngs=nnx.Rngs(0))
    for ours, theirs in PROJECTION.items():
        value = weights[f"prj.{theirs}"].astype(dtype)
        module, parameter = ours.split(".")
        setattr(getattr(projection, module), parameter, nnx.Param(jnp.asarray(value.T if "kernel" in ours else value)))
    prompt, student, teacher = ids["answer_prompt"], [], []
    for row in content["rows"]:
        answer = text(*prompt, *row["answer"], ids["eos"], scored=True, piece=1, answer=True, prefix=len(prompt))
        student.append((text(*row["question"], ids["bot"]), Thoughts(thoughts), text(ids["eot"]), answer))
        teacher.append((text(*row["question"]), text(*row["cot"], scored=True, piece=0), answer))
    views = {
        name: aligned(pages, pad_id=ids["pad"], latent_id=ids["bot"])
        for name, pages in (("main", student), ("teacher", teacher))
    }
    return Model(decoder, {"feedback": projection}), views, content, expected


def loss_of(model, views, options):
    loss = METHODS["codi"].loss(model, views, LossContext(options=options))
    total = sum(term.factor * term.ratio.mean() for term in loss.terms.values())
    return total, {name: term.ratio.mean() for name, term in loss.terms.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("codi_ragged_padsafe", "float64"),
        pytest.param("codi_equal", "float64", marks=pytest.mark.slow),
        pytest.param("codi_ragged_padsafe", "float32", marks=pytest.mark.slow),
    ],
)
def test_agrees_with_the_original(name: str, dtype: str, tmp_path: Path) -> None:
    tolerance = {"float64": 1e-10, "float32": 3e-5}[dtype]
    with jax.enable_x64(dtype == "float64"):
        model, views, content, expected = original(name, tmp_path, dtype)
        derive = jax.value_and_grad(lambda model, views: loss_of(model, views, CodiOptions()), has_aux=True)
        (total, terms), gradients = quick_jit(derive)(model, views)
        losses = content["losses"]
        for ours, theirs in (("language", "ce_student"), ("teacher", "ce_teacher"), ("distill", "kd")):
            assert abs(float(terms[ours]) - losses[theirs]) <= tolerance * losses[theirs], ours
        assert abs(float(total) - losses["total"]) <= tolerance * losses["total"]
        for own, value in tensors_of_decoder(gradients.decoder).items():
            key = f"grad_total/{own if own.startswith('transformer.') else f'transformer.{own}'}"
            assert relative_error(value, expected[key]) <= tolerance, own
        for ours, theirs in PROJECTION.items():
            module, parameter = ours.split(".")
            value = getattr(getattr(gradients.parts["feedback"], module), parameter)[...]
            value = value.T if parameter == "kernel" else value
            assert relative_error(value, expected[f"grad_total/prj.{theirs}"]) <= tolerance, ours
        watch = lambda model, view: LossContext().rollout(model, view, observed=view.before_answer[:, None])
        states = quick_jit(lambda model, views: {name: watch(model, view) for name, view in views.items()})(
            model, views
        )
        assert relative_error(states["main"].thoughts[0], expected["latents"][:, :6]) <= tolerance
        for name, theirs in (("main", "kd_student_hidden"), ("teacher", "kd_teacher_hidden")):
            assert relative_error(states[name].states[:, :, 0], expected[theirs]) <= tolerance


VARIANTS = {
    "l2": CodiOptions(squared=True),
    "no_std": CodiOptions(divide_by="none"),
    "one_latent": CodiOptions(),
    "no_prj": CodiOptions(),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_original(variant: str, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        model, views, content, _ = original("codi_equal", tmp_path, "float64", thoughts=1 if "one" in variant else 6)
        if variant == "no_prj":
            model = Model(model.decoder, {"feedback": Identity()})
        _, terms = quick_jit(lambda model, views: loss_of(model, views, VARIANTS[variant]))(model, views)
        losses = content["variants"][variant]["losses"]
        for ours, theirs in (("language", "ce_student"), ("distill", "kd")):
            np.testing.assert_allclose(float(terms[ours]), losses[theirs], rtol=1e-10)
