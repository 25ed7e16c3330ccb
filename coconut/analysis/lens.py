"""States read as distributions over tokens: the logit lens, and the tuned lens.

The logit lens (nostalgebraist 2020) reads a state between the layers as if no layer followed: through the model's own
final norm and unembedding. What a layer has written may be meant for later layers, in other directions than those of
the output. The tuned lens (Belrose et al. 2023, arXiv 2303.08112) first maps the states of each layer by an affine map
of its own, trained so that the result is near what the model says in the end.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from coconut.errors import CoconutError
from coconut.model import Model
from coconut.models.decoder import Decoder
from coconut.tokenizers import Tokenizer

_TOGETHER = 512
"""States whose logits are made together: those of GPT-2 are 100 MB."""


def decode_thoughts(
    model: Model, tokenizer: Tokenizer, thoughts: Float[Array | np.ndarray, "K D"], top: int
) -> list[list[tuple[str, float]]]:
    """The most likely tokens of each thought, by the decoder's own unembedding.

    A thought of `coconut.latent.feedback.Identity` is a hidden state after the final norm, so this is the distribution
    the model would have written a token from where it thought instead. Another feedback's thoughts are read as they
    were fed: the order of the tokens is the same where all components were scaled alike, their probabilities are not.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      thoughts: such as `coconut.evaluation.answers.Answer.thought_inputs`.
      top: how many tokens of each thought.

    Returns:
      For each thought ``top`` pairs of a token, as `Tokenizer.token` shows it, and its probability (among the whole
      vocabulary); the most likely first.

    Raises:
      CoconutError: ``top`` is below 1 or above the size of the vocabulary.
    """
    found = top_tokens(model.decoder, thoughts, top, vocab_size=tokenizer.vocab_size, normed=True)
    return [
        [(tokenizer.token(token), float(value)) for token, value in zip(*row, strict=True)]
        for row in zip(*found, strict=True)
    ]


class TopTokens(NamedTuple):
    """The most likely tokens, the most likely first.

    Attributes:
      ids: the tokens.
      probabilities: theirs, among the whole vocabulary.
    """

    ids: Int[np.ndarray, "*A _"]
    probabilities: Float[np.ndarray, "*A _"]


def top_tokens(
    decoder: Decoder,
    states: Float[Array | np.ndarray, "*A D"],
    top: int,
    *,
    vocab_size: int | None = None,
    normed: bool = False,
) -> TopTokens:
    """The logit lens: the most likely tokens of states.

    Args:
      decoder: the decoder.
      states: between the layers (`coconut.analysis.traces.Trace.states`), or thoughts.
      top: how many tokens.
      vocab_size: ids that are tokens, from 0; None for every row of the embedding. Published embeddings often have rows
        behind the last token.
      normed: whether the states are behind the final norm already.

    Raises:
      CoconutError: ``top`` is below 1 or above the size of the vocabulary.
    """
    size = decoder.config.vocabulary if vocab_size is None else vocab_size
    if not 1 <= top <= size:
        raise CoconutError(f"top = {top}: must lie in 1 .. {size}, the size of the vocabulary")
    flat = np.asarray(states).reshape(-1, states.shape[-1])
    parts = [
        jax.tree.map(np.asarray, _top(decoder, jnp.asarray(flat[start : start + _TOGETHER]), top, size, normed))
        for start in range(0, len(flat), _TOGETHER)
    ] or [(np.zeros((0, top)), np.zeros((0, top), int))]
    probabilities, ids = (np.concatenate(part).reshape(*states.shape[:-1], top) for part in zip(*parts, strict=True))
    return TopTokens(ids, probabilities)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _top(decoder: Decoder, states: Float[Array, "R D"], top: int, size: int, normed: bool) -> tuple[Array, Array]:
    hidden = states if normed else decoder.norm(states)
    probabilities, ids = jax.lax.top_k(jax.nn.softmax(decoder.unembed(hidden)[:, :size]), top)
    return probabilities, ids


# --- The tuned lens -----------------------------------------------------------------------------------------------


class TunedLens(NamedTuple):
    """An affine map for the states before each layer. What the last layer leaves needs none.

    Attributes:
      matrices: each multiplies the states before its layer, from the right.
      offsets: what is added then.
    """

    matrices: Float[Array, "L D D"]
    offsets: Float[Array, "L D"]

    def __call__(self, states: Float[Array, "L R D"]) -> Float[Array, "L R D"]:
        """Maps the states before each layer to what the final norm and the unembedding read."""
        return jnp.einsum("lrd,lde->lre", states, self.matrices) + self.offsets[:, None]

    @classmethod
    def identity(cls, num_layers: int, width: int) -> "TunedLens":
        """The lens that training starts from: the logit lens."""
        return cls(jnp.broadcast_to(jnp.eye(width), (num_layers, width, width)), jnp.zeros((num_layers, width)))


def train_tuned_lens(
    decoder: Decoder,
    states: Float[np.ndarray, "_ R D"],
    *,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    vocab_size: int | None = None,
    seed: int = 0,
) -> TunedLens:
    """Trains an affine map for each layer, by Adam, to the distribution that the model ends with.

    The loss is ``KL(final || lens)`` (Belrose et al. 2023, section 3), summed over the layers, which share nothing. The
    decoder stays as it is. Adam is our choice.

    Args:
      decoder: the decoder.
      states: ``L + 1`` states of each of ``R`` columns, as `coconut.analysis.traces.Trace.states` has them, of columns
        that exist (``trace.states[:, trace.columns >= 0]``). Keep other *questions* for `divergences`.
      steps: optimizer steps.
      batch_size: columns of a step, drawn with replacement.
      learning_rate: Adam's.
      vocab_size: see `top_tokens`.
      seed: of the draws.

    Raises:
      CoconutError: there are no columns, they are not those of such a decoder, or a number is out of range.
    """
    _check_states(decoder, states.shape[0], states.shape[-1])
    if not states.shape[1]:
        raise CoconutError("states: there are no columns to train a lens on")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("learning_rate", learning_rate)):
        if not value > 0:
            raise CoconutError(f"{name} = {value!r}: must be positive")
    size = decoder.config.vocabulary if vocab_size is None else vocab_size
    drawn = np.random.default_rng(seed).integers(states.shape[1], size=(steps, batch_size))
    return _train(decoder, jnp.asarray(states), jnp.asarray(drawn), jnp.asarray(learning_rate), size)


@functools.partial(jax.jit, static_argnums=4)
def _train(
    decoder: Decoder,
    states: Float[Array, "_ R D"],
    drawn: Int[Array, "S _"],
    learning_rate: Float[Array, ""],
    size: int,
) -> TunedLens:
    optimizer = optax.adam(learning_rate)

    def step(carry: tuple[TunedLens, optax.OptState], columns: Array) -> tuple[tuple[TunedLens, optax.OptState], None]:
        lens, state = carry
        gradient = jax.grad(lambda lens: _divergence(decoder, lens, states[:, columns], size).mean(1).sum())(lens)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(lens, updates), state), None  # pyright: ignore[reportReturnType]

    lens = TunedLens.identity(states.shape[0] - 1, states.shape[-1])
    (lens, _), _ = jax.lax.scan(step, (lens, optimizer.init(lens)), drawn)
    return lens


def divergences(
    decoder: Decoder,
    states: Float[np.ndarray, "_ Q W D"],
    present: Bool[np.ndarray, "Q W"],
    lens: TunedLens | None = None,
    *,
    vocab_size: int | None = None,
) -> Float[np.ndarray, "Q L W"]:
    """How far the states before each layer are from what the model says in the end, seen through a lens.

    Args:
      decoder: the decoder.
      states: of ``W`` columns of each question; see `train_tuned_lens`, which must have seen other questions.
      present: the columns that each question has.
      lens: None for the logit lens.
      vocab_size: see `top_tokens`.

    Returns:
      ``KL(final || lens)`` in nats; NaN for columns that a question does not have.
      `coconut.analysis.intervals.means_of_questions` gives means with their intervals and numbers.

    Raises:
      CoconutError: the states are not those of such a decoder.
    """
    _check_states(decoder, states.shape[0], states.shape[-1])
    size = decoder.config.vocabulary if vocab_size is None else vocab_size
    lens = TunedLens.identity(states.shape[0] - 1, states.shape[-1]) if lens is None else lens
    flat, together = states[:, present], max(1, _TOGETHER // states.shape[0])
    found = np.full((*present.shape, states.shape[0] - 1), np.nan)
    parts = [
        np.asarray(_divergences(decoder, lens, jnp.asarray(flat[:, start : start + together]), size)).T
        for start in range(0, flat.shape[1], together)
    ]
    if parts:
        found[present] = np.concatenate(parts)
    return found.swapaxes(1, 2)


def _divergence(decoder: Decoder, lens: TunedLens, states: Float[Array, "_ R D"], size: int) -> Float[Array, "L R"]:
    read = lambda x: jax.nn.log_softmax(decoder.unembed(decoder.norm(x))[..., :size])
    final, seen = read(states[-1]), read(lens(states[:-1]))
    return (jnp.exp(final) * (final - seen)).sum(-1)


_divergences = jax.jit(_divergence, static_argnums=3)


def _check_states(decoder: Decoder, number: int, width: int) -> None:
    config = decoder.config
    if (number, width) != (config.num_layers + 1, config.embed_dim):
        raise CoconutError(
            f"states: {number} of width {width} for each column; a decoder of {config.num_layers} layers has "
            f"{config.num_layers + 1} of width {config.embed_dim}"
        )
