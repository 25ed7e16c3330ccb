"""Adapters as PEFT computes them, reads and writes them, on random models of `transformers`."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from coconut.errors import CoconutError
from coconut.models.adapters import AdapterConfig, merge_adapters
from coconut.models.config import ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_adapter, load_pretrained, save_adapter, save_pretrained
from coconut.models.parameters import decoder_parameters
from tests.tiny_huggingface import VOCABULARY, random_model
from tests.tiny_models import quick_jit, random_adapters

ROWS = (7, 3)
TOKENS = np.asarray([[7, 1, 3, 9, 7, 2], [0, 3, 5, 11, 28, 7]])
# Of GPT-2 the fused matrix, and a name that two matrices end in; of Llama one matrix in one layer alone.
TARGETS = {
    "deepseek_v3": ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "model.layers.1.self_attn.o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "mlp.down_proj", "model.layers.1.mlp.up_proj"],
    "phi3": ["qkv_proj", "mlp.down_proj"],
}
OURS = {
    "deepseek_v3": ("layers.*.attention.query*", "layers.1.attention.latent", "layers.*.attention.output"),
    "gpt2": ("layers.*.attention.*", "layers.0.mlp.up"),
    "llama": ("layers.*.attention.value", "layers.*.mlp.*", "layers.1.attention.output"),
    "phi3": ("layers.*.attention.query", "layers.*.attention.value", "layers.1.mlp.up"),
}


@pytest.fixture(scope="module", params=["deepseek_v3", "gpt2", "llama", "phi3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """The name of a family, its model, and the folder of it. GPT-2 ties its head, and the Llama here does not."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@quick_jit
def our_logits(decoder: Decoder) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    embedded = decoder.embed(jnp.asarray(TOKENS))
    return decoder.unembed(decoder.trunk(embedded, positions=positions, valid=jnp.ones(TOKENS.shape, bool))[0])


def assert_same_logits(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.asarray(theirs).std())


def trained_by_peft(model: Any, folder: Path, **settings: Any) -> np.ndarray:
    """Writes an adapter whose parameters are random; what PEFT computes with it."""
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return their_logits(adapted)


def test_an_adapter_of_peft_computes_here_what_it_computes_there(base: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, model, folder = base
    theirs = trained_by_peft(
        model, tmp_path, r=4, lora_alpha=6, target_modules=TARGETS[name], trainable_token_indices=list(ROWS)
    )
    decoder, config = load_adapter(tmp_path, load_pretrained(folder))
    assert np.abs(theirs - their_logits(model)).max() > 0.1, "the adapter changes something"
    assert_same_logits(our_logits(decoder), theirs)
    assert (config.rank, config.alpha, config.trained_rows) == (4, 6, ROWS)
    expected = {
        "deepseek_v3": {f"layers.*.attention.{x}" for x in ("query_latent", "latent", "expansion")}
        | {"layers.1.attention.output"},
        "gpt2": {f"layers.*.{x}" for x in ("attention.query", "attention.key", "attention.value", "attention.output")}
        | {"layers.*.mlp.down"},
        "llama": {"layers.*.attention.query", "layers.*.attention.value", "layers.*.mlp.down", "layers.1.mlp.up"},
        "phi3": {f"layers.*.{x}" for x in ("attention.query", "attention.key", "attention.value", "mlp.down")},
    }
    assert set(config.targets) == expected[name]


@pytest.mark.parametrize(
    ("base", "stabilized"), [(name, False) for name in TARGETS] + [("gpt2", True)], indirect=["base"]
)
def test_peft_computes_what_an_adapter_of_ours_does(
    base: tuple[str, Any, Path], stabilized: bool, tmp_path: Path
) -> None:
    name, model, folder = base
    config = AdapterConfig(
        rank=2, alpha=3.0, dropout=0.1, targets=OURS[name], trained_rows=ROWS, rank_stabilized=stabilized
    )
    decoder = random_adapters(load_pretrained(folder), config)
    save_adapter(decoder, config, tmp_path / "adapter", base="some/base")
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    ours = our_logits(decoder)
    assert_same_logits(their_logits(adapted), ours)
    assert adapted.peft_config["default"].base_model_name_or_path == "some/base"
    # Read again it is the same to the bit, of the same rank; merged a model of `transformers` computes the same.
    again, found = load_adapter(tmp_path / "adapter", load_pretrained(folder))
    assert (found.rank, found.alpha, found.dropout, found.rank_stabilized) == (2, 3.0, 0.1, stabilized)
    expected = decoder_parameters(decoder)
    assert {name: value.shape for name, value in decoder_parameters(again).items()} == {
        name: value.shape for name, value in expected.items()
    }
    jax.tree.map(np.testing.assert_array_equal, decoder_parameters(again), expected)
    with pytest.raises(CoconutError, match="the decoder has adapters, merge them first"):
        save_pretrained(decoder, tmp_path / "merged")
    save_pretrained(merge_adapters(decoder), tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_same_logits(their_logits(merged), ours)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_stacked_layers_read_and_write_the_same_files(base: tuple[str, Any, Path], tmp_path: Path) -> None:
    _, _, folder = base
    config = AdapterConfig(rank=2, alpha=3.0, targets=("layers.*.attention.query", "layers.*.mlp.up"))
    save_adapter(random_adapters(load_pretrained(folder), config), config, tmp_path / "one_by_one")
    stacked = load_pretrained(folder, execution=ExecutionConfig(scan_layers=True))
    decoder, found = load_adapter(tmp_path / "one_by_one", stacked)
    save_adapter(decoder, found, tmp_path / "stacked")
    first, second = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("one_by_one", "stacked"))
    assert first.keys() == second.keys()
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
    """A Llama, and an adapter of it that is right."""
    folder = tmp_path_factory.mktemp("right")
    random_model("llama").save_pretrained(folder / "base")
    decoder = load_pretrained(folder / "base")
    config = AdapterConfig(rank=2, alpha=3.0, targets=("layers.*.attention.*",), trained_rows=(3,))
    save_adapter(random_adapters(decoder, config), config, folder / "adapter", base="some/base")
    return decoder, folder / "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"of_a_later_release": 1}, "of_a_later_release = 1 is not supported"),
        ({"r": 3}, r"lora_A.weight has shape \(2, 16\), here it would have \(3, 16\)"),
        ({"r": 0}, "r = 0 of model.layers.0.self_attn"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x' of model.layers.0.self_attn"),
        ({"alpha_pattern": {"q_proj": 9}}, "alpha_pattern: .* differ in rank or in scaling"),
        ({"lora_dropout": 1.5}, r"AdapterConfig.dropout = 1.5: must be in \[0, 1\)"),
        ({"trainable_token_indices": [3, 4]}, r"the rows have shape \(1, 16\), here they would have \(2, 16\)"),
        ({"trainable_token_indices": [99]}, f"99 is no id of a token, which run from 0 to {VOCABULARY - 1}"),
        ({"trainable_token_indices": {"lm_head": [3]}}, "'lm_head', not of the embedding"),
    ],
)
def test_fields_that_we_do_not_compute_are_named(
    adapter: tuple[Decoder, Path], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    decoder, folder = adapter
    shutil.copytree(folder, tmp_path / "bad")
    content = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(content | fields))
    with pytest.raises(CoconutError, match=rf"(?s)bad, an adapter of 'some/base', cannot be loaded:.*{message}"):
        load_adapter(tmp_path / "bad", decoder)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(f"{QUERY}.lora_B.weight"), "q_proj.lora_B is missing"),
        (lambda x: x.update({f"{QUERY}.lora_magnitude_vector": np.ones(16)}), "lora_magnitude_vector belongs to no"),
        (lambda x: x.update({"base_model.model.model.layers.2.x.lora_A.weight": np.ones((2, 3))}), "layers.2.x.lora_A"),
        (lambda x: x.update({"base_model.model.lm_head.lora_A.weight": np.ones((2, 3))}), "lm_head.lora_A.weight bel"),
        (lambda x: x.update({f"{QUERY}.lora_A.weight": np.ones((2, 3))}), r"has shape \(2, 3\), here it would have"),
        (lambda x: x.update({f"{QUERY}.lora_A.weight": np.ones((2, 16), np.int32)}), "has dtype I32"),
        (lambda x: x.clear(), "holds no adapter"),
    ],
)
def test_tensors_of_another_base_are_named(
    adapter: tuple[Decoder, Path], change: Any, message: str, tmp_path: Path
) -> None:
    decoder, folder = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    shutil.copy(folder / "adapter_config.json", tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CoconutError, match=rf"(?s)an adapter of 'some/base', cannot be loaded:.*{message}"):
        load_adapter(tmp_path, decoder)


