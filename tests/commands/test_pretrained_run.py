"""From a checkpoint on disk to Coconut and back: CoT from a small random GPT-2, Coconut from its best, export."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

pytest.importorskip("torch")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from coconut.commands.configuration import resolve_run
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.commands.model_origin import origin
from coconut.errors import CoconutError
from coconut.storage_path import parse_path
from coconut.training.loading import load_model
from coconut.training.manifest import Manifest
from coconut.training.run import Run
from coconut.training.setup import initial_model, prepare
from tests.tiny_models import quick_compilation

pytestmark = pytest.mark.slow

ROWS = 24  # 16 to train on, 4 to validate with, 4 to test
RELEASED = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def synthetic_rows() -> list[str]:
    """Lines in the form of grade-school-math."""
    rows = []
    for i in range(ROWS):
        a, b = 3 + i, 2 + 7 * i % 11
        first, second = f"<<{a}*{b}={a * b}>>{a * b}", f"<<{a * b}+1={a * b + 1}>>{a * b + 1}"
        answer = f"In the bags are {first} nuts.\nWith the other one {second}.\n#### {a * b + 1}"
        rows.append(json.dumps({"question": f"Tom has {a} bags of {b} nuts and one more. How many?", "answer": answer}))
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows in the released format; every second one is released, where those lie beside the checkout."""
    rows = synthetic_rows()
    if RELEASED.is_file():
        with RELEASED.open() as released:
            rows[::2] = [line.rstrip("\n") for line in itertools.islice(released, len(rows[::2]))]
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture(scope="module")
def gpt2(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `transformers` writes it: a random GPT-2 of one layer, and a tokenizer learnt from the rows."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(data.read_text().splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=512, n_embd=16, n_layer=1, n_head=2, eos_token_id=0
    )
    GPT2LMHeadModel(sizes).save_pretrained(folder)
    return folder


def flags(gpt2: Path, data: Path, run: str) -> list[str]:
    """What turns a GSM8K recipe into one that takes seconds."""
    values = {
        "DecoderConfig.num_layers": 1,
        "DecoderConfig.embed_dim": 16,
        "DecoderConfig.num_heads": 2,
        "DecoderConfig.max_positions": 512,
        "DataConfig.tokenizer": "huggingface",
        "DataConfig.tokenizer_path": str(gpt2),
        "DataConfig.train": f"{data}[:16]",
        "DataConfig.validation": f"{data}[16:20]",
        "DataConfig.test": f"{data}[20:24]",
        "PipelineConfig.batch_size": 4,
        "RunConfig.evaluation_batch_size": 4,
        "RunConfig.evaluate_every": None,
        "CurriculumConfig.max_latent_stage": 1,
        "CurriculumConfig.epochs_per_stage": 0.5,
        "CurriculumConfig.total_epochs": 1,
        "SamplingConfig.max_new_tokens": 8,
    }
    method = "cot" if run == "gsm8k_cot" else "coconut"
    files = [f"gin_configs/runs/{run}.gin", f"gin_configs/methods/{method}.gin"]
    return [*[f"--gin_file={file}" for file in files], *[f"--gin.{name}={value!r}" for name, value in values.items()]]


