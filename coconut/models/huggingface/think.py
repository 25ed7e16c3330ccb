"""Thinks in continuous thoughts, with PyTorch and `transformers` alone. ``coconut export`` writes this file.

    python think.py "QUESTION"
    python think.py "QUESTION" --thoughts 3

or, from Python, in this folder:

    from think import answer, load
    model, tokenizer = load(".")
    text, ids, thoughts = answer(model, tokenizer, "QUESTION")

A thought is the last hidden state of the column before it, fed back as the input of a column of its own (Hao et al.
2024, arXiv 2412.06769). The likeliest token is written at every step. One question at a time.
"""

import argparse
import copy
import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

PARTS = "coconut_parts.safetensors"


def load(folder: str | Path) -> tuple[Any, Any]:
    """The model and the tokenizer of this folder."""
    folder = Path(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.thinking_parts = load_file(folder / PARTS) if (folder / PARTS).exists() else {}
    # Not AutoTokenizer: for some kinds of model that takes a class of its own, whatever the folder says.
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, question: str, thoughts: int | None = None, max_new_tokens: int | None = None
) -> tuple[str, list[int], torch.Tensor]:
    """Reads a question, thinks, and writes.

    Args:
      model: what `load` returns.
      tokenizer: likewise.
      question: the question, as the model's training data write questions.
      thoughts: of every block; None for as many as were trained.
      max_new_tokens: tokens after which it ends at the latest, the end token included; None for as in training.

    Returns:
      The text, its ids without the end token, and the thoughts ``[K, D]``.

    Raises:
      ValueError: the model was not trained to think, and thoughts are asked for.
    """
    config = model.config.coconut
    between = config["behind_question"]
    if thoughts is not None:
        if not any(isinstance(part, int) for part in between):
            raise ValueError(f"thoughts = {thoughts}: this model has no place for thoughts")
        between = [thoughts if isinstance(part, int) else part for part in between]
    ids = tokenizer(question.strip() + config["question_suffix"], split_special_tokens=True)["input_ids"]
    cache, made = DynamicCache(config=model.config), []
    last = _read(model, cache, _embed(model, ids))
    for part in between:
        if isinstance(part, int):
            last, block = _think(model, cache, last, part, config)
            made.append(block)
        elif part:
            last = _read(model, cache, _embed(model, part))
    written: list[int] = []
    for _ in range(config["max_new_tokens"] if max_new_tokens is None else max_new_tokens):
        # An embedding may have more rows than there are tokens.
        token = int(_logits(model, last)[:, : config["vocab_size"]].argmax())
        if token == model.config.eos_token_id:
            break
        written.append(token)
        last = _read(model, cache, _embed(model, [token]))
    return tokenizer.decode(written), written, torch.cat([last[:0], *made])


def _embed(model: Any, ids: list[int]) -> torch.Tensor:
    """Embeddings ``[T, D]``."""
    return model.get_input_embeddings()(torch.tensor(ids, device=model.device))


def _run(model: Any, cache: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Hidden states ``[T, D]`` behind the last norm, of columns that follow what is in the cache."""
    # Older releases of `transformers` have another name for it.
    name = "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"
    return model.base_model(inputs_embeds=inputs[None], use_cache=True, **{name: cache}).last_hidden_state[0]


def _read(model: Any, cache: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The hidden state ``[1, D]`` of the last of some columns."""
    return _run(model, cache, inputs)[-1:]


def _logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """``[T, V]``."""
    return model.get_output_embeddings()(hidden).float()


def _think(
    model: Any, cache: Any, last: torch.Tensor, count: int, config: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state behind a block of thoughts, and the thoughts ``[K, D]``."""
    if not count:
        return last, last[:0]
    if config["sweeps"] is None:  # One by one.
        made = []
        for _ in range(count):
            made.append(_feed_back(model, last, config))
            last = _read(model, cache, made[-1])
        return last, torch.cat(made)
    # All together, made again in each sweep (PCCoT, Wu et al. 2025); without a sweep they are pause tokens.
    block = _embed(model, [config["latent_id"]] * count)
    for _ in range(min(config["sweeps"], count)):
        hidden = _run(model, copy.deepcopy(cache), block)
        block = _feed_back(model, torch.cat([last, hidden[:-1]]), config)
    return _read(model, cache, block), block


def _feed_back(model: Any, hidden: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """The next inputs ``[T, D]`` from the hidden states before them; ``feedback`` in config.json says how."""
    feedback = config.get("feedback", {"kind": "identity", "factor": 1.0})
    kind, factor, table = feedback["kind"], feedback["factor"], model.get_input_embeddings().weight
    if (scale := getattr(model.get_input_embeddings(), "embed_scale", None)) is not None:  # Gemma's.
        table = table * scale.to(table)
    part = lambda name: model.thinking_parts[f"feedback.{name}"].to(hidden)
    linear = lambda name, x: x @ part(f"{name}.kernel") + part(f"{name}.bias")
    if kind == "identity":
        return hidden
    if kind == "scale":
        return hidden * factor
    if kind == "match_norm":
        return _rms_norm(hidden) * (factor * table.norm(dim=-1).mean() * table.shape[-1] ** -0.5)
    if kind == "norm":
        return _rms_norm(hidden) * part("scale")
    if kind == "projection":
        projected = linear("down", F.gelu(linear("up", hidden)))
        return F.layer_norm(projected, projected.shape[-1:], part("norm.scale"), part("norm.bias"), eps=1e-5)
    shares = (_logits(model, hidden) / factor).softmax(-1).to(table)
    if kind == "mixture":
        return shares @ table
    if kind == "gated":
        likeliest, soft = table[shares.argmax(-1)], shares @ table / shares.norm(dim=-1, keepdim=True)
        kept = (-8 * F.softplus(-part("decay")) * linear("reset", likeliest).sigmoid()).exp()
        return kept * likeliest + (1 - kept.square() + 1e-8).sqrt() * linear("input", likeliest).sigmoid() * soft
    raise ValueError(f"feedback = {kind!r}: not known here")


def _rms_norm(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * (hidden.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def _main() -> None:
    parser = argparse.ArgumentParser(description="Asks the model of this folder, which thinks before it writes.")
    parser.add_argument("question")
    parser.add_argument("--thoughts", type=int, help="of every block; as many as were trained if not given")
    options = parser.parse_args()
    text, _, thoughts = answer(*load(Path(__file__).parent), options.question, options.thoughts)
    print(f"{len(thoughts)} thoughts, then: {text}")


if __name__ == "__main__":
    _main()
