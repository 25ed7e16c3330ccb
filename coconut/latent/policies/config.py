"""Which policy: its config, and a register. Somebody's own policy is one more entry."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import jax
from jaxtyping import Array, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import Feedback, with_constants
from coconut.latent.policies import gaussian, tokens
from coconut.latent.policies.own_thoughts import Deterministic, DropoutMasks, DropoutMasksOptions
from coconut.latent.policies.policy import Policy
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPolicyOptions:
    """The options of a policy that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyKind:
    """A policy by its name.

    Attributes:
      make: from options, the feedback, the policy's own part (None where it has none) and the number of tokens to the
        policy. Raises CoconutError where they do not fit.
      options: the class of its options: a frozen dataclass that validates itself, whose fields all have defaults.
      part: from options, the decoder's config and a key to the parameters that it adds to a model, as the part named
        ``policy``, or None. Traceable by JAX.
      plain: the kinds of feedback that it draws around, by which the model answers where nothing is drawn; None for
        any.
    """

    make: Callable[[Any, Feedback, Any, int | None], Policy]
    options: type = NoPolicyOptions
    part: Callable[[Any, DecoderConfig, Key[Array, ""]], Any] = lambda options, decoder, key: None
    plain: tuple[str, ...] | None = None


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How thoughts are drawn.

    Attributes:
      kind: ``deterministic``, the model's own thoughts; ``dropout``, under masks that a row's key decides
        (`DropoutMasks`); ``gaussian``, around the thought (`coconut.latent.policies.gaussian.GaussianNoise`);
        ``gaussian_head``, CoLaR's; ``gumbel``, a mixture of the likeliest tokens with Gumbel noise, SofT-GRPO's and
        Latent-GRPO's (`coconut.latent.policies.tokens.GumbelMixture`); ``drawn_tokens``, the mean of some drawn tokens,
        Multiplex's; ``gated_token``, HRPO's; or one of `register_policy`.
      options: of the policy, by name.
      learnt_stop: whether a stop head, the part named ``halt``, decides when a block ends; else a block has the
        thoughts of its page.
      least: with ``learnt_stop``, thoughts before the head is asked.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    kind: str = "deterministic"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learnt_stop: bool = False
    least: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in POLICIES:
            nearest = difflib.get_close_matches(self.kind, POLICIES, 1, 0.0)[0]
            raise CoconutError(
                f"PolicyConfig.kind = {self.kind!r}: did you mean {nearest!r}? Known: {', '.join(POLICIES)}"
            )
        if self.least < 0 or (self.least and not self.learnt_stop):
            why = "must be at least 0" if self.least < 0 else "means nothing without learnt_stop"
            raise CoconutError(f"PolicyConfig.least = {self.least!r}: {why}")
        self.kind_options()

    def kind_options(self) -> Any:
        """The options as the policy's own dataclass.

        Raises:
          CoconutError: one is unknown or out of range.
        """
        known = [field.name for field in dataclasses.fields(POLICIES[self.kind].options)]
        if unknown := sorted(set(self.options) - set(known)):
            raise CoconutError(
                f"PolicyConfig.options = {dict(self.options)!r}: kind = {self.kind!r} has no {unknown[0]!r}; it has: "
                f"{', '.join(known) or 'none'}"
            )
        # JSON and gin have lists where a field holds a tuple.
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()}
        return POLICIES[self.kind].options(**given)


POLICIES: dict[str, PolicyKind] = {
    "deterministic": PolicyKind(make=lambda options, feedback, part, vocab_size: Deterministic(feedback=feedback)),
    "dropout": PolicyKind(
        options=DropoutMasksOptions,
        make=lambda options, feedback, part, vocab_size: DropoutMasks(
            feedback=feedback, rate=options.rate, afresh=options.afresh
        ),
    ),
    "gaussian": PolicyKind(
        options=gaussian.GaussianNoiseOptions,
        make=gaussian.make_gaussian_noise,
        part=gaussian.gaussian_noise_part,
    ),
    "gaussian_head": PolicyKind(
        options=gaussian.GaussianHeadOptions, make=gaussian.make_gaussian_head, plain=("gaussian",)
    ),
    "gumbel": PolicyKind(options=tokens.GumbelMixtureOptions, make=tokens.make_gumbel_mixture, plain=("mixture",)),
    "drawn_tokens": PolicyKind(options=tokens.DrawnTokensOptions, make=tokens.make_drawn_tokens, plain=("mixture",)),
    "gated_token": PolicyKind(make=tokens.make_gated_token, plain=("gated",)),
}
"""Policies by the ``kind`` of their config."""


def register_policy(name: str, kind: PolicyKind) -> None:
    """Adds a policy: ``PolicyConfig.kind = name`` chooses it.

    Raises:
      CoconutError: there is another one of that name.
    """
    if POLICIES.get(name, kind) is not kind:
        raise CoconutError(f"a policy named {name!r} is registered already")
    POLICIES[name] = kind


PART = "policy"
"""Name of the part that holds a policy's own parameters."""


def make_policy(
    config: PolicyConfig, decoder: Decoder, parts: Mapping[str, Any], *, vocab_size: int | None = None
) -> Policy:
    """The policy of a config, of a model's parts.

    Args:
      config: which policy.
      decoder: the model's decoder.
      parts: of the model: ``feedback``, and ``policy`` where the policy has parameters.
      vocab_size: ids that may be drawn, from 0; None for every row of the embedding.

    Raises:
      CoconutError: the model lacks a part that the policy needs.
    """
    kind, options = POLICIES[config.kind], config.kind_options()
    # Only looked at: whether the policy has parameters of its own.
    needs = jax.eval_shape(lambda: kind.part(options, decoder.config, jax.random.key(0))) is not None
    if needs and PART not in parts:
        raise CoconutError(
            f"PolicyConfig.kind = {config.kind!r}: needs a part named {PART!r}, and the model has only "
            f"{', '.join(sorted(parts))}: train it with this policy first"
        )
    if config.learnt_stop and "halt" not in parts:
        raise CoconutError(
            "PolicyConfig.learnt_stop = True: needs a part named 'halt', and the model has only "
            f"{', '.join(sorted(parts))}"
        )
    return kind.make(options, with_constants(parts["feedback"], decoder), parts[PART] if needs else None, vocab_size)
