"""What thoughts look at: attention to the question's tokens, and to its edges or sentences."""

import numpy as np
from jaxtyping import Float, Int

from coconut.analysis.traces import Rows, Trace
from coconut.errors import CoconutError
from coconut.tasks.graph_form import question_graph
from coconut.tokenizers import Tokenizer
from coconut.types import Graph


def attention_to_question(rows: Rows, trace: Trace) -> list[Float[np.ndarray, "L N W P"]]:
    """The weights of each row's columns to its question's tokens, by layer and head.

    Args:
      rows: those that were traced.
      trace: with weights.

    Returns:
      For each row the weights of the columns that it has, over the ``P`` tokens of its own question. They sum to at
      most 1: the rest goes to markers, thoughts and text.

    Raises:
      CoconutError: the trace has no weights, or other rows.
    """
    if trace.weights is None:
        raise CoconutError("attention_to_question: the trace was made without weights")
    if len(rows) != len(trace.columns):
        raise CoconutError(f"attention_to_question: a trace of {len(trace.columns)} rows beside {len(rows)} rows")
    return [trace.weights[:, row][:, :, trace.columns[row] >= 0][..., rows.question[row]] for row in range(len(rows))]


def sum_by_group(weights: Float[np.ndarray, "*A P"], groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "*A G"]:
    """Sums weights over the tokens of each group.

    Args:
      weights: over tokens.
      groups: the group of each token, from 0; -1 for one of no group.
    """
    members = groups[:, None] == np.arange(groups.max(initial=-1) + 1)
    return weights @ members.astype(weights.dtype)


def edges_of_tokens(tokenizer: Tokenizer, question: Int[np.ndarray, " P"], graph: Graph) -> Int[np.ndarray, " P"]:
    """Which edge of the graph each token of a question in symbols belongs to: three of them, ``parent child |``.

    Returns:
      The index of the edge in ``graph.edges``; -1 for the tokens around the edges.

    Raises:
      CoconutError: the question is not that graph in symbols.
    """
    found = question_graph(np.asarray(question, np.int32))
    if found is None:
        raise CoconutError(f"the question {tokenizer.decode(question)!r:.80} is no graph in symbols")
    index = {
        tuple(tokenizer.encode(graph.symbols[parent]) + tokenizer.encode(graph.symbols[child])): edge
        for edge, (parent, child) in enumerate(graph.edges)
    }
    if not set(found[0]) <= index.keys():
        raise CoconutError(f"the question {tokenizer.decode(question)!r:.80} has edges that its graph lacks")
    groups = np.full(len(question), -1)
    groups[1:-5] = np.repeat([index[edge] for edge in found[0]], 3)
    return groups


def sentences_of_tokens(tokenizer: Tokenizer, question: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """Which sentence of a text each token belongs to, from 0.

    A sentence ends with a token that ends in a full stop, a question mark or an exclamation mark, where white space or
    nothing follows: that of ``3.50`` ends none. White space behind it opens the next one, and alone at the end of the
    text belongs to the last.
    """
    texts = [tokenizer.decode([token]) for token in question]
    groups, sentence = np.zeros(len(texts), int), 0
    for index, text in enumerate(texts):
        groups[index] = sentence
        rest = "".join(texts[index + 1 :])
        sentence += text.endswith((".", "?", "!")) and bool(rest.strip()) and rest[0].isspace()
    return groups
