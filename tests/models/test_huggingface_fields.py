"""Every field of a config.json is computed, known to change nothing, or refused by its name and value."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from coconut.errors import CoconutError
from coconut.hub import local_folder
from coconut.models.huggingface import agreed_config, load, load_pretrained, read_config
from coconut.models.huggingface.configuration import decoder_config
from tests.tiny_huggingface import ALL_CONFIGS, random_model, write_model
from tests.tiny_models import quick_jit


def content_of(name: str, **fields: Any) -> dict[str, Any]:
    """The config.json of a tiny model with every field that `transformers` gives it."""
    content = json.loads(ALL_CONFIGS[name].to_json_string(use_diff=False)) | fields
    return {key: value for key, value in content.items() if value is not ...}


def write_config(folder: Path, name: str, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content_of(name, **fields)))
    return folder


_LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 3.0], "long_factor": [2.0, 5.0, 9.0]}
_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}

_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_DEEPSEEK_CODE = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_whatever_transformers_writes_is_known(name: str) -> None:
    problems: list[str] = []
    assert decoder_config(json.loads(ALL_CONFIGS[name].to_json_string(use_diff=False)), problems) and problems == []


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"scale_emb": 12}, "scale_emb = 12: an unknown field"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm = True"),
        ("llama", {"alibi": True}, "alibi = True"),
        ("llama", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        ("llama", {"architectures": ["MiniCPMForCausalLM"]}, "architectures = ['MiniCPMForCausalLM']"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures = ['LlamaForSeq"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map = "),
        ("llama", {"is_causal": False}, "is_causal = False"),
        ("llama", {"sliding_window": 8}, "sliding_window = 8"),
        ("llama", {"original_max_position_embeddings": 16}, "original_max_position_embeddings = 16: an unknown"),
        ("llama", {"per_layer_config": {"0": {}}}, "per_layer_config = "),
        ("llama", {"attention_bias": "false"}, "attention_bias = 'false': must be bool"),
        ("llama", {"tie_word_embeddings": 1.5}, "tie_word_embeddings = 1.5: must be bool"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps = inf: must be positive and finite"),
        ("llama", {"attention_dropout": float("inf")}, "attention_dropout = inf: must be a rate in [0, 1)"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 4"),
        ("llama", {"head_dim": 2**30}, "num_attention_heads = 4: times a width of"),
        ("llama", {"rope_parameters": 5}, "rope_parameters = 5: must be an object"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters has full_attention: only"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling of type 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": float("inf")} | {"low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}}, "json: factor = inf: must be"),
        ("qwen2", {"attention_bias": False}, "attention_bias = False"),
        ("qwen2", {"use_mrope": True}, "use_mrope = True"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: must be at least 1"),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}, "'sliding_attention': only 'full_attention' is supp"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("phi3", {"sliding_window": 1.5}, "sliding_window = 1.5: must be at least 1"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "auto_map = {'AutoModelForCausalLM'"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "the rotary scaling lacks short_factor, long_factor"),
        ("phi3", {"rope_scaling": _LONG | {"short_factor": [1.0]}}, "long_factor: has 3 factors, short_factor 1"),
        ("phi3", {"rope_scaling": _LONG}, "short_factor: has 3 factors, and 8 features of a head turn: must be 4"),
        ("phi3", {"rope_scaling": _LONG | {"short_factor": [0.0, 1.0, 1.0]}}, "short_factor = (0.0, 1.0, 1.0): must"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary scaling of type 'linear'"),
        ("llama", {"rope_scaling": _LONG}, "rope_scaling has long_factor, short_factor: only"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0: an unknown field"),
        ("llama", {"model_type": "gemma2"}, "'gemma2' is not one of deepseek_v2, deepseek_v3, gemma3_text, gpt2, "
            "llama, mistral, olmo2, phi3, qwen2, qwen3 (its layers look back through a window and on everything in "
            "turn, and its scores are capped)"),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types = ['full_attention']: has 1 layers, and num_"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": -1, "max_window_layers": 0, "layer_types": ...},
            "sliding_window = -1: must be at least 1"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "but use_sliding_window = False says that"),
        ("qwen3", {"layer_types": ["full_attention", "chunked"]}, "layer_types has 'chunked': only 'full_attention'"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types = 'full_attention': must be a list of names"),
        ("gemma3_text", {"sliding_window": 0}, "sliding_window = 0: must be at least 1"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window = None: must be at least 1, for layers that look"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "has 2 layers, and num_hidden_layers = 3"),
        ("gemma3_text", {"layer_types": ["local"] * 3}, "layer_types has 'local': only 'full_attention' and 'sliding_"),
        ("gemma3_text", {"layer_types": [1, 2, 3]}, "layer_types = [1, 2, 3]: must be a list of names"),
        ("gemma3_text", {"layer_types": ..., "sliding_window_pattern": 0}, "sliding_window_pattern = 0: must be at"),
        ("gemma3_text", {"layer_types": ..., "_sliding_window_pattern": 2}, "_sliding_window_pattern = 2: `transfor"),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation = 'relu' is not one of gelu_pytorch_tanh"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: only None is supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: must be None or at least 1"),
        ("gemma3_text", {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters has rope_type: only full_att"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "rope_parameters: full_attention = 3: must be an"),
        ("gemma3_text", {"rope_parameters": ..., "rope_local_base_freq": 0.0}, "rope_local_base_freq = 0.0: must be"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "json: factor = 0.0: must be posit"),
        ("gemma3_text", {"rope_scaling": _YARN}, "the rotary scaling of full_attention has original_max_position"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of type 'dynamic': only 'default'"),
        ("deepseek_v3", {"n_group": 3}, "n_group = 3: must divide n_routed_experts = 8"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group = 5: must be at most n_group = 4"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: must be at most the 4 experts of top"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, "n_group = 8: of n_routed_experts = 8 experts must have two"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "replace = 2: must be less than num_hidden_layers = 2"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts = 0: must be at least 1"),
        ("deepseek_v3", {"routed_scaling_factor": "x"}, "routed_scaling_factor = 'x': must be float"),
        ("deepseek_v3", {"kv_lora_rank": ..., "q_lora_rank": ...}, "kv_lora_rank, q_lora_rank: missing"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank = 0: must be from 1"),
        ("deepseek_v3", {"qk_rope_head_dim": 7, "head_dim": 7}, "qk_rope_head_dim = 7: must be even"),
        ("deepseek_v3", {"head_dim": 16}, "head_dim = 16: only None or 8 is supported here"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2: only None or 4 is supported here"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax': only 'sigmoid' or None"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy': only 'noaux_tc' or None"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"index_topk": 64}, "index_topk = 64: an unknown field"),
        ("deepseek_v3", {"capacity_factor": 1.25}, "capacity_factor = 1.25: an unknown field"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {'quant_meth"),
        ("deepseek_v3", {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "auto_map = {'AutoModelForC"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn"}}, "lacks factor, original_max_position_embeddings"),
        ("deepseek_v3", {"rope_scaling": _YARN | {"attention_factor": 1.5}}, "attention_factor = 1.5: only None is"),
        ("deepseek_v3", {"rope_scaling": _YARN | {"factor": 0.0}}, "json: factor = 0.0: must be positive"),
        ("deepseek_v3", {"rope_scaling": _YARN | {"original_max_position_embeddings": 0}}, "_embeddings = 0: must be "),
        ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear': only 'default' and 'yarn' are"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True: only False or None"),
        ("deepseek_v2", {"rope_interleave": False}, "rope_interleave = False: only True or None"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc': only 'greedy' or 'group_limited_"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = True"),
        ("deepseek_v2", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        ("llama", {"rope_scaling": _YARN}, "rotary scaling of type 'yarn': only 'default' and 'llama3' are"),
        ("gpt2", {"hidden_size": 16}, "hidden_size = 16: an unknown field"),  # `transformers` reads it as n_embd.
        ("gpt2", {"n_embd": 10**400}, "n_embd = 1000"),
        ("gpt2", {"n_layer": 100_000}, "n_layer = 100000: must be at most 1,000"),
        ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop = 1.5: must be a rate in [0, 1)"),
        ("gpt2", {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon = 1000"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]}"),
    ],
)  # fmt: skip
def test_what_may_change_the_numbers_is_refused_by_name(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CoconutError) as caught:
        read_config(write_config(tmp_path, name, **fields))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"hidden_act": "swish", "attention_dropout": 0.1, "scale_emb": None, "pretraining_tp": 2}),
        ("llama", {"architectures": ["LlamaModel"], "use_qk_norm": False, "num_nextn_predict_layers": 0}),
        ("deepseek_v2", {"n_group": 1, "topk_group": 1, "scoring_func": "softmax", "ep_size": 1, "qk_head_dim": 12}),
        ("deepseek_v3", {"num_nextn_predict_layers": 1, "seq_aux": True, "aux_loss_alpha": 0.001, "moe_layer_freq": 1}
            | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "auto_map": _DEEPSEEK_CODE}),
        ("qwen2", {"sliding_window": 4096, "use_mrope": False, "attention_bias": True}),
        ("mistral", {"sliding_window": 64, "attention_bias": False}),
        ("mistral_window", {"layer_types": ["full_attention"] * 2}),
        ("qwen2_window", {"layer_types": ..., "max_window_layers": 1}),
        ("gemma3_text", {"sliding_window_pattern": 6, "_sliding_window_pattern": 6, "cache_implementation": "hybrid"}),
        ("gemma3_text", {"rope_parameters": ..., "rope_theta": 1000, "rope_local_base_freq": 50}
            | {"rope_scaling": {"type": "linear", "factor": 4}}),
        ("phi3", {"sliding_window": 262144, "auto_map": _CODE, "resid_pdrop": 0.1, "full_attn_mod": 1}),
        ("gpt2", {"activation_function": "gelu_fast", "n_ctx": 1024, "reorder_and_upcast_attn": True}),
        ("gpt2", {"is_decoder": True, "top_k": 5, "task_specific_params": {"text-generation": {}}}),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_taken(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    plain = read_config(write_config(tmp_path, name))
    assert read_config(write_config(tmp_path, name, **fields)) == plain


def test_several_dropout_rates_are_those_of_no_decoder(tmp_path: Path) -> None:
    assert read_config(write_config(tmp_path, "gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)).dropout == 0.2
    assert read_config(write_config(tmp_path, "gpt2", attn_pdrop=0.5)).dropout == 0.0


def test_a_name_that_no_folder_can_have() -> None:
    with pytest.raises(CoconutError, match="File name too long"):
        local_folder("a" * 5000)


def test_layers_are_counted_before_they_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise AssertionError("built before the files were looked at")

    monkeypatch.setattr(load, "abstract_decoder", build)
    write_config(tmp_path, "gpt2", n_layer=900)
    save_file({f"h.{index}.ln_1.bias": np.zeros(16, np.float32) for index in range(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CoconutError, match="n_layer = 900, but the files hold tensors of 2 layers"):
        load_pretrained(tmp_path)
    # Nor are they where files are missing, which is then all that is said.
    index = {"weight_map": {"wte.weight": "b" * 5000, "h.0.ln_1.bias": "gone.safetensors"}}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CoconutError, match=r"b{80} is missing, .*\n  gone.safetensors is missing, which .*json names$"):
        load_pretrained(tmp_path)


def test_an_adapter_says_what_it_is(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/llama"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    message = r"adapter_config.json says .* PEFT adapter \(peft_type = 'LORA'\) .* 'someone/llama'"
    for read in (load_pretrained, read_config):
        with pytest.raises(CoconutError, match=message) as caught:
            read(tmp_path)
        assert "config.json is missing" not in str(caught.value)
    # `transformers` applies an adapter that lies beside a model.
    with pytest.raises(CoconutError, match=message):
        agreed_config(write_config(tmp_path, "llama"), read_config_of("llama"))


def read_config_of(name: str) -> Any:
    return decoder_config(content_of(name), [])


_SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALED |= {"original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("phi3", {"rope_scaling": _LONG, "rope_parameters": None, "partial_rotary_factor": 0.75, "rope_theta": 50.0}),
        ("phi3", {"rope_scaling": _LONG | {"type": "su", "attention_factor": 1.5, "partial_rotary_factor": 0.75}
            | {"original_max_position_embeddings": 32}}),
        ("deepseek_v3", {"rope_parameters": None, "rope_theta": 50.0, "rope_scaling": _YARN | {"beta_fast": 2}
            | {"beta_slow": 0.2, "mscale_all_dim": 1.0}}),
        ("deepseek_v2_grouped", {"rope_parameters": None, "rope_theta": 50.0, "rope_scaling": _YARN
            | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 4, "beta_slow": 1}}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 50.0}}),
        *(("llama", fields) for fields in [
        {"rope_scaling": _SCALED, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": 200.0},
        {"rope_scaling": {"rope_theta": 30.0}, "rope_parameters": _SCALED, "rope_theta": 200.0},
        {"rope_scaling": None, "rope_parameters": _SCALED, "rope_theta": 200.0},
        {"rope_scaling": {"type": "default"}, "rope_parameters": _SCALED | {"rope_theta": 70.0}},
        ]),
    ],
)  # fmt: skip
def test_of_two_rotary_fields_theirs_and_ours_take_the_same(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    write_model(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    tokens = np.arange(24, dtype=np.int32)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor(tokens).long()).logits.numpy()
        unscaled = random_model(name)(torch.tensor(tokens).long()).logits.numpy()
    ours = load_pretrained(tmp_path)

    def logits(decoder: Any) -> jax.Array:
        inputs, valid = decoder.embed(jnp.asarray(tokens)), jnp.ones(tokens.shape, bool)
        return decoder.unembed(decoder.trunk(inputs, positions=jnp.asarray(tokens), valid=valid)[0])

    np.testing.assert_allclose(quick_jit(logits)(ours), theirs, rtol=0, atol=2e-5)
    assert np.abs(theirs - unscaled).max() > 0.1  # The fields matter here.