def test_files_that_are_missing_are_named(adapter: tuple[Decoder, Path], tmp_path: Path) -> None:
    with pytest.raises(
        CoconutError, match=r"(?s)adapter_config.json is missing.*adapter_model.safetensors \(0 bytes\)"
    ):
        load_adapter(tmp_path, adapter[0])


def test_adapters_that_peft_would_take_for_those_of_experts_are_not_written(tmp_path: Path) -> None:
    random_model("deepseek_v3").save_pretrained(tmp_path / "model")
    config = AdapterConfig(rank=2, alpha=3.0, targets=("layers.1.mlp.shared.up",))
    base = load_pretrained(tmp_path / "model")
    decoder = random_adapters(base, config)
    with pytest.raises(CoconutError, match=r"model.layers.1.mlp.shared_experts.up_proj: PEFT takes adapters of this"):
        save_adapter(decoder, config, tmp_path / "adapter", base="some/base")
    # As an older PEFT wrote them, which had a matrix for each expert; the first layer's MLP has no experts.
    (tmp_path / "older").mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "target_modules": ["gate_proj"]}
    (tmp_path / "older/adapter_config.json").write_text(json.dumps(content))
    mlps, D = base.config.width_of_mlp, base.config.embed_dim
    first = "base_model.model.model.layers.0.mlp.gate_proj.lora_"
    tensors = {f"{first}A.weight": np.ones((2, D)), f"{first}B.weight": np.ones((mlps, 2))}
    expert = "base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_"
    assert base.config.experts is not None
    shapes = {"A": (2, D), "B": (base.config.experts.width, 2)}
    tensors |= {f"{expert}{leaf}.weight": np.ones(shape) for leaf, shape in shapes.items()}
    router = "base_model.model.model.layers.1.mlp.gate.lora_A.weight"
    tensors[router] = np.ones((2, D))
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, tmp_path / "older/adapter_model.safetensors")
    with pytest.raises(CoconutError) as error:
        load_adapter(tmp_path / "older", base)
    for name in (f"{expert}A.weight", f"{expert}B.weight", router):
        assert f"tensor {name} belongs to no matrix of this decoder's layers that has adapters here" in str(error.value)
    assert first not in str(error.value)


def test_dropout_where_nothing_can_be_dropped_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model("deepseek_v3")
    model.save_pretrained(tmp_path / "model")
    theirs = trained_by_peft(model, tmp_path / "adapter", r=4, lora_dropout=0.1, target_modules=["kv_b_proj"])
    decoder, config = load_adapter(tmp_path / "adapter", load_pretrained(tmp_path / "model"))
    assert config.dropout == 0.0 and "lora_dropout = 0.1 is left out" in caplog.text
    assert_same_logits(our_logits(decoder), theirs)
