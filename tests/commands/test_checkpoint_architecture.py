"""What gin leaves out of the decoder is that of the checkpoint a run starts from; what contradicts it is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from coconut.commands.configuration import operative_config, resolve_run
from coconut.errors import CoconutError
from coconut.models.config import LongRotaryScaling
from coconut.models.huggingface import read_config
from coconut.storage_path import as_path
from coconut.tokenizers import symbol_tokenizer
from coconut.training.config import RunConfig, from_json, to_json
from coconut.training.run import Run
from coconut.training.setup import family_name
from tests.tiny_huggingface import ALL_CONFIGS

FILES = [f"gin_configs/{name}.gin" for name in ("base", "tasks/gsm8k", "pretrained", "methods/coconut")]


@pytest.fixture(params=["mistral", "phi3_plain"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a config.json alone."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text(ALL_CONFIGS[request.param].to_json_string(use_diff=False))
    return tmp_path / "there"


def resolve(folder: Path, *bindings: str, workdir: Path | None = None) -> RunConfig:
    where = None if workdir is None else as_path(workdir)
    return resolve_run(FILES, [f"PRETRAINED = {str(folder)!r}", *bindings], workdir=where)


def test_the_decoder_is_what_config_json_says(folder: Path) -> None:
    there = dataclasses.replace(read_config(folder), vocab_size=None)
    assert there.family is not None and resolve(folder).decoder == there
    chosen = resolve(folder, "DecoderConfig.max_positions = 8", "DecoderConfig.dropout = 0.5").decoder
    assert chosen == dataclasses.replace(there, max_positions=8, dropout=0.5)
    assert "DecoderConfig.num_layers = 2" in operative_config()


def test_factors_of_long_rows_survive_gin_and_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(ALL_CONFIGS["phi3"].to_json_string(use_diff=False))
    config = resolve(tmp_path)
    assert isinstance(config.decoder.rotary_scaling, LongRotaryScaling) and config.decoder.max_positions == 32
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config))), "here") == config
    with pytest.raises(CoconutError, match=re.escape("DecoderConfig.max_positions = 33: rows longer than LongRotaryS")):
        resolve(tmp_path, "DecoderConfig.max_positions = 33")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("DecoderConfig.num_layers = 3", "DecoderConfig.num_layers = 3, but config.json says num_hidden_layers = 2"),
        ("DecoderConfig.mlp_bias = True", "DecoderConfig.mlp_bias = True, but config.json says mlp_bias = False"),
        ("DecoderConfig.num_layer = 3", "Did you mean 'DecoderConfig.num_layers'"),
    ],
)
def test_what_contradicts_it_is_refused_by_name(folder: Path, binding: str, message: str) -> None:
    with pytest.raises(CoconutError, match=re.escape(message)):
        resolve(folder, binding)


def test_a_run_that_began_and_one_that_starts_from_it_need_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    config = resolve(folder)
    decoder = dataclasses.replace(config.decoder, vocab_size=29)
    (tmp_path / "run").mkdir()
    Run(dataclasses.replace(config, decoder=decoder), symbol_tokenizer(["a"]), data="").save(
        as_path(tmp_path / "run"), changed={}, step=0
    )
    shutil.rmtree(folder)
    assert resolve(folder, workdir=tmp_path / "run") == config
    bindings = ("RunConfig.pretrained = None", f"RunConfig.init_from = {str(tmp_path / 'run')!r}")
    assert resolve(folder, *bindings).decoder == config.decoder
    with pytest.raises(CoconutError, match=re.escape(f"{folder} is")):
        resolve(folder)


def test_a_family_that_is_not_named_is_the_checkpoint_s(folder: Path) -> None:
    config = resolve(folder)
    nameless = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, family=None))
    assert (
        family_name(nameless, None)
        == config.decoder.family
        == json.loads((folder / "config.json").read_text())["model_type"]
    )
