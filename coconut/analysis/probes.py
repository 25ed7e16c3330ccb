"""What a model holds in its thoughts about the nodes of a graph: by stopping it early, or by looking at the thoughts.

`belief_over_nodes` is the paper's own probe (Hao et al. 2024, section 5): place the end marker after ``k`` thoughts and
see what the model would write. `thought_neighbors` compares thoughts with the embeddings of tokens (Zhu et al. 2025,
arXiv 2505.12514). Thoughts read as distributions over all tokens are in `coconut.analysis.lens`.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coconut.batching import align, page_shape
from coconut.errors import CoconutError
from coconut.evaluation.reading import given_pages, read
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Page, Placing, Text
from coconut.tokenizers import TextFormat, TokenizedExample, Tokenizer, validate_ids
from coconut.types import Example, Graph

Measure = Literal["inner_product", "cosine"]


def node_token_ids(tokenizer: Tokenizer, graph: Graph) -> list[int]:
    """The token of each node, by node id.

    Raises:
      CoconutError: a node's symbol is not exactly one token, or unknown to a ``symbol`` vocabulary.
    """
    ids = []
    for symbol in graph.symbols:
        tokens = tokenizer.encode(symbol)
        if len(tokens) != 1:
            raise CoconutError(
                f"node {symbol!r} is {len(tokens)} tokens; a probe of single tokens needs graphs in symbol form"
            )
        ids += tokens
    return ids


def belief_over_nodes(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    example: Example,
    tokenized: TokenizedExample,
    text_format: TextFormat,
    max_thoughts: int,
    *,
    forced: str | None = None,
) -> Float[np.ndarray, "R N"]:
    """What the model would write after each number of thoughts, as a distribution over the graph's nodes.

    After ``k`` thoughts in each block that the question is given with, the end marker is placed, ``forced`` is written
    for the model, and the next token's distribution is restricted to the nodes. The paper (Hao et al. 2024, section 5)
    calls the product of the probabilities of a concept's tokens the node's *value*; a node of the symbol form is one
    token, so the product has a single factor, and values are normalised over the nodes of the graph rather than over
    the candidates of one hop.

    All numbers of thoughts are rows of one batch, and their counts are data: the same programs serve every question of
    one length.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      method: how an example is written down. Pause tokens are counted like thoughts.
      placing: the stage the model has reached, and its method's options.
      example: the question, with its graph.
      tokenized: its ids; only what the model is given of them is read.
      text_format: how the task writes an answer.
      max_thoughts: ``K``, the most thoughts to probe. The model may have been trained with fewer.
      forced: text behind the end marker. None forces the answer's prefix, which asks for the answer; an empty text
        asks for the next written step.

    Returns:
      Row ``k`` of the ``R = K + 1`` rows is the belief after ``k`` thoughts over the ``N`` nodes in the order of their
      ids; it sums to 1.

    Raises:
      CoconutError: the example has no graph, a node is not one token, ``max_thoughts`` is negative, the method writes
        the question without a place for thoughts, or the row would be longer than the model's positions.
    """
    if example.graph is None:
        raise CoconutError(f"the question has no graph to hold a belief over: {example.question!r:.80}")
    if max_thoughts < 0:
        raise CoconutError(f"max_thoughts = {max_thoughts}: must be at least 0")
    node_ids = node_token_ids(tokenizer, example.graph)
    written = np.asarray(tokenizer.encode(text_format.answer_prefix if forced is None else forced), np.int32)
    pages: list[Page | None] = [
        (*page, Text(written))
        for count in range(max_thoughts + 1)
        for page in given_pages(method, placing, [tokenized], count)
    ]
    shape = page_shape(page for page in pages if page is not None)
    limit = model.decoder.config.max_positions
    if shape.columns > limit:
        raise CoconutError(
            f"DecoderConfig.max_positions = {limit}: a question of {shape.prompt} tokens, {sum(shape.thoughts)} "
            f"thoughts and {sum(shape.texts)} forced tokens need {shape.columns}"
        )
    batch = align(
        pages,
        shape,
        pad_id=tokenizer.eos_id,
        latent_id=tokenizer.latent_id,
        feeds_back=method.feeds_back(placing.options),
    )
    prefix, _ = read(model, batch, method.think(placing.options), latent_id=tokenizer.latent_id)
    # The softmax over some of the logits is the whole softmax, normalised over their tokens.
    return np.asarray(jax.nn.softmax(model.decoder.unembed(prefix.last)[:, jnp.asarray(node_ids)]))


def thought_neighbors(
    model: Model,
    thoughts: Float[Array | np.ndarray, "K D"],
    token_ids: Sequence[int],
    *,
    measure: Measure = "inner_product",
) -> Float[np.ndarray, "K N"]:
    """How near each thought is to the embeddings of some tokens (Zhu et al. 2025).

    With the tokens of `node_token_ids`, `coconut.analysis.paths.group_means` turns the result into the paper's figure.

    Args:
      model: the model.
      thoughts: the thoughts.
      token_ids: ids of the ``N`` tokens to compare with.
      measure: ``inner_product`` as in that paper, or ``cosine``, which lengths do not change.

    Raises:
      CoconutError: an id outside the vocabulary, or an unknown measure.
    """
    validate_ids(token_ids, model.decoder.config.vocabulary, "token_ids")
    embeddings = np.asarray(model.decoder.embed(jnp.asarray(token_ids, jnp.int32)))
    vectors = np.asarray(thoughts)
    if measure == "cosine":
        embeddings = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    elif measure != "inner_product":
        raise CoconutError(f"measure = {measure!r}: must be inner_product or cosine")
    return np.einsum("kd,nd->kn", vectors, embeddings)
