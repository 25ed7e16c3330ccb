"""What is shown of each question: what the model writes after each thought, holds in it, and looks at."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coconut.analysis.attention import attention_to_question
from coconut.analysis.interventions import Intervened
from coconut.analysis.layout import layered_positions
from coconut.analysis.probes import belief_over_nodes, decode_thoughts, node_token_ids
from coconut.analysis.traces import lay_out, trace
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.evaluation.reading import given_pages
from coconut.evaluation.subject import Subject
from coconut.types import Example

ROWS_TRACED = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readings:
    """What thoughts hold, question by question.

    Attributes:
      written: for each number of thoughts from 0 on, the text of each question, and whether it is right.
      beliefs: ``[K + 1, N]`` of each question's nodes, what would be written next after each number of thoughts; None
        for a question without a graph in symbols.
      lens: of each thought of each question, tokens with their probabilities.
      attention: ``[L, K, P]`` of each question, of each thought to the question's tokens, mean over heads.
      tokens: of each question.
    """

    written: list[tuple[list[str], list[bool]]]
    beliefs: list[np.ndarray | None]
    lens: list[list[list[tuple[str, float]]]]
    attention: list[np.ndarray]
    tokens: list[list[str]]


def read_questions(
    subject: Subject,
    examples: Sequence[Example],
    config: AnswerConfig,
    intervened: Intervened,
    *,
    top: int,
    advance: Callable[[int], None],
) -> Readings:
    """Reads the thoughts of all questions.

    Args:
      subject: the model, and how it is asked.
      examples: the questions.
      config: how they are answered.
      intervened: their thoughts.
      top: tokens of each thought.
      advance: called with the number of questions after each batch: ``K + 3`` times for each of them.
    """
    tokenized = [subject.tokenize(example) for example in examples]
    most = max(map(len, intervened.thoughts))
    written = []
    for count in range(most + 1):
        asked = dataclasses.replace(config, thoughts=count)
        texts = [x.text for x in answer_questions(*subject.asked, tokenized, asked, advance=advance)]
        right = [subject.task.check(text, example) for text, example in zip(texts, examples, strict=True)]
        written.append((texts, right))
    beliefs = []
    for example in examples:
        beliefs.append(_belief(subject, example, most))
        advance(1)
    attention = _attention(subject, examples, intervened.thoughts, advance)
    return Readings(
        written=written,
        beliefs=beliefs,
        lens=[decode_thoughts(subject.model, subject.tokenizer, own, top) for own in intervened.thoughts],
        attention=attention,
        tokens=[[subject.tokenizer.token(token) for token in example.question] for example in tokenized],
    )


def _belief(subject: Subject, example: Example, most: int) -> np.ndarray | None:
    """What would be written next, as a distribution over the graph's nodes."""
    if example.graph is None:
        return None
    try:
        node_token_ids(subject.tokenizer, example.graph)
    except CoconutError:
        return None  # Names of several tokens.
    return belief_over_nodes(*subject.asked, example, subject.tokenize(example), subject.text_format, most, forced="")


def _attention(
    subject: Subject, examples: Sequence[Example], thoughts: Sequence[np.ndarray], advance: Callable[[int], None]
) -> list[np.ndarray]:
    pages = given_pages(subject.method, subject.placing, [subject.tokenize(example) for example in examples])
    rows, found = lay_out(pages, subject.tokenizer, thoughts), []
    size = min(ROWS_TRACED, len(examples))
    for traced in trace(subject.model.decoder, rows, batch_size=size):
        own = rows.take(slice(len(found), len(found) + len(traced.columns)))
        found += [weights.mean(1) for weights in attention_to_question(own, traced)]
        advance(len(own))
    return found


def show_question(index: int, example: Example, intervened: Intervened, readings: Readings) -> dict[str, Any]:
    """What the page shows of a question (`coconut.analysis.page.write_page`)."""
    answer, belief = intervened.answers[index], readings.beliefs[index]
    after = [
        {
            "thoughts": count,
            "text": texts[index],
            "right": right[index],
            "class": None,
            "belief": None if belief is None else belief[count],
        }
        for count, (texts, right) in enumerate(readings.written[: answer.thoughts + 1])
    ]
    return {
        "question": example.question,
        "expected": example.answer,
        "answer": answer.text,
        "right": intervened.right[index],
        "thoughts": answer.thoughts,
        "tokens": readings.tokens[index],
        "after": after,
        "lens": readings.lens[index],
        "attention": {"layers": readings.attention[index]},
        "interventions": {
            outcome.intervention.label: {
                "text": outcome.texts[index],
                "right": outcome.right[index],
                "flipped": outcome.flipped[index],
            }
            for outcome in intervened.outcomes
            if outcome.texts[index] is not None
        },
        "graph": None if belief is None else _graph(example),
    }


def _graph(example: Example) -> Mapping[str, Any]:
    graph = example.graph
    assert graph is not None
    places = layered_positions(graph)
    return {
        "symbols": list(graph.symbols),
        "edges": [list(edge) for edge in graph.edges],
        "root": graph.root,
        "target": graph.target,
        "negative": graph.negative,
        "positions": [places[node] for node in range(len(graph.symbols))],
    }
