"""Which experts thoughts use, and which ones tokens do: do thoughts use others?

A router sends kinds of columns to different experts where it can tell them apart, and it can tell a thought from a node
as it can tell a node from a marker. So the distance of thoughts to tokens stands beside two others: that of tokens to
tokens, drawn at random in each question, as many as there are thoughts; and those of each kind of column to each other.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coconut.analysis.traces import Rows, batches, place_thoughts
from coconut.errors import CoconutError
from coconut.models.decoder import Decoder
from coconut.models.routes import routes

INTERVAL = (2.5, 97.5)


def chosen_experts(decoder: Decoder, rows: Rows, *, batch_size: int = 32) -> Int[np.ndarray, "X Q T J"]:
    """The experts that each column of each question chooses, in each layer that has experts.

    Args:
      decoder: the decoder.
      rows: whole rows with their thoughts (`coconut.analysis.traces.lay_out`).
      batch_size: rows run together.

    Raises:
      CoconutError: the decoder has no experts, or see `coconut.analysis.traces.batches`.
    """
    if decoder.config.experts is None:
        raise CoconutError("DecoderConfig.experts = None: there are no experts to look at")
    found = [
        np.asarray(_chosen(decoder, *batch))[:, :number] for batch, number, _ in batches(decoder, rows, batch_size)
    ]
    return np.concatenate(found, 1)


@functools.partial(jax.jit)
def _chosen(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    thoughts: Int[Array, "B K"],
    inputs: Float[Array, "B K D"] | None,
) -> Int[Array, "X B T J"]:
    embedded = place_thoughts(decoder.embed(tokens), thoughts, inputs)
    return routes(decoder, embedded, positions=positions, valid=valid)


def column_kinds(rows: Rows, markers: dict[str, int]) -> dict[str, Bool[np.ndarray, "Q T"]]:
    """Which columns are of which kind: each thought by its number, the question, the markers, other text.

    Args:
      rows: whole rows.
      markers: token ids by name.
    """
    columns = np.arange(rows.valid.shape[1])
    found = {
        f"thought {number + 1}": columns == rows.thoughts[:, number : number + 1]
        for number in range(rows.thoughts.shape[1])
    }
    found["question"], behind = rows.question.copy(), rows.text.copy()
    for name, token in markers.items():
        is_marker = rows.valid & (rows.tokens == token) & ~np.any([*found.values()], 0)
        found[name], behind = is_marker, behind & ~is_marker
    found["written text"] = behind
    return {name: own for name, own in found.items() if own.any()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """How columns use experts, in ``X`` layers.

    Attributes:
      layers: the number of each layer in the decoder, counted from 1.
      kinds: names of the kinds of columns: thoughts by their number, then those of tokens.
      columns: of each kind.
      shares: of each expert in what a kind's columns choose.
      between: total variation distances between the shares of kinds, from 0 to 1.
      evenness: of thoughts and of tokens, the entropy of the shares divided by that of even ones.
      distance: between the shares of all thoughts and of all tokens.
      interval: its 95 % interval, by a bootstrap over questions. It knows nothing of other seeds of training.
      of_tokens: in the place of thoughts as many tokens of each question, drawn at random: their distance to the
        question's other tokens, mean over draws.
      of_tokens_interval: between which 95 % of the draws lie.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    columns: tuple[int, ...]
    shares: Float[np.ndarray, "X G E"]
    between: Float[np.ndarray, "X G G"]
    evenness: dict[str, Float[np.ndarray, " X"]]
    distance: Float[np.ndarray, " X"]
    interval: Float[np.ndarray, "2 X"]
    of_tokens: Float[np.ndarray, " X"]
    of_tokens_interval: Float[np.ndarray, "2 X"]


def expert_use(
    chosen: Int[np.ndarray, "X Q T J"],
    kinds: dict[str, Bool[np.ndarray, "Q T"]],
    count: int,
    *,
    layers: Sequence[int],
    resamples: int = 1000,
    draws: int = 100,
    seed: int = 0,
) -> ExpertUse:
    """What `ExpertUse` says of columns.

    Args:
      chosen: the experts of each column, by layer (`chosen_experts`).
      kinds: the columns of each kind (`column_kinds`); no column is of two. The names of thoughts begin with
        ``thought``.
      count: how many experts there are.
      layers: the number of each layer.
      resamples: of the bootstrap.
      draws: of tokens in the place of thoughts.
      seed: of resamples and draws.

    Raises:
      CoconutError: there are no thoughts or no tokens.
    """
    names = sorted(kinds, key=lambda name: not name.startswith("thought"))
    is_thought = np.asarray([name.startswith("thought") for name in names])
    if is_thought.all() or not is_thought.any():
        raise CoconutError(f"kinds of columns: {', '.join(names)}: need thoughts and tokens")
    of_column = np.stack([(chosen == expert).sum(-1) for expert in range(count)], -1).astype(np.float64)
    loads = np.stack([np.einsum("qt,xqte->qxe", kinds[name], of_column) for name in names], 1)
    shares = _shares(loads.sum(0)).swapaxes(0, 1)
    tokens = np.any([kinds[name] for name in names if not name.startswith("thought")], 0)
    numbers = np.sum([kinds[name] for name in names if name.startswith("thought")], (0, 2))
    of_two = np.stack([loads[:, is_thought].sum(1), loads[:, ~is_thought].sum(1)])
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples)
    distances = _distance(*_shares(np.einsum("rq,gqxe->grxe", resampled, of_two)))
    by_chance = []
    for _ in range(draws):
        drawn = _as_many(tokens, numbers, rng)
        parts = np.stack([np.einsum("qt,xqte->xe", own, of_column) for own in (drawn, tokens & ~drawn)])
        by_chance.append(_distance(*_shares(parts)))
    whole = _shares(of_two.sum(1))
    return ExpertUse(
        layers=tuple(layers),
        kinds=tuple(names),
        columns=tuple(int(kinds[name].sum()) for name in names),
        shares=shares,
        between=_distance(shares[:, :, None], shares[:, None]),
        evenness={name: _evenness(own) for name, own in zip(("thoughts", "tokens"), whole, strict=True)},
        distance=_distance(*whole),
        interval=np.percentile(distances, INTERVAL, axis=0),
        of_tokens=np.mean(by_chance, 0),
        of_tokens_interval=np.percentile(by_chance, INTERVAL, axis=0),
    )


def _shares(loads: Float[np.ndarray, "*G E"]) -> Float[np.ndarray, "*G E"]:
    return loads / np.maximum(loads.sum(-1, keepdims=True), 1)


def _distance(first: Float[np.ndarray, "*#G E"], second: Float[np.ndarray, "*#G E"]) -> np.ndarray:
    return 0.5 * np.abs(first - second).sum(-1)


def _evenness(shares: Float[np.ndarray, "X E"]) -> Float[np.ndarray, " X"]:
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return -(shares * logs).sum(-1) / np.log(max(shares.shape[-1], 2))


def _as_many(
    columns: Bool[np.ndarray, "Q T"], numbers: Int[np.ndarray, " Q"], rng: np.random.Generator
) -> Bool[np.ndarray, "Q T"]:
    """As many of each question's columns as it has thoughts, at random."""
    draws = np.where(columns, rng.random(columns.shape), np.inf)
    return columns & (draws.argsort(1).argsort(1) < numbers[:, None])
