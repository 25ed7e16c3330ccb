"""Loss, logits, thoughts and every gradient against what the official implementation returned."""

import jax
import numpy as np
import pytest

from coconut.latent.rollout import rollout
from coconut.latent.thinkers import Gradient, OneByOne
from coconut.losses import language_loss
from tests.official_cases import load_case
from tests.tiny_huggingface import tensors_of_decoder
from tests.tiny_models import quick_jit

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("name", "dtype", "gradient"),
    [
        ("same_length", "float64", "implicit"),
        *(
            pytest.param("ragged_thoughts", dtype, gradient, marks=pytest.mark.slow)
            for dtype, gradient in (("float64", "implicit"), ("float64", "autodiff"), ("float32", "implicit"))
        ),
    ],
)
def test_agrees_with_the_official_implementation(name: str, dtype: str, gradient: Gradient) -> None:
    with jax.enable_x64(dtype == "float64"):
        case = load_case(name, dtype)
        batch = case.batch

        def loss_of(decoder, batch):
            output = rollout(
                decoder,
                batch.schedule,
                tokens=batch.tokens,
                positions=batch.positions,
                valid=batch.valid,
                think=OneByOne(gradient=gradient),
                every_hidden=True,
            )
            loss, _ = language_loss(decoder, batch, output)
            return loss.mean(), (output, decoder.unembed(output.hidden))

        (loss, (output, logits)), gradients = quick_jit(jax.value_and_grad(loss_of, has_aux=True))(case.decoder, batch)
        tolerance = TOLERANCE[dtype]
        assert logits.dtype == dtype
        assert abs(float(loss) - case.content["loss"]) <= tolerance * case.content["loss"]

        rows, columns = np.nonzero(batch.valid)
        official = case.official_columns[rows, columns]
        assert relative_error(np.asarray(logits)[rows, columns], case.expected["logits"][rows, official]) <= tolerance

        first = batch.schedule[0].length
        thoughts = np.asarray(output.thoughts[0])
        rows, columns = np.nonzero(batch.valid[:, first : first + thoughts.shape[1]])
        official = case.official_columns[rows, first + columns]
        embedded = case.expected["inputs_embeds"][rows, official]
        assert len(rows) == (np.asarray(case.content["batch"]["input_ids"]) == case.content["markers"]["latent"]).sum()
        assert relative_error(thoughts[rows, columns], embedded) <= tolerance

        ours = tensors_of_decoder(gradients)
        assert {f"grad.{name}" for name in ours} == {key for key in case.expected if key.startswith("grad.")}
        for name, gradient_of in ours.items():
            assert relative_error(gradient_of, case.expected[f"grad.{name}"]) <= tolerance, name
