"""What Hugging Face's GPT-2 in PyTorch writes, by its `generate`, to compare ours with. On CPUs."""

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coconut.latent.generate import prefill
from coconut.models.decoder import Decoder
from coconut.models.huggingface import save_pretrained
from coconut.provenance import provenance

STOCK = {f"transformers, {attention}": attention for attention in ("eager", "sdpa")}
FUSED = "transformers, fused activation"


def absence() -> str | None:
    """Why Hugging Face's model cannot take part, if it cannot."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return f"needs {' and '.join(missing)}: pip install 'coconut-jax[test]'"
    if (backend := jax.default_backend()) != "cpu":
        return f"CPUs are compared, and JAX runs on {backend}"
    return None


def load(decoder: Decoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hugging Face's GPT-2 with a decoder's weights, in float32 on every core, a model for each way to run it.

    Besides their two attentions, as they ship them, PyTorch's own kernel of the activation, where theirs is many
    elementwise passes.

    Returns:
      The models by name, and what they run with.
    """
    import torch
    import transformers
    from transformers.activations import ACT2FN

    torch.set_num_threads(provenance()["hardware"]["cores"])
    torch.manual_seed(0)
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained(decoder, folder)
        for name, attention in {**STOCK, FUSED: "sdpa"}.items():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention
            )
            # Draws among all tokens, where the default is the 50 likeliest; nothing ends a sample.
            model.generation_config = transformers.GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, use_cache=True, pad_token_id=0
            )
            models[name] = model.eval()
    for block in models[FUSED].transformer.h:
        block.mlp.act = ACT2FN["gelu_pytorch_tanh"]
    return models, {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "torch_threads": torch.get_num_threads(),
    }


def sampling(model: Any, prompts: np.ndarray, group: int, *, new_tokens: int) -> Callable[[], np.ndarray]:
    """Draws with `generate`, and gives the tokens, ``[samples, new tokens]``.

    Args:
      model: one of `load`.
      prompts: tokens of the questions, ``[B, P]``.
      group: samples of each.
      new_tokens: tokens of each sample.
    """
    import torch

    def draw() -> np.ndarray:
        ids = torch.from_numpy(prompts.astype(np.int64))
        with torch.inference_mode():
            rows = model.generate(
                ids, attention_mask=torch.ones_like(ids), num_return_sequences=group, max_new_tokens=new_tokens
            )
        tokens = rows[:, prompts.shape[1] :].numpy()
        if tokens.shape != (len(prompts) * group, new_tokens):
            raise AssertionError(f"generate wrote tokens of the shape {tokens.shape}")
        return tokens

    return draw


def writing(model: Any, *, new_tokens: int) -> Callable[[np.ndarray], np.ndarray]:
    """Writes the most likely tokens behind prompts ``[B, P]`` with `generate`, and gives them, ``[B, new tokens]``.

    Args:
      model: one of `load`.
      new_tokens: tokens of each row.
    """
    import torch

    def write(prompts: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(prompts.astype(np.int64))
        with torch.inference_mode():
            rows = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        tokens = rows[:, prompts.shape[1] :].numpy()
        if tokens.shape != (len(prompts), new_tokens):
            raise AssertionError(f"generate wrote tokens of the shape {tokens.shape}")
        return tokens

    return write


def check_same(decoder: Decoder, models: dict[str, Any], prompts: np.ndarray) -> None:
    """Compares the logits behind some prompts.

    Raises:
      AssertionError: a model's differ from the decoder's by more than float32 rounds.
    """
    import torch

    ours = decoder.unembed(prefill(decoder, jnp.asarray(prompts), jnp.ones(prompts.shape, bool)).last)
    for name, model in models.items():
        with torch.inference_mode():
            theirs = model(input_ids=torch.from_numpy(prompts.astype(np.int64))).logits[:, -1].numpy()
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5, err_msg=f"{name} is another model")