@pytest.fixture(scope="module")
def cot(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the CoT run."""
    workdir = tmp_path_factory.mktemp("cot")
    pretrained = f"--gin.RunConfig.pretrained={str(gpt2)!r}"
    assert main(["train", *flags(gpt2, data, "gsm8k_cot"), pretrained, "--workdir", str(workdir)]) == EXIT_DONE
    return workdir


@pytest.fixture(scope="module")
def coconut(gpt2: Path, data: Path, cot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the Coconut run that goes on from it."""
    workdir = tmp_path_factory.mktemp("coconut")
    init_from = f"--gin.RunConfig.init_from={str(cot)!r}"
    assert main(["train", *flags(gpt2, data, "gsm8k_coconut"), init_from, "--workdir", str(workdir)]) == EXIT_DONE
    return workdir


def test_coconut_begins_at_the_stage_after_the_written_steps(coconut: Path) -> None:
    run, _, progress = load_model(coconut, "latest")
    assert run.config.curriculum.first_stage == 1
    assert [stage["stage"] for stage in progress.stages] == [1, 2]
    lines = [json.loads(line) for line in (coconut / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if line["kind"] == "train")


def test_a_run_starts_from_the_pretrained_weights_and_markers_that_are_copies(gpt2: Path, cot: Path) -> None:
    run = Run.load(cot)
    embedding = np.asarray(initial_model(run).decoder.tokens.embedding[...])
    theirs = GPT2LMHeadModel.from_pretrained(gpt2).transformer.wte.weight.detach().numpy()
    assert embedding.shape[0] == theirs.shape[0] + 3 == run.tokenizer.vocab_size
    np.testing.assert_array_equal(embedding[: theirs.shape[0]], theirs)
    [like] = run.tokenizer.encode("<<")
    markers = (run.tokenizer.start_latent_id, run.tokenizer.latent_id, run.tokenizer.end_latent_id)
    for marker in markers:
        np.testing.assert_array_equal(embedding[marker], theirs[like])


def test_coconut_starts_from_the_best_of_the_written_run(cot: Path, coconut: Path) -> None:
    run = Run.load(coconut)
    assert run.config.init_checkpoint == "best"
    start = initial_model(run).decoder.tokens.embedding[...]
    best = load_model(cot, "best")[1].decoder.tokens.embedding[...]
    np.testing.assert_array_equal(start, best)
    assert not np.array_equal(start, load_model(coconut, "latest")[1].decoder.tokens.embedding[...])


def test_evaluate_reports_it(coconut: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert main(["evaluate", "--workdir", str(coconut), "--output", str(output)]) == EXIT_DONE
    result = json.loads(output.read_text())
    assert result["trained"]["examples"] == result["thoughts"]["0"]["examples"] == 4
    assert result["trained"]["thoughts"] == 2
    assert result["config"]["init_checkpoint"] == "best"
    assert result["training_seconds"] > 0


def test_transformers_computes_what_was_trained(coconut: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert main(["export", "--workdir", str(coconut), "--output", str(folder), "--which", "latest"]) == EXIT_DONE
    run, model, _ = load_model(coconut, "latest")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "Tom has 12 bags of nuts.\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == run.tokenizer.encode(text)
    assert tokenizer.convert_tokens_to_ids("<|latent|>") == run.tokenizer.latent_id
    tokens = jnp.asarray([ids])
    hidden, _ = model.decoder.trunk(
        model.decoder.embed(tokens), positions=jnp.arange(len(ids))[None], valid=jnp.ones_like(tokens, bool)
    )
    expected = theirs(torch.tensor([ids])).logits.detach().numpy()
    np.testing.assert_allclose(model.decoder.unembed(hidden), expected, atol=2e-5)


def test_a_model_card_says_what_the_run_recorded(coconut: Path) -> None:
    run, _, progress = load_model(coconut, "latest")
    card = origin(coconut, run, progress)
    accuracy = Manifest.read(parse_path(str(coconut / "checkpoints" / str(progress.step)))).validation["accuracy"]
    assert f"\n{100 * accuracy:.1f} % of the validation questions" in card
    for expected in (
        "| method | `coconut` |",
        f"SHA-256 {run.splits['test'][:12]} |",
        f"| optimizer steps | {progress.step:,} ",
    ):
        assert expected in card
    assert str(coconut.parent) not in card, "folders of this machine are nobody's business"


def test_trained_markers_survive_the_way_back(coconut: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert main(["export", "--workdir", str(coconut), "--output", str(folder), "--which", "latest"]) == EXIT_DONE
    _, model, _ = load_model(coconut, "latest")
    arguments = flags(folder, data, "gsm8k_cot")
    files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file")]
    bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    run, _, _ = prepare(resolve_run(files, [*bindings, f"RunConfig.pretrained={str(folder)!r}"]))
    start = initial_model(run).decoder.tokens.embedding[...]
    np.testing.assert_array_equal(start, model.decoder.tokens.embedding[...])


def test_a_run_goes_on_without_what_it_started_from(gpt2: Path, data: Path, cot: Path, tmp_path: Path) -> None:
    pretrained = f"--gin.RunConfig.pretrained={str(gpt2)!r}"
    hidden = tmp_path / "moved.safetensors"
    weights = gpt2 / "model.safetensors"
    weights.rename(hidden)
    try:
        assert main(["train", *flags(gpt2, data, "gsm8k_cot"), pretrained, "--workdir", str(cot)]) == EXIT_DONE
    finally:
        hidden.rename(weights)


# --- Bad input, before any long work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,why",
    [
        (["--gin.RunConfig.marker_token='no such token'"], r"marker_token = 'no such token': the tokenizer makes \d+"),
        (["--gin.DecoderConfig.embed_dim=32"], "embed_dim"),
        (["--gin.DecoderConfig.vocab_size=7"], r"DecoderConfig\.vocab_size = 7: this run has \d+ token ids"),
        (["--gin.RunConfig.init_from='elsewhere'"], r"init_from = 'elsewhere': pretrained = .* gives the parameters"),
        (["--gin.DataConfig.tokenizer_path='/no/such'"], "/no/such"),
    ],
)
def test_what_does_not_fit_is_one_error(
    gpt2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], why: str
) -> None:
    arguments = [*flags(gpt2, data, "gsm8k_cot"), f"--gin.RunConfig.pretrained={str(gpt2)!r}", *changes]
    assert main(["train", *arguments, "--workdir", str(tmp_path / "run")]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert message.startswith("coconut train: ")
    assert re.search(why, message), message
    # A corrected command can use the same workdir.
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_tokenizer_with_more_ids_than_the_embedding_is_an_error(gpt2: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "smaller"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=512, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    ).save_pretrained(other)
    arguments = flags(gpt2, data, "gsm8k_cot")
    files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file")]
    bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    config = resolve_run(files, [*bindings, f"RunConfig.pretrained={str(other)!r}"])
    with pytest.raises(CoconutError, match=r"its embedding has 100 rows, but the tokenizer has \d+ ids"):
        prepare(config)


def test_adapters_are_exported_merged_or_for_peft(gpt2: Path, data: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = ["--gin_file=gin_configs/adapters/lora.gin", "--gin.AdapterConfig.rank=2"]
    pretrained = f"--gin.RunConfig.pretrained={str(gpt2)!r}"
    workdir = ["--workdir", str(tmp_path / "run")]
    assert main(["train", *flags(gpt2, data, "gsm8k_cot"), *adapted, pretrained, *workdir]) == EXIT_DONE
    export = ["export", *workdir, "--which", "latest", "--output"]
    assert main([*export, str(tmp_path / "merged")]) == EXIT_DONE
    assert main([*export, str(tmp_path / "adapter"), "--peft"]) == EXIT_DONE
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    run, _, _ = load_model(tmp_path / "run", "latest")
    assert run.config.adapter is not None
    tokens = torch.tensor([[*range(5, 15), *run.config.adapter.trained_rows]])
    with torch.no_grad():
        expected = merged(tokens).logits
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=0, atol=2e-5 * float(expected.std()))
        base = theirs.get_base_model()
        with theirs.disable_adapter():
            assert (base(tokens).logits - expected).abs().max() > 1e-3, "the adapter changes something"


def test_what_is_no_adapter_is_not_exported_for_peft(
    cot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--workdir", str(cot), "--output", str(tmp_path / "x"), "--peft"]) == EXIT_BAD_INPUT
    assert "--peft: RunConfig.adapter = None: the run has no adapters" in capsys.readouterr().err
