"""Whatever computes attention and loss, the decoder's numbers are the same: training, thoughts and decoding."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.generate import Generated, SamplingConfig, decode, prefill, think_on
from coconut.latent.rollout import rollout_batch
from coconut.losses import choose_cross_entropy, language_loss
from coconut.models import segment_attention
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.layers import activate
from coconut.models.segment_attention import choose_attention, valid_range
from coconut.tokenizers import symbol_tokenizer
from coconut.training.loop import train
from coconut.types import Batch
from pallas_kernels import measured
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE, LOCAL_STYLE, quick_compilation, quick_jit, random_decoder
from tests.tiny_pages import aligned, one_block, thinking_page
from tests.tiny_runs import tiny_run

pytestmark = pytest.mark.slow

# Heads of 16, the narrowest that the GPU's kernels take.
GPT2 = dataclasses.replace(GPT2_STYLE, num_layers=1, head_dim=16)
LLAMA = dataclasses.replace(LLAMA_STYLE, num_layers=1, head_dim=16)
PLAIN: dict[str, Any] = {"attention": "dense", "cross_entropy": "full"}


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def make_batch() -> Batch:
    """Ragged prompts, zero to two thoughts, ragged answers, and a row that only fills the batch."""
    tokenizer = symbol_tokenizer([str(number) for number in range(19)])
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, 19, length).astype(np.int32)
    pages = [thinking_page(tokenizer, draw(3 + index), index, draw(1 + index)) for index in range(3)]
    return aligned([*pages, None], one_block(7, 2, 5), tokenizer)


BATCH = jax.tree.map(jnp.asarray, make_batch())


@functools.cache
def loss_and_gradients(config: DecoderConfig, **execution: Any) -> tuple[Any, Any]:
    def loss(decoder: Decoder) -> tuple[jax.Array, Any]:
        mean, metrics = language_loss(decoder, BATCH, rollout_batch(decoder, Identity(), BATCH))
        return mean.mean(), metrics

    return quick_jit(jax.value_and_grad(loss, has_aux=True))(random_decoder(config, **PLAIN | execution))


def assert_same_gradients(config: DecoderConfig, **execution: Any) -> None:
    (expected, metrics), gradients = loss_and_gradients(config)
    (value, others), computed = loss_and_gradients(config, **execution)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), others, metrics)
    for x, y in zip(jax.tree.leaves(computed), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y) + 1e-7


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu_interpret", "gpu_interpret"])
def test_attention_trains_through_thoughts(implementation: Any) -> None:
    assert_same_gradients(LLAMA, attention=implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu_interpret", "gpu_interpret"])
def test_local_layers_train_through_thoughts(implementation: Any) -> None:
    assert_same_gradients(LOCAL_STYLE, attention=implementation)


# Heads that are the embedding, and one that is not.
@pytest.mark.parametrize(
    ("config", "implementation"),
    [(GPT2, "reference"), (GPT2, "xla"), (LLAMA, "xla"), (GPT2, "tpu_interpret"), (LLAMA, "gpu_interpret")],
)
def test_the_loss_and_its_metrics(config: DecoderConfig, implementation: Any) -> None:
    assert_same_gradients(dataclasses.replace(config, logit_scale=0.3), cross_entropy=implementation)


@functools.cache
def generate(config: DecoderConfig, **execution: Any) -> tuple[Generated, np.ndarray]:
    decoder = random_decoder(config, **PLAIN | execution)
    tokens, valid = np.asarray(BATCH.tokens[:, :7]), np.asarray(BATCH.valid[:, :7]).copy()
    valid[-1, -1] = True
    prefix = prefill(decoder, tokens, valid)
    prefix, thoughts = think_on(decoder, Identity(), prefix, np.asarray([0, 1, 2, 2]), room=2)
    generated = decode(
        decoder,
        prefix,
        np.ones(4, bool),
        jax.random.split(jax.random.key(0), 4),
        forced=np.full((4, 1), 3, np.int32),
        sampling=SamplingConfig(max_new_tokens=4),
        eos_id=0,
    )
    return generated, np.asarray(thoughts)


@pytest.mark.parametrize(
    ("config", "implementation"),
    [
        (LLAMA, "reference"),
        (LLAMA, "xla"),
        (LLAMA, "tpu_interpret"),
        (LLAMA, "gpu_interpret"),
        (LOCAL_STYLE, "xla"),
        (LOCAL_STYLE, "tpu_interpret"),
    ],
)
def test_decoding_writes_the_same_tokens(config: DecoderConfig, implementation: Any) -> None:
    expected, expected_thoughts = generate(config)
    generated, thoughts = generate(config, attention=implementation)
    np.testing.assert_array_equal(generated.tokens, expected.tokens)
    np.testing.assert_allclose(thoughts, expected_thoughts, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    run = tiny_run(execution={"attention": "tpu_interpret", "cross_entropy": "xla"})
    whole = train(run, tmp_path / "whole")
    stopped = tmp_path / "stopped"

    class Stop(Exception):
        pass

    def stop(model: Any, run: Any, dataset: Any, stage: int) -> dict[str, float]:
        if stage == 0 and not (stopped / "once").exists():
            (stopped / "once").touch()
            raise Stop
        return {}

    with pytest.raises(Stop):
        train(run, stopped, validate=stop)
    again = train(run, stopped, validate=stop)
    for x, y in zip(jax.tree.leaves(again.model), jax.tree.leaves(whole.model), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_what_auto_means_on_a_cpu() -> None:
    assert choose_attention(LLAMA_STYLE, ExecutionConfig()) == "dense"
    assert choose_attention(LLAMA_STYLE, ExecutionConfig(attention="xla")) == "xla"
    small, large = (dataclasses.replace(LLAMA_STYLE, vocab_size=size) for size in (2_000, 50_257))
    assert choose_cross_entropy(small, ExecutionConfig(), rows=640) == "full"
    assert choose_cross_entropy(large, ExecutionConfig(), rows=8_192) == "auto"
    assert choose_cross_entropy(large, ExecutionConfig(dtype="float64"), rows=8_192) == "full"
    assert choose_cross_entropy(small, ExecutionConfig(cross_entropy="tpu"), rows=1) == "tpu"


@pytest.mark.parametrize(
    ("kind", "dtype", "dropout", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 0.0, "auto"),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 0.1, "dense"),
        ("NVIDIA H100 80GB HBM3", "float32", 0.0, "dense"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 0.0, "dense"),
    ],
)
def test_what_auto_means_on_a_gpu(kind, dtype, dropout, expected, monkeypatch) -> None:
    """The kernels where a training step was measured to be faster by them: experiments/results/on_gpu."""
    monkeypatch.setattr(segment_attention, "platform", lambda: "gpu")
    monkeypatch.setattr(measured, "device_kind", lambda: kind)
    config = dataclasses.replace(LLAMA_STYLE, dropout=dropout)
    assert choose_attention(config, ExecutionConfig(dtype=dtype)) == expected


def test_a_kernel_that_does_not_apply_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation='tpu' does not apply"):
        loss_and_gradients(LLAMA, attention="tpu")
    with pytest.raises(CoconutError, match=r"ExecutionConfig.cross_entropy = 'xla': computes in float32 or bfloat16"):
        ExecutionConfig(cross_entropy="xla", dtype="float16")
    with pytest.raises(CoconutError, match=r"ExecutionConfig.attention = 'xla': the kernels drop no attention weights"):
        random_decoder(dataclasses.replace(LLAMA, dropout=0.1), attention="xla")


def test_ranges_of_valid_columns() -> None:
    valid = jnp.asarray([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    start, end = valid_range(valid)
    np.testing.assert_array_equal(start, [1, 0, 0, 3])
    np.testing.assert_array_equal(end, [3, 4, 0, 4])


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"])
def test_a_backward_pass_keeps_what_an_activation_is_given(kind: Any) -> None:
    hidden, gate, cotangent = jax.random.normal(jax.random.key(0), (3, 2, 3, 5))
    given = (hidden, gate if "glu" in kind else None)
    value, backward = jax.vjp(functools.partial(activate, kind), *given)
    plain, plain_backward = jax.vjp(functools.partial(activate.__wrapped__, kind), *given)
    np.testing.assert_array_equal(value, plain)
    for gradient, expected in zip(*map(jax.tree.leaves, (backward(cotangent), plain_backward(cotangent))), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    count = lambda tree: sum(leaf.shape == hidden.shape for leaf in jax.tree.leaves(tree))
    assert count(backward) == count(given) < count(plain_backward)
