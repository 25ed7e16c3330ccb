"""Questions, models and policies that tests of sampling share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from coconut.latent.feedback import Identity
from coconut.latent.gated import Gate
from coconut.latent.gaussian import GaussianHead
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import LinearHalt
from coconut.latent.policies.config import POLICIES, PolicyConfig, make_policy
from coconut.latent.sampling import Sampler
from coconut.models.decoder import Decoder
from coconut.types import IGNORED_LABEL, Batch, Language, Latent

EOS, LATENT, VOCAB = 0, 1, 11
POLICY_CONFIGS = {
    "deterministic": PolicyConfig(),
    "dropout": PolicyConfig(kind="dropout", options={"rate": 0.3}),
    "dropout_afresh": PolicyConfig(kind="dropout", options={"rate": 0.3, "afresh": True}),
    "gaussian": PolicyConfig(kind="gaussian", options={"share": 0.3}),
    "gaussian_learnt": PolicyConfig(kind="gaussian", options={"share": 0.3, "learnt": True, "over": "mean"}),
    "gaussian_head": PolicyConfig(kind="gaussian_head"),
    "gumbel": PolicyConfig(kind="gumbel", options={"top_k": 4, "top_p": 0.9, "noise_temperature": 0.5}),
    "drawn_tokens": PolicyConfig(kind="drawn_tokens"),
    "gated_token": PolicyConfig(kind="gated_token"),
}
"""Every policy of ours."""


def parts_for(config: PolicyConfig, decoder: Decoder, *, halts: bool = False) -> dict[str, Any]:
    """A feedback, and the parts that a policy needs, none of whose numbers is at its start."""
    parts: dict[str, Any] = {"feedback": Identity()}
    if config.kind == "gaussian_head":
        parts["feedback"] = GaussianHead(decoder.config, 8, factor=0.5, rngs=nnx.Rngs(1))
    if config.kind == "gated_token":
        parts["feedback"] = Gate(decoder.config, temperature=0.5, rngs=nnx.Rngs(1))
    own = POLICIES[config.kind].part(config.kind_options(), decoder.config, jax.random.key(2))
    if own is not None:
        parts["policy"] = own
    if halts:
        rng = np.random.default_rng(3)
        kernel = jnp.asarray(0.5 * rng.normal(size=decoder.config.embed_dim), decoder.config.param_dtype)
        parts["halt"] = LinearHalt(kernel=nnx.Param(kernel), bias=nnx.Param(jnp.zeros((), kernel.dtype)))
    return parts


def sampler_of(config: PolicyConfig, decoder: Decoder, parts: dict[str, Any], **settings: Any) -> Sampler:
    """The sampler of a policy: temperature 1, at most 4 new tokens."""
    return Sampler(
        policy=make_policy(config, decoder, parts, vocab_size=VOCAB),
        sampling=SamplingConfig(max_new_tokens=4, temperature=1.3),
        halt=parts.get("halt") if config.learnt_stop else None,
        least=config.least,
        eos_id=EOS,
        latent_id=LATENT,
        vocab_size=VOCAB,
        **settings,
    )


def questions(counts: tuple[int, ...] = (2, 3, 1), prompt: int = 5) -> Batch:
    """A question a row, of differing lengths and numbers of thoughts, and an end marker behind the thoughts."""
    rng = np.random.default_rng(0)
    rows, most = len(counts), max(counts)
    T = prompt + most + 1
    tokens = rng.integers(2, VOCAB, (rows, T)).astype(np.int32)
    valid = np.ones((rows, T), bool)
    for row, count in enumerate(counts):
        valid[row, : row % 3] = False
        valid[row, prompt + count : prompt + most] = False
    tokens[:, prompt : prompt + most] = LATENT
    tokens[:, -1] = 2
    nothing = np.full((rows, T), -1, np.int32)
    return Batch(
        schedule=(Language(prompt), Latent(most), Language(1)),
        tokens=tokens,
        positions=np.where(valid, np.cumsum(valid, 1) - 1, 0).astype(np.int32),
        valid=valid,
        labels=np.full((rows, T), IGNORED_LABEL, np.int32),
        pieces=nothing,
        answers=np.zeros((rows, T), bool),
        before_answer=np.full(rows, -1, np.int32),
        examples=np.arange(rows, dtype=np.int32),
    )


def with_learnt_stop(config: PolicyConfig) -> PolicyConfig:
    """The policy, whose blocks a stop head ends."""
    return dataclasses.replace(config, learnt_stop=True)
