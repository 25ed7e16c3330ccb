"""The latent search tree (Hao et al. 2024, arXiv 2412.06769, section 5): what each node is worth after some thoughts.

Place the end marker after ``k`` thoughts and see how likely the model is to name each node next. That probability is
the node's *value*. The nodes it may sensibly name are the candidates of one level of the tree that a search would
build from the root: its children, then their children, and so on.

`coconut.analysis.probes.belief_over_nodes` is the same number for nodes of a single token, shared out among the nodes
so that they sum to 1; `normalized` does that here.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from coconut.analysis.levels import LevelMeans, means_by_level
from coconut.batching import align, page_shape
from coconut.errors import CoconutError
from coconut.evaluation.reading import given_pages, read
from coconut.evaluation.subject import Subject
from coconut.latent.feedback import draws
from coconut.model import Model
from coconut.pages import Page, Text, has_blocks
from coconut.tasks.graphs import Height, ancestors, heights, walk_ends
from coconut.tokenizers import Tokenizer
from coconut.types import Example, Graph

# --- Values ---------------------------------------------------------------------------------------------------------


def text_values(
    subject: Subject,
    examples: Sequence[Example],
    texts: Sequence[Sequence[str]],
    thoughts: Sequence[int],
    *,
    forced: str = "",
    batch_size: int = 64,
) -> list[Float[np.ndarray, "R N"]]:
    """How likely the model is to go on with each of some texts after each number of thoughts.

    The probability of a text is the product of those of its tokens, each behind the ones before it. All that is asked
    of the model is the next token behind each beginning of a text: one row for each question, number of thoughts and
    distinct beginning. So texts of one token cost one row a number of thoughts, and texts that begin alike share.
    All batches have one shape, and the programs of `coconut.evaluation.reading.read` are compiled once.

    Args:
      subject: who is asked.
      examples: the questions.
      texts: of each question, the ``N`` texts it may go on with.
      thoughts: the ``R`` numbers of thoughts.
      forced: written for the model behind the end marker. A blank at its end belongs to the texts: many vocabularies
        keep a blank and the word behind it in one token.
      batch_size: rows read together.

    Returns:
      For each question, the probability of its texts after each number of thoughts. What is left to 1 is what the
      model would rather write.

    Raises:
      CoconutError: a text is empty, or its first token would swallow the end of what is forced, or begins another text
        of the same question, so that their probabilities would overlap; thoughts that the method has no place for, a
        feedback that draws, or a row longer than the model's positions.
    """
    if len(texts) != len(examples):
        raise CoconutError(f"texts of {len(texts)} questions do not fit {len(examples)} questions")
    if draws(subject.model.feedback):
        raise CoconutError("the feedback draws its thoughts: a value would depend on the draw")
    stem = forced.rstrip()
    gap, written = forced[len(stem) :], subject.tokenizer.encode(stem)
    names = [_token_names(subject.tokenizer, stem, gap, own, written) for own in texts]
    # Distinct beginnings of each question's texts, in the order in which they are met.
    beginnings = [list(dict.fromkeys(name[:end] for name in own for end in range(len(name)))) for own in names]
    tokenized = [subject.tokenize(example) for example in examples]
    pages: list[Page] = []
    for count in thoughts:
        given = given_pages(subject.method, subject.placing, tokenized, count)
        for page, own in zip(given, beginnings, strict=True):
            if count and not has_blocks(page):
                raise CoconutError(f"{count} thoughts: the model opens its blocks itself, so none can be given to it")
            pages += [(*page, Text(np.asarray([*written, *beginning], np.int32))) for beginning in own]
    logs = [np.zeros((len(thoughts), len(own))) for own in names]
    rows = _next_tokens(subject, pages, batch_size)
    for index in range(len(thoughts)):
        for question, own in enumerate(beginnings):
            for beginning in own:
                row, end = next(rows), len(beginning)
                for column, name in enumerate(names[question]):
                    if len(name) > end and name[:end] == beginning:
                        logs[question][index, column] += row[name[end]]
    return [np.exp(own) for own in logs]


def node_values(
    subject: Subject,
    examples: Sequence[Example],
    thoughts: Sequence[int],
    *,
    forced: str = "",
    batch_size: int = 64,
) -> list[Float[np.ndarray, "R N"]]:
    """The value of every node of each question's graph (`text_values` of the nodes' names).

    Args:
      subject: who is asked.
      examples: graph questions.
      thoughts: the ``R`` numbers of thoughts.
      forced: written for the model behind the end marker. In the symbol form nothing asks for the next step, the child
        ``k + 1`` edges below the root. In ProsQA's sentences ``"Every "`` asks for whom the next one is about, the node
        ``k`` edges below the root, as the paper does; ``"Every lempus is a "`` for a child of the lempus. The answer's
        prefix asks for the answer.
      batch_size: rows read together.

    Returns:
      For each question the values by node id, not normalised: they sum to 1 only where the model would name nothing
      but a node.

    Raises:
      CoconutError: as `text_values`, or a question has no graph.
    """
    return text_values(
        subject,
        examples,
        [graph_of(example).symbols for example in examples],
        thoughts,
        forced=forced,
        batch_size=batch_size,
    )


def first_nodes(
    subject: Subject, example: Example, thoughts: Sequence[int], *, batch_size: int = 64
) -> tuple[Float[np.ndarray, "R N"], Float[np.ndarray, "R N"]]:
    """The first node that the model would name by itself in the symbol form: as its next step, or as its answer.

    Returns:
      For each number of thoughts the probability of each node as the next written step, and as the answer that is
      written with no step before it. Of all entries of a row of both the sum is at most 1; what is left to 1 is the
      probability of writing anything else.

    Raises:
      CoconutError: as `node_values`.
    """
    symbols = graph_of(example).symbols
    answers = [subject.text_format.answer_prefix + symbol for symbol in symbols]
    (values,) = text_values(subject, [example], [[*symbols, *answers]], thoughts, batch_size=batch_size)
    return values[:, : len(symbols)], values[:, len(symbols) :]


def normalized(values: Float[np.ndarray, "*R N"]) -> Float[np.ndarray, "*R N"]:
    """Values shared out so that each row sums to 1: of nodes of one token, `probes.belief_over_nodes`."""
    return values / values.sum(-1, keepdims=True)


def graph_of(example: Example) -> Graph:
    """The graph of a question.

    Raises:
      CoconutError: it has none.
    """
    if example.graph is None:
        raise CoconutError(f"the question has no graph to search: {example.question!r:.80}")
    return example.graph


def _token_names(
    tokenizer: Tokenizer, stem: str, gap: str, texts: Sequence[str], written: Sequence[int]
) -> list[tuple[int, ...]]:
    """The tokens of each text, as they stand behind what is forced."""
    names = []
    for text in texts:
        ids = tokenizer.encode(stem + gap + text)
        if ids[: len(written)] != list(written) or len(ids) == len(written):
            raise CoconutError(f"forced = {stem + gap!r}: the tokens of {text!r} cannot be told from it")
        names.append(tuple(ids[len(written) :]))
    for text, name in zip(texts, names, strict=True):
        for other, longer in zip(texts, names, strict=True):
            if text != other and longer[: len(name)] == name:
                raise CoconutError(f"the tokens of {text!r} begin those of {other!r}: their values would overlap")
    return names


def _next_tokens(subject: Subject, pages: Sequence[Page], batch_size: int) -> Iterator[Float[np.ndarray, " V"]]:
    """The log-probabilities of the token behind each page, in order; a whole vocabulary is kept for one batch only."""
    if not pages:
        return
    shape = page_shape(pages)
    limit = subject.model.decoder.config.max_positions
    if shape.columns > limit:
        raise CoconutError(
            f"DecoderConfig.max_positions = {limit}: a question of {shape.prompt} tokens, {sum(shape.thoughts)} "
            f"thoughts and {sum(shape.texts)} tokens behind them need {shape.columns}"
        )
    think = subject.method.think(subject.placing.options)
    for start in range(0, len(pages), batch_size):
        rows: list[Page | None] = list(pages[start : start + batch_size])
        count = len(rows)
        batch = align(
            rows + [None] * (batch_size - count),
            shape,
            pad_id=subject.tokenizer.eos_id,
            latent_id=subject.tokenizer.latent_id,
            feeds_back=subject.method.feeds_back(subject.placing.options),
        )
        # Rows that only fill the batch read one token, so that their softmax has something to see.
        batch.valid[count:, shape.prompt - 1] = True
        prefix, _ = read(subject.model, batch, think, latent_id=subject.tokenizer.latent_id)
        yield from np.asarray(_log_softmax(subject.model, prefix.last, subject.tokenizer.vocab_size))[:count]


@functools.partial(jax.jit, static_argnames="vocab_size")
def _log_softmax(model: Model, last: Float[Array, "B D"], vocab_size: int) -> Float[Array, "B V"]:
    # Published embeddings often have rows behind the last token.
    return jax.nn.log_softmax(model.decoder.unembed(last)[:, :vocab_size])


# --- What the values say ----------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """The nodes of one level of a question's search tree.

    Attributes:
      nodes: their ids, rising.
      values: of each.
      leads: whether each leads to the target (or is it). The paper calls these correct.
    """

    nodes: tuple[int, ...]
    values: Float[np.ndarray, " C"]
    leads: tuple[bool, ...]


def candidates_at(graph: Graph, values: Float[np.ndarray, " N"], hop: int) -> Candidates:
    """The nodes ``hop`` edges below the root (`coconut.tasks.graphs.walk_ends`) with their values.

    Args:
      graph: the graph.
      values: of all nodes, by id: a row of `node_values`.
      hop: level of the tree. The paper takes the root's children after one thought, where it forces ``"Every "``; the
        next step of the symbol form is one level further down.

    Raises:
      CoconutError: the values are not those of the graph's nodes.
    """
    if len(values) != len(graph.symbols):
        raise CoconutError(f"{len(values)} values do not fit a graph of {len(graph.symbols)} nodes")
    nodes = tuple(sorted(walk_ends(graph, hop)))
    right = {graph.target, *ancestors(graph, graph.target)}
    return Candidates(nodes, values[list(nodes)], tuple(node in right for node in nodes))


def cumulative_values(candidates: Sequence[Candidates], *, top: int = 3) -> Float[np.ndarray, "Q top"]:
    """The value of the best candidate, of the best two together, and so on, of each question.

    Returns:
      A row for each question; NaN where it has fewer candidates, so that no question counts for what it does not have.

    Raises:
      CoconutError: ``top`` is below 1, or there are no questions.
    """
    if top < 1:
        raise CoconutError(f"top = {top}: must be at least 1")
    if not candidates:
        raise CoconutError("there are no questions whose values could be summed")
    sums = np.full((len(candidates), top), np.nan)
    for row, own in zip(sums, candidates, strict=True):
        best = np.cumsum(np.sort(own.values)[::-1])[:top]
        row[: len(best)] = best
    return sums


class PercentileCurves(NamedTuple):
    """Cumulative values of the same questions, each curve in rising order.

    Attributes:
      percentiles: from 0 to 100: the middle of each question's share of the axis.
      values: a curve for the best candidate, the best two, and so on.
    """

    percentiles: Float[np.ndarray, " Q"]
    values: Float[np.ndarray, "top Q"]


def percentile_curves(sums: Float[np.ndarray, "Q top"]) -> PercentileCurves:
    """Cumulative values against their percentile among the questions (the paper's picture of parallel search).

    Where the curves of the best one and of the best two lie apart, the model keeps several candidates; where they meet,
    it has chosen. All curves are of the questions that have ``top`` candidates: of different questions, they could
    cross, and their distance would say nothing. Each is sorted by itself.

    Args:
      sums: of `cumulative_values`.
    """
    whole = sums[~np.isnan(sums).any(1)]
    return PercentileCurves(100 * (np.arange(len(whole)) + 0.5) / max(len(whole), 1), np.sort(whole, axis=0).T)


def values_by_height(
    graphs: Sequence[Graph],
    candidates: Sequence[Candidates],
    kind: Height,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[bool, LevelMeans]:
    """Values against the height of the nodes, apart for those that lead to the target and those that do not.

    Low nodes are the easy ones: little is left to search below them (the paper's reason for planning in thoughts).

    Args:
      graphs: of the questions.
      candidates: of the questions; of several numbers of thoughts if the lists are put one behind the other, with the
        graphs likewise.
      kind: of height (`coconut.tasks.graphs.heights`).
      resamples: of the bootstrap.
      seed: of its draws.

    Returns:
      By whether the nodes lead to the target, means by height with intervals (`means_by_level`, over graphs).

    Raises:
      CoconutError: there are not as many graphs as lists of candidates; or an error of `heights`.
    """
    if len(graphs) != len(candidates):
        raise CoconutError(f"{len(graphs)} graphs do not fit the candidates of {len(candidates)} questions")
    numbers = {graph: number for number, graph in enumerate(dict.fromkeys(graphs))}
    height_of = {graph: heights(graph, kind) for graph in numbers}
    rows: dict[bool, list[tuple[int, int, float]]] = {True: [], False: []}
    for graph, own in zip(graphs, candidates, strict=True):
        for node, value, leads in zip(own.nodes, own.values, own.leads, strict=True):
            rows[leads].append((height_of[graph][node], numbers[graph], float(value)))
    return {leads: means_by_level(found, len(numbers), resamples=resamples, seed=seed) for leads, found in rows.items()}
