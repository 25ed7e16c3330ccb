"""The resolved configuration of a run, and its JSON."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, no_type_check

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import FeedbackConfig
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.policies.config import POLICIES, PolicyConfig
from coconut.latent.thinkers import Sweeps
from coconut.methods import METHODS, get_method
from coconut.methods.method import NoOptions
from coconut.methods.multi_token import MultiTokenConfig
from coconut.models.adapters import AdapterConfig
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.singular_values import SingularValueConfig
from coconut.pipeline import PipelineConfig
from coconut.training.optimizer import OptimizerConfig
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.scoring import ScorerConfig
from coconut.training.spikes import SpikeConfig
from coconut.training.trackers.writer import TrackingConfig


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the numbers of a run.

    Attributes:
      method: name of the method (`coconut.methods.METHODS`).
      options: the method's own config (`coconut.methods.method.Method.options`); None for its defaults, plain values
        for those of JSON.
      data: where questions come from.
      decoder: the decoder; its ``vocab_size`` of None is taken from the tokenizer.
      execution: how the decoder is run.
      curriculum: stages and thoughts.
      optimizer: AdamW and its learning rate.
      pipeline: batches.
      microbatches: parts a batch is split into, one after the other, to save memory; the update is the same.
      seed: of the parameters, the data order, the stage draws and the dropout.
      pretrained: folder or Hugging Face repository of the checkpoint this run starts from
        (`coconut.models.huggingface.load_pretrained`); None for fresh parameters.
      marker_token: with ``pretrained``, the token whose embedding the three latent markers start as copies of (the
        official implementation's choice), which must be one token of the tokenizer.
      init_from: workdir of another run whose parameters this one starts from; None for fresh parameters. The
        tokenizers must be the same.
      init_checkpoint: which of its checkpoints.
      feedback: what is done to a hidden state before it is fed back.
      adapter: low-rank adapters (`coconut.models.adapters`) or vectors that scale singular values
        (`coconut.models.singular_values`), which are trained in place of the decoder; None to train the decoder itself.
      freeze: patterns (``decoder.tokens.*``) of the names of parameters that are not trained, beside those that the
        method freezes.
      sampling: how validation questions are answered.
      halting: when a block of thoughts is over where the model says so, in answering: one that it opens itself, and the
        last one before the answer; None for what the method says.
      reinforcement: learn from rewards of the model's own samples (`coconut.training.reinforcement`); None to imitate
        the data, as the method says.
      multi_token: predict the token after the next, too, by a module beside the decoder
        (`coconut.methods.multi_token`); None for the next alone.
      scorer: train a scorer of the model's thoughts beside it (`coconut.training.scoring`); the model that the run
        starts from stays as it is. None for no scorer.
      evaluation_batch_size: rows answered together.
      evaluate_every: optimizer steps between validations, beside those at the end of each stage, or ``epoch`` for one
        after each epoch of the data; None for those at the end of a stage alone.
      save_every: optimizer steps between checkpoints, beside those at the end of each stage; None for these alone.
      keep_latest: latest checkpoints kept, beside the best one.
      log_every: optimizer steps between lines of metrics.
      tracking: trackers of experiments that get the metrics, too.
      spikes: skip steps whose gradient is far longer than those before it (`coconut.training.spikes`); None for none.
      max_skipped_steps: steps in a row that may be skipped because their gradient is not finite, or a spike, before the
        run ends with a `DivergedError`. It looks when it logs, validates or saves.
      norm_alert_factor: factor by which the mean norms of thoughts and of token embeddings may differ before a line of
        metrics says ``norm_alert`` and the log warns; None for no alert. The norms are logged in any case.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    method: str
    data: DataConfig
    decoder: DecoderConfig
    curriculum: CurriculumConfig
    optimizer: OptimizerConfig
    pipeline: PipelineConfig
    options: Any = None
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    microbatches: int = 1
    seed: int = 0
    pretrained: str | None = None
    marker_token: str = "<<"
    init_from: str | None = None
    init_checkpoint: Literal["best", "latest"] = "latest"
    feedback: FeedbackConfig = dataclasses.field(default_factory=FeedbackConfig)
    adapter: AdapterConfig | SingularValueConfig | None = None
    freeze: tuple[str, ...] = ()
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    halting: HaltingConfig | None = None
    reinforcement: ReinforcementConfig | None = None
    multi_token: MultiTokenConfig | None = None
    scorer: ScorerConfig | None = None
    evaluation_batch_size: int = 64
    evaluate_every: int | Literal["epoch"] | None = None
    save_every: int | None = 1000
    keep_latest: int = 2
    log_every: int = 50
    spikes: SpikeConfig | None = None
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    max_skipped_steps: int = 10
    norm_alert_factor: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"RunConfig.{field} = {getattr(self, field)!r}: {why}")

        object.__setattr__(self, "options", self._method_options())
        self.execution.check(self.decoder)
        if self.pretrained is not None and self.init_from is not None:
            reject("init_from", f"pretrained = {self.pretrained!r} gives the parameters already")
        if self.pretrained is not None and self.data.tokenizer not in ("gpt2", "huggingface"):
            reject("pretrained", f"its tokens are not those of DataConfig.tokenizer = {self.data.tokenizer!r}")
        for field, source in (("marker_token", "pretrained"), ("init_checkpoint", "init_from")):
            if getattr(self, field) != type(self).__dataclass_fields__[field].default and getattr(self, source) is None:
                reject(field, f"means nothing without {source}")
        for field in ("microbatches", "evaluation_batch_size", "keep_latest", "log_every", "max_skipped_steps"):
            if getattr(self, field) < 1:
                reject(field, "must be at least 1")
        for field in ("evaluate_every", "save_every"):
            value = getattr(self, field)
            if isinstance(value, int) and value < 1:
                reject(field, "must be None or at least 1")
        if self.spikes is not None and self.spikes.most_in_a_row >= self.max_skipped_steps:
            raise CoconutError(
                f"SpikeConfig.most_in_a_row = {self.spikes.most_in_a_row!r}: must be below what ends the run, "
                f"RunConfig.max_skipped_steps = {self.max_skipped_steps}"
            )
        if self.norm_alert_factor is not None and not 1 < self.norm_alert_factor < math.inf:
            reject("norm_alert_factor", "must be None or above 1")
        if self.pipeline.batch_size % self.microbatches:
            reject("microbatches", f"must divide the batch size, {self.pipeline.batch_size}")
        if self.pipeline.examples_per_row > 1:
            self._check_packing()
        if self.multi_token is not None and self.drawing is not None:
            reject("multi_token", "is a term of imitation: samples that the model draws itself are not learnt so")
        if self.multi_token is not None and not get_method(self.method).reads_pages:
            reject("multi_token", f"predicts tokens of rows as they are written down, and {self.method!r} has others")
        decays = self.optimizer.weight_decay > 0 and not self.optimizer.decay_matrices_only
        if isinstance(self.adapter, SingularValueConfig) and decays:
            raise CoconutError(
                f"OptimizerConfig.weight_decay = {self.optimizer.weight_decay!r}: draws scales of singular values to "
                "0, away from where they start; set it to 0, or OptimizerConfig.decay_matrices_only = True"
            )
        if self.reinforcement is not None:
            self._check_reinforcement(self.reinforcement)
        if self.scorer is not None:
            self._check_scorer(self.scorer)

    def _check_packing(self) -> None:
        """What rows of several examples ask of the other fields."""
        method, asked = get_method(self.method), f"PipelineConfig.examples_per_row = {self.pipeline.examples_per_row!r}"
        if not method.packs:
            others = ", ".join(name for name, one in METHODS.items() if one.packs)
            raise CoconutError(
                f"{asked}: the loss of method = {self.method!r} reads a row as one example (methods that pack: "
                f"{others})"
            )
        if isinstance(think := method.think(self.options), Sweeps) and think.count:
            raise CoconutError(
                f"{asked}: method = {self.method!r} makes its thoughts in sweeps, and packed ones are not"
            )
        if self.drawing is not None:
            raise CoconutError(f"{asked}: samples that the model draws itself are not packed")
        if self.multi_token is not None:
            raise CoconutError(f"{asked}: RunConfig.multi_token reads a row as one example")
        if self.execution.attention not in ("auto", "dense"):
            raise CoconutError(
                f"{asked}: ExecutionConfig.attention = {self.execution.attention!r}: kernels do not know the examples "
                "of a row apart; auto and dense do"
            )
        if self.pipeline.rows % self.microbatches:
            raise CoconutError(
                f"{asked}: RunConfig.microbatches = {self.microbatches} must divide the {self.pipeline.rows} rows of a "
                f"batch of {self.pipeline.batch_size}"
            )

    @property
    def drawing(self) -> ReinforcementConfig | ScorerConfig | None:
        """How the run draws samples to learn from; None where it imitates data."""
        return self.scorer if self.reinforcement is None else self.reinforcement

    def _check_reinforcement(self, reinforcement: ReinforcementConfig) -> None:
        """What learning from rewards asks of the other fields."""
        rows = self.pipeline.batch_size * reinforcement.group
        if rows % (self.microbatches * reinforcement.minibatches):
            raise CoconutError(
                f"ReinforcementConfig.minibatches = {reinforcement.minibatches!r}: with microbatches = "
                f"{self.microbatches} it must divide the samples of a step, {rows}"
            )
        if reinforcement.kl_weight and self.pretrained is None and self.init_from is None:
            raise CoconutError(
                f"ReinforcementConfig.kl_weight = {reinforcement.kl_weight!r}: needs a model that the run starts from "
                "(RunConfig.init_from or pretrained)"
            )
        policy = reinforcement.policy
        self._check_drawing(policy)
        if policy.learnt_stop and (self.halting is None or not self.halting.has_head):
            raise CoconutError(
                "PolicyConfig.learnt_stop = True: needs a RunConfig.halting whose stop asks the head, by which the "
                "model answers where nothing is drawn (gin_configs/policies/learnt_stop.gin)"
            )
        if reinforcement.dead_groups == "resample" and self.pipeline.length_buckets:
            raise CoconutError(
                "ReinforcementConfig.dead_groups = 'resample': takes the questions of a step from several batches, "
                f"of one shape; PipelineConfig.length_buckets = {self.pipeline.length_buckets!r} gives them others"
            )
        metric = self.curriculum.advance_metric
        if metric is not None and not metric.startswith("reward"):
            raise CoconutError(
                f"CurriculumConfig.advance_metric = {metric!r}: a run that learns from rewards has 'reward', and "
                "'reward_NAME' of each where there are several"
            )

    def _check_scorer(self, scorer: ScorerConfig) -> None:
        """What training a scorer asks of the other fields."""
        if self.reinforcement is not None:
            raise CoconutError(
                "RunConfig.scorer: a scorer is of a model that stays as it is, and RunConfig.reinforcement changes it: "
                "give each a run of its own"
            )
        self._check_drawing(scorer.policy)
        if scorer.most_draws > 1 and self.pipeline.length_buckets:
            raise CoconutError(
                f"ScorerConfig.most_draws = {scorer.most_draws!r}: takes the questions of a step from several batches, "
                f"of one shape; PipelineConfig.length_buckets = {self.pipeline.length_buckets!r} gives them others"
            )
        if self.curriculum.advance_metric is not None:
            raise CoconutError(
                f"CurriculumConfig.advance_metric = {self.curriculum.advance_metric!r}: a scorer's model learns no "
                "stage; give it the last one and a number of steps"
            )

    def _check_drawing(self, policy: PolicyConfig) -> None:
        """What samples to learn from ask of the other fields."""
        plain = POLICIES[policy.kind].plain
        if plain is not None and self.feedback.kind not in plain:
            raise CoconutError(
                f"PolicyConfig.kind = {policy.kind!r}: draws around what FeedbackConfig.kind = {plain[0]!r} thinks, by "
                f"which the model answers where nothing is drawn; this run has {self.feedback.kind!r}"
            )
        for field, neutral in (("top_k", None), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(self.sampling, field) != neutral:
                raise CoconutError(
                    f"SamplingConfig.{field} = {getattr(self.sampling, field)!r}: samples to learn from are drawn from "
                    "all tokens, since others would have no probability"
                )

    def _method_options(self) -> Any:
        """The method's options: its defaults where there are none, a dataclass where there are plain values."""
        kind = get_method(self.method).options
        # Those of a method without options are left behind where another method takes its place.
        if self.options is None or type(self.options) is NoOptions:
            return kind()
        if isinstance(self.options, Mapping):
            return from_json(kind, self.options, "RunConfig.options")
        if not isinstance(self.options, kind):
            raise CoconutError(
                f"RunConfig.options = {self.options!r}: method = {self.method!r} takes a {kind.__name__}"
            )
        return self.options


