"""Which tokenizer a run gets."""

import pytest

from coconut.commands.configuration import resolve_run
from coconut.datasets import DataConfig, make_tokenizer
from coconut.errors import CoconutError
from coconut.tokenizers import MARKERS, TEXT, gpt2_tokenizer, load_tokenizer
from coconut.training.run import Run
from coconut.training.setup import prepare
from tests.tokenizers import published


def _config(**changes) -> DataConfig:
    return DataConfig(**{"task": "prosqa", "train": 4, "tokenizer": "words"} | changes)


def test_a_published_tokenizer_does_not_depend_on_the_examples():
    folder = str(published.folder("llama3"))
    config = _config(tokenizer="huggingface", tokenizer_path=folder, markers="reserved", eos_token="<|eot_id|>")
    tokenizer = make_tokenizer(config, [])
    assert tokenizer == load_tokenizer(folder, markers="reserved", eos_token="<|eot_id|>")
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.vocab_size == 3256
    folder = str(published.folder("gpt2"))
    assert make_tokenizer(_config(tokenizer="gpt2", tokenizer_path=folder), []) == gpt2_tokenizer(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "hugingface"}, "DataConfig.tokenizer = 'hugingface': did you mean 'huggingface'"),
        ({"tokenizer": "word"}, "did you mean 'words'"),
        ({"tokenizer": None}, "DataConfig.tokenizer = None: did you mean"),
        ({"tokenizer": "huggingface"}, "DataConfig.tokenizer_path = None: tokenizer = 'huggingface' needs a folder"),
        ({"tokenizer_path": "there"}, "DataConfig.tokenizer_path = 'there': tokenizer = 'words' has no use for it"),
        ({"tokenizer": "gpt2", "eos_token": "x"}, "DataConfig.eos_token = 'x': tokenizer = 'gpt2' has no use"),
        ({"markers": "reserved"}, "DataConfig.markers = 'reserved': tokenizer = 'words' has no use"),
        (
            {"tokenizer": "huggingface", "tokenizer_path": "x", "markers": "behind"},
            "DataConfig.markers = 'behind'",
        ),
        ({"tokenizer": "huggingface", "tokenizer_path": 3}, "DataConfig.tokenizer_path = 3: must be"),
    ],
)
def test_bad_tokenizers_are_named(changes, message):
    with pytest.raises(CoconutError, match=message):
        _config(**changes)


def test_a_run_keeps_its_tokenizer(tmp_path):
    bindings = [
        "DataConfig.train = 6",
        "DataConfig.validation = 0",
        "DataConfig.test = 0",
        "DataConfig.tokenizer = 'huggingface'",
        "DecoderConfig.max_positions = 4096",
        f"DataConfig.tokenizer_path = {str(published.folder('llama3'))!r}",
    ]
    config = resolve_run(["gin_configs/runs/prosqa_from_scratch.gin", "gin_configs/methods/coconut.gin"], bindings)
    run, dataset, examples = prepare(config)
    assert run.config.decoder.vocab_size == run.tokenizer.vocab_size == 3259
    example = dataset.splits["train"][0]
    question = examples[0].question.tolist()
    assert run.tokenizer.decode(question) == "<|begin_of_text|>" + TEXT.write(example)[0]
    run.save(tmp_path, changed={}, step=0)
    loaded = Run.load(tmp_path)
    assert loaded.tokenizer == run.tokenizer and loaded.tokenizer.fingerprint == run.tokenizer.fingerprint
    assert set(MARKERS) <= set(loaded.tokenizer.special_tokens)


@pytest.mark.parametrize("name", ["count", "seed", "start", "exclude"])
def test_what_a_split_decides_is_no_option_of_its_generator(name: str) -> None:
    with pytest.raises(CoconutError, match=rf"DataConfig\.options = .*'{name}' is not an option of a task"):
        DataConfig(task="multiplication", train=10, options={name: 1})
