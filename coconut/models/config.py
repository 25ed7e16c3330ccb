"""What a decoder is made of, and how it is run."""

import dataclasses
from typing import Any, Literal, no_type_check

import jax.numpy as jnp

from coconut.errors import CoconutError, check_fields
from coconut.models.experts_config import ExpertsConfig
from coconut.models.latent_config import LARGEST_NUMBER, LARGEST_SIZE, LatentAttentionConfig, YarnRotaryScaling
from coconut.models.local_config import LocalAttentionConfig
from coconut.models.rotary_config import LinearRotaryScaling, LongRotaryScaling, RotaryScaling

PositionEmbedding = Literal["learned", "rotary"]
Normalization = Literal["layernorm", "rmsnorm"]
Gather = Literal["pass", "step"]
NormPlacement = Literal["before", "after", "both"]
Mlp = Literal["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"]
MixerKind = Literal["attention", "latent_attention"]
MlpKind = Literal["dense", "experts"]
Family = Literal[
    "deepseek_v2", "deepseek_v3", "gemma3_text", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"
]
Remat = Literal["none", "dots", "full"]
Implementation = Literal["auto", "reference", "xla", "tpu", "gpu", "tpu_interpret", "gpu_interpret"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
KERNEL_DTYPES = ("float32", "bfloat16")
"""What `pallas_kernels` computes with, in every implementation."""

MOST_LAYERS = 1_000
"""More are slips or malice: building so many takes for ever."""


def split_implementation(name: str) -> tuple[str, bool]:
    """``tpu_interpret`` -> the kernel for TPUs, interpreted on any device; other names as they are."""
    return name.removesuffix("_interpret"), name.endswith("_interpret")


AnyRotaryScaling = RotaryScaling | LinearRotaryScaling | LongRotaryScaling | YarnRotaryScaling


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of a decoder-only transformer.

    The defaults are GPT-2's choices (Radford et al. 2019); Llama and its kin set ``position_embedding="rotary"``,
    ``normalization="rmsnorm"``, ``mlp="swiglu"``, ``num_kv_heads`` and the bias switches (`coconut.models.presets`).

    Attributes:
      vocab_size: ``V``; None until a tokenizer is known, and no decoder can be built before. It may be larger than the
        tokenizer's, so that a mesh can split it; the rows without a token are never chosen.
      num_layers: ``L``.
      embed_dim: ``D``.
      num_heads: ``N``.
      num_kv_heads: ``M``; None means ``N`` (multi-head attention).
      head_dim: ``H``; None means ``D / N``.
      mlp_dim: ``F``; None means ``4 D``.
      max_positions: the longest row; a bound on the learned position table, and checked against the data for both
        kinds of positions.
      position_embedding: ``learned`` adds a table to every input, thoughts included; ``rotary`` turns queries and
        keys (Su et al. 2021).
      rotary_base: base of the rotary wavelengths.
      rotary_fraction: share of a head's features that turn, the first of them; the others carry no position (Phi 4
        mini: 0.75).
      rotary_scaling: how rotary wavelengths are stretched; None for not at all.
      normalization: ``layernorm`` (with bias) or ``rmsnorm``.
      norm_placement: ``before`` normalises what attention and MLP read of the residual stream, ``after`` what they add
        to it (OLMo 2, OLMo Team 2025, section 3.2), ``both`` the one and the other, by norms of their own (Gemma 3,
        Gemma Team 2025).
      norm_epsilon: added to the variance.
      norm_around_one: the norms multiply by one plus their parameter, which starts at zero (Gemma), and not by the
        parameter.
      mlp: ``gelu`` (exact), ``gelu_tanh`` (GPT-2's ``gelu_new``), or with a gate (Shazeer 2020) through SiLU
        (``swiglu``) or one of these (``geglu``, ``geglu_tanh``).
      qkv_bias, output_bias, mlp_bias: biases of the attention's inputs, its output, and the MLP.
      query_key_norm: normalise queries and keys before they are rotated.
      query_key_norm_over: what is normalised together: the features of a ``head`` (Qwen 3), or those of ``all`` heads
        (OLMo 2).
      query_pre_attention_scalar: the scores of attention are divided by its root; None for ``H``.
      local_attention: which layers look back through a window, and how far; None for none. Not with latent_attention.
      latent_attention: sizes of multi-head latent attention, which then takes the place of attention by keys and values
        (`coconut.models.latent_attention`); None for the latter. ``num_kv_heads`` and ``head_dim`` are then None;
        ``qkv_bias`` is a bias of what is made of the residual stream, the queries of a single matrix excepted.
      experts: MLPs of which each column uses a few (`coconut.models.experts`), from some layer on; None for the one of
        ``mlp_dim`` in every layer.
      tied_head: logits from the embedding table itself.
      logit_scale: factor on the logits. With unit-variance embeddings and a tied head, ``D ** -0.5`` keeps logits
        near one and lets thoughts and tokens share a scale.
      embedding_scale: factor on the embeddings of tokens, and not on thoughts. Gemma: ``D ** 0.5``.
      embedding_stddev: of the token table at initialisation. The position table uses ``kernel_stddev``.
      kernel_stddev: of every matrix; the two matrices that write to the residual stream are scaled by
        ``(2 L) ** -0.5`` (GPT-2).
      offset_bias: with rotary positions and ``qkv_bias``, how strongly the first layer's heads prefer one column at
        initialisation: head ``n`` the ``n + 1``-th before its own, whatever the tokens. A small model then need not
        discover how to look at its neighbours before it can learn to follow an edge. 0 starts all biases at zero.
      dropout: rate after the embeddings, on the attention weights and on both residual branches; applied only
        when a key is given.
      param_dtype: dtype parameters are kept in.
      family: the ``model_type`` that a checkpoint of it is written as for `transformers`; None for the first that
        computes the same. Mistral and Phi 3 compute what Llama does, and keep their names so.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    vocab_size: int | None = None
    num_layers: int
    embed_dim: int
    num_heads: int
    max_positions: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    position_embedding: PositionEmbedding = "learned"
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0
    rotary_scaling: LinearRotaryScaling | RotaryScaling | LongRotaryScaling | YarnRotaryScaling | None = None
    normalization: Normalization = "layernorm"
    norm_placement: NormPlacement = "before"
    norm_epsilon: float = 1e-5
    norm_around_one: bool = False
    mlp: Mlp = "gelu_tanh"
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    query_key_norm: bool = False
    query_key_norm_over: Literal["head", "all"] = "head"
    query_pre_attention_scalar: int | None = None
    tied_head: bool = True
    local_attention: LocalAttentionConfig | None = None
    latent_attention: LatentAttentionConfig | None = None
    experts: ExpertsConfig | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    embedding_stddev: float = 0.02
    kernel_stddev: float = 0.02
    offset_bias: float = 0.0
    dropout: float = 0.0
    param_dtype: str = "float32"
    family: Family | None = None

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"DecoderConfig.{field} = {getattr(self, field)!r:.80}: {why}")

        for field in ("num_layers", "embed_dim", "num_heads", "max_positions"):
            if getattr(self, field) < 1:
                reject(field, "must be at least 1")
        for field in ("vocab_size", "num_kv_heads", "head_dim", "mlp_dim", "query_pre_attention_scalar"):
            value = getattr(self, field)
            if value is not None and value < 1:
                reject(field, "must be None or at least 1")
        for field in ("vocab_size", "num_layers", "embed_dim", "num_heads", "max_positions", "head_dim", "mlp_dim"):
            limit = MOST_LAYERS if field == "num_layers" else LARGEST_SIZE
            if (getattr(self, field) or 0) > limit:
                reject(field, f"must be at most {limit:,}")
        if self.num_heads * self.width_of_head > LARGEST_SIZE:
            reject("num_heads", f"times a width of {self.width_of_head} for each is more than {LARGEST_SIZE:,}")
        if self.head_dim is None and self.latent_attention is None and self.embed_dim % self.num_heads:
            reject("embed_dim", f"must be a multiple of num_heads = {self.num_heads} where head_dim is None")
        if self.num_heads % self.kv_heads:
            reject("num_kv_heads", f"must divide num_heads = {self.num_heads}")
        if self.position_embedding == "rotary" and self.width_of_head % 2:
            reject("head_dim", "rotary positions need an even head width")
        if not 0 < self.rotary_fraction <= 1:
            reject("rotary_fraction", "must be above 0 and at most 1")
        if self.rotary_fraction != 1 and self.position_embedding != "rotary":
            reject("rotary_fraction", "needs rotary positions")
        if self.rotary_fraction != 1 and (not self.rotary_width or self.rotary_width % 2):
            reject("rotary_fraction", f"of a head's {self.width_of_head} features must be a positive even number")
        if self.rotary_scaling is not None and self.position_embedding != "rotary":
            reject("rotary_scaling", "needs rotary positions")
        if isinstance(self.rotary_scaling, LongRotaryScaling):
            self._check_long_rows(self.rotary_scaling)
        if self.latent_attention is not None:
            self._check_latent_attention()
        elif isinstance(self.rotary_scaling, YarnRotaryScaling):
            reject("rotary_scaling", "needs latent_attention: no other attention multiplies its scores by it")
        if self.norm_around_one and self.normalization != "rmsnorm":
            reject("norm_around_one", "needs normalization = 'rmsnorm'")
        if self.local_attention is not None:
            self._check_local_attention(self.local_attention)
        if self.experts is not None and self.experts.first_layer >= self.num_layers:
            reject("experts", f"first_layer must be less than num_layers = {self.num_layers}")
        if self.experts is not None and (self.mlp != "swiglu" or self.mlp_bias):
            reject("experts", f"need mlp = 'swiglu' and no mlp_bias, not {self.mlp!r} and {self.mlp_bias}")
        if self.query_key_norm_over != "head" and not self.query_key_norm:
            reject("query_key_norm_over", "means nothing without query_key_norm")
        if self.offset_bias and not (self.qkv_bias and self.position_embedding == "rotary"):
            reject("offset_bias", "needs rotary positions and qkv_bias")
        if not 0.0 <= self.dropout < 1.0:
            reject("dropout", "must be in [0, 1)")
        if self.param_dtype not in DTYPES:
            reject("param_dtype", f"must be one of {', '.join(DTYPES)}")
        for field in (
            "rotary_base",
            "norm_epsilon",
            "logit_scale",
            "embedding_scale",
            "embedding_stddev",
            "kernel_stddev",
        ):
            if not 0 < getattr(self, field) <= LARGEST_NUMBER:
                reject(field, "must be positive and finite")
        if not abs(self.offset_bias) <= LARGEST_NUMBER:
            reject("offset_bias", "must be finite")

    def _check_latent_attention(self) -> None:
        """Looks whether all that latent attention has no use for is left out."""
        assert self.latent_attention is not None
        wanted = {
            "position_embedding": "rotary",
            "normalization": "rmsnorm",
            "num_kv_heads": None,
            "head_dim": None,
            "rotary_fraction": 1.0,
            "query_key_norm": False,
            "offset_bias": 0.0,
            "norm_around_one": False,
            "query_pre_attention_scalar": None,
            "local_attention": None,
        }
        for field, value in wanted.items():
            if getattr(self, field) != value:
                why = f"latent_attention needs {value!r}"
                raise CoconutError(f"DecoderConfig.{field} = {getattr(self, field)!r:.80}: {why}")
        if self.num_heads * (self.latent_attention.plain_dim + self.latent_attention.value_dim) > LARGEST_SIZE:
            why = f"times keys and values of {self.latent_attention!r:.80} is more than {LARGEST_SIZE:,}"
            raise CoconutError(f"DecoderConfig.num_heads = {self.num_heads}: {why}")
        if self.rotary_scaling is not None and self.rotary_base <= 1:
            raise CoconutError(f"DecoderConfig.rotary_base = {self.rotary_base!r}: YaRN needs one above 1")
        if not isinstance(self.rotary_scaling, YarnRotaryScaling | None):
            raise CoconutError(
                f"DecoderConfig.rotary_scaling = {self.rotary_scaling!r:.80}: latent_attention needs None or a "
                "YarnRotaryScaling"
            )

    def _check_local_attention(self, local: LocalAttentionConfig) -> None:
        if len(local.pattern) > self.num_layers:
            raise CoconutError(
                f"LocalAttentionConfig.pattern = {local.pattern!r:.80}: has {len(local.pattern)} layers, and "
                f"DecoderConfig.num_layers = {self.num_layers}"
            )
        if local.rotary_base is not None and self.position_embedding != "rotary":
            raise CoconutError(f"LocalAttentionConfig.rotary_base = {local.rotary_base!r}: needs rotary positions")

    def _check_long_rows(self, scaling: LongRotaryScaling) -> None:
        if len(scaling.short_factors) != self.rotary_width // 2:
            raise CoconutError(
                f"LongRotaryScaling.short_factors: has {len(scaling.short_factors)} factors, and {self.rotary_width} "
                f"features of a head turn: must be {self.rotary_width // 2}"
            )
        if self.max_positions > scaling.original_positions:
            raise CoconutError(
                f"DecoderConfig.max_positions = {self.max_positions!r}: rows longer than "
                f"LongRotaryScaling.original_positions = {scaling.original_positions} turn by other factors, which is "
                f"not computed here: must be at most {scaling.original_positions}"
            )

    @property
    def vocabulary(self) -> int:
        """``V``.

        Raises:
          CoconutError: it is not known yet.
        """
        if self.vocab_size is None:
            raise CoconutError("DecoderConfig.vocab_size = None: set it to the tokenizer's before building a decoder")
        return self.vocab_size

    @property
    def kv_heads(self) -> int:
        """``M``."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def width_of_head(self) -> int:
        """``H``; of latent attention, that of queries and keys."""
        if self.latent_attention is not None:
            return self.latent_attention.query_dim
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mixer(self) -> MixerKind:
        """What mixes columns (`coconut.models.decoder_layer.MIXERS`)."""
        return "attention" if self.latent_attention is None else "latent_attention"

    def is_local(self, layer: Any) -> bool:
        """Whether a layer looks back through a window; its number may be traced where all are alike."""
        local = self.local_attention
        if local is None or local.alike:
            return local is not None
        return local.pattern[layer % len(local.pattern)] == "local"

    @property
    def local_layers(self) -> jnp.ndarray:
        """Whether each layer is local, ``[L]``: of layers that are scanned."""
        return jnp.asarray([self.is_local(layer) for layer in range(self.num_layers)])

    def window_of(self, layer: Any) -> int | None:
        """How many columns a column of a layer sees, itself among them; None for all before."""
        return self.local_attention.window if self.local_attention and self.is_local(layer) else None

    @property
    def layers_look_alike(self) -> bool:
        """Whether all layers look back equally far."""
        return self.local_attention is None or self.local_attention.alike

    def rotary_of(self, *, local: bool) -> tuple[float, AnyRotaryScaling | None]:
        """Base and scaling of the rotary wavelengths of local layers, or of the others."""
        own = None if self.local_attention is None else self.local_attention.rotary_base
        return (own, None) if local and own is not None else (self.rotary_base, self.rotary_scaling)

    @property
    def score_scale(self) -> float | None:
        """Factor on the scores of attention by keys and values; None for ``H ** -0.5``."""
        scalar = self.query_pre_attention_scalar
        return None if scalar is None else scalar**-0.5

    @property
    def mlp_is_gated(self) -> bool:
        """Whether the MLP has two matrices that read, one of them the gate."""
        return self.mlp in ("swiglu", "geglu", "geglu_tanh")

    def mlp_of(self, layer: Any) -> MlpKind:
        """Which MLP a layer has (`coconut.models.decoder_layer.MLPS`); its number may be traced where all are alike."""
        experts = self.experts
        if experts is None or (experts.first_layer and layer < experts.first_layer):
            return "dense"
        return "experts"

    @property
    def rotary_width(self) -> int:
        """How many features of a head turn."""
        if self.latent_attention is not None:
            return self.latent_attention.rotary_dim
        return int(self.width_of_head * self.rotary_fraction)

    @property
    def width_of_mlp(self) -> int:
        """``F``."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a decoder is run.

    None of it changes what the decoder is. A run may go on with another one, and a checkpoint be read with another one,
    to the same numbers up to rounding.

    Attributes:
      dtype: dtype of activations and matrix products. Softmax, norms and losses use at least float32.
      scan_layers: keep the layers stacked and scan over them (accelerators: compile time); False keeps and applies
        them one by one (CPU: stacked weights would be sliced at every pass).
      remat: what a backward pass recomputes: ``none``, all but matrix products (``dots``), or whole layers
        (``full``).
      attention: what computes attention: ``dense``, one softmax over all scores at once, or an implementation of
        `pallas_kernels` (``auto`` and those it names; ``tpu_interpret`` and ``gpu_interpret`` run a kernel step by step
        on any device, for tests). ``auto`` is chosen by `coconut.models.segment_attention.choose_attention`. Explicit
        requests that do not apply raise. Dropout, latent attention and dtypes other than `KERNEL_DTYPES` need
        ``dense`` or ``auto``, which is then ``dense``.
      gather: when training gathers the matrices that the mesh axis ``fsdp`` splits: each ``pass`` those it uses, or all
        once a ``step``, which moves less between devices, reads more of each one's memory (every thought reads whole
        matrices) and needs room for all of them and their gradients in ``dtype`` (`coconut.training.gathering`).
      cross_entropy: what computes the training loss: ``full``, from all logits, or an implementation of
        `pallas_kernels.linear_cross_entropy`, which never holds them; ``auto`` is chosen by
        `coconut.losses.choose_cross_entropy`.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    dtype: str = "float32"
    scan_layers: bool = False
    remat: Remat = "none"
    gather: Gather = "pass"
    attention: Implementation | Literal["dense"] = "auto"
    cross_entropy: Implementation | Literal["full"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype not in DTYPES:
            self._reject("dtype", f"must be one of {', '.join(DTYPES)}")
        for field in ("attention", "cross_entropy"):
            if getattr(self, field) not in ("auto", "dense", "full") and self.dtype not in KERNEL_DTYPES:
                self._reject(field, f"computes in {' or '.join(KERNEL_DTYPES)}, not in dtype = {self.dtype}")

    def check(self, decoder: DecoderConfig) -> None:
        """Looks whether a decoder can be run so.

        Raises:
          CoconutError: it cannot.
        """
        if decoder.dropout and self.attention not in ("auto", "dense"):
            why = f"the kernels drop no attention weights, as DecoderConfig.dropout = {decoder.dropout} asks for"
            self._reject("attention", why)
        if self.scan_layers and decoder.experts is not None and decoder.experts.first_layer:
            self._reject(
                "scan_layers",
                f"ExpertsConfig.first_layer = {decoder.experts.first_layer}: layers that are scanned must be alike, "
                "and those before it have no experts",
            )
        if self.scan_layers and not decoder.layers_look_alike and self.attention not in ("auto", "dense"):
            self._reject(
                "attention",
                "layers that are scanned are one program, and a window is a part of the kernels': with local and "
                "global layers (DecoderConfig.local_attention) take 'dense', or scan_layers = False",
            )
        if decoder.mixer != "attention" and self.attention not in ("auto", "dense"):
            self._reject(
                "attention", "the kernels read keys and values by heads, and not DecoderConfig.latent_attention"
            )

    def _reject(self, field: str, why: str) -> None:
        raise CoconutError(f"ExecutionConfig.{field} = {getattr(self, field)!r}: {why}")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """``dtype`` as JAX's own."""
        return jnp.dtype(self.dtype)

    @property
    def accumulation_dtype(self) -> jnp.dtype:
        """At least float32: softmax, norms and losses are computed in it."""
        return jnp.promote_types(self.compute_dtype, jnp.float32)