def to_json(config: Any) -> Any:
    """Plain values of a config dataclass, tuples as lists."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_json(value) for value in config]
    return config


def from_json(kind: type, content: Mapping[str, Any], where: str) -> Any:
    """The config dataclass of type ``kind`` that `to_json` wrote.

    Raises:
      CoconutError: a field is unknown or missing, or the dataclass rejects a value; the message starts with ``where``.
    """
    if not isinstance(content, Mapping):
        raise CoconutError(f"{where}: must be an object, not {content!r:.80}")
    hints: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    unknown = sorted(set(content) - set(hints))
    if unknown:
        raise CoconutError(f"{where}: {kind.__name__} has no field {unknown[0]!r}")
    values = {}
    for name, value in content.items():
        hint = hints[name]
        # A dataclass, or one or None.
        kinds = [part for part in (hint, *typing.get_args(hint)) if isinstance(part, type)]
        nested = [part for part in kinds if dataclasses.is_dataclass(part)]
        if nested and value is not None:
            # Of several the one that has such fields.
            given = set(value) if isinstance(value, Mapping) else set()
            fitting = [part for part in nested if given <= {field.name for field in dataclasses.fields(part)}]
            values[name] = from_json([*fitting, *nested][0], value, f"{where}: {name}")
        elif typing.get_origin(hint) is tuple and isinstance(value, list):
            values[name] = tuple(value)
        else:
            values[name] = value
    try:
        return kind(**values)
    except (TypeError, CoconutError) as error:
        raise CoconutError(f"{where}: {error}") from error


def run_config_from_json(content: Mapping[str, Any], where: str) -> RunConfig:
    """The `RunConfig` that `to_json` wrote, also where the fields of `ExecutionConfig` stood among the decoder's.

    Raises:
      CoconutError: see `from_json`.
    """
    if isinstance(content, Mapping) and "execution" not in content and isinstance(content.get("decoder"), Mapping):
        moved = {field.name for field in dataclasses.fields(ExecutionConfig)}
        execution = {name: value for name, value in content["decoder"].items() if name in moved}
        decoder = {name: value for name, value in content["decoder"].items() if name not in moved}
        content = {**content, "decoder": decoder, "execution": execution}
    return from_json(RunConfig, content, where)


def differences(first: Any, second: Any, path: str = "") -> dict[str, str]:
    """What differs between two JSON values: the path of each leaf, and what it is there and here."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found = {}
        for key in [*first, *(key for key in second if key not in first)]:
            below = f"{path}.{key}" if path else key
            missing = "(missing)"
            found |= differences(first.get(key, missing), second.get(key, missing), below)
        return found
    return {} if first == second else {path: f"{first!r} there, {second!r} here"}
