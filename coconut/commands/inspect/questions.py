"""What is shown of each question: what the model writes after each thought, holds in it, and looks at."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coconut.analysis.attention import attention_to_question
from coconut.analysis.interventions import Intervened
from coconut.analysis.layout import layered_positions
from coconut.analysis.lens import decode_thoughts
from coconut.analysis.search_tree import graph_of, node_values, text_values
from coconut.analysis.traces import lay_out, trace
from coconut.analysis.written_paths import OutputClass, classify_output
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.evaluation.reading import given_pages
from coconut.evaluation.subject import Subject
from coconut.latent.feedback import draws
from coconut.tasks.graph_form import ANSWER
from coconut.types import Example

ROWS_TRACED = 16
STEP_BEGINS = "Every "
"""What ProsQA's sentences begin with (Hao et al. 2024, section 5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readings:
    """What thoughts hold, question by question.

    Attributes:
      written: for each number of thoughts from 0 on, the text of each question, and whether it is right.
      classes: for each number of thoughts, what each question's text is (`coconut.analysis.written_paths`); None where
        questions have no graph.
      hidden_steps: the written steps that each number of thoughts stands for.
      values: ``[K + 1, N]`` of each question, how likely each node of its graph is to be named as the next step
        (`coconut.analysis.search_tree`); None where questions have no graph, or thoughts are drawn.
      beliefs: the same, or as the answer behind no further step.
      in_symbols: whether the questions are graphs in symbols.
      lens: of each thought of each question, tokens with their probabilities.
      attention: ``[L, K, P]`` of each question, of each thought to the question's tokens, mean over heads.
      tokens: of each question.
    """

    written: list[tuple[list[str], list[bool]]]
    classes: list[list[OutputClass]] | None
    hidden_steps: list[int]
    values: list[np.ndarray] | None
    beliefs: list[np.ndarray] | None
    in_symbols: bool
    lens: list[list[list[tuple[str, float]]]]
    attention: list[np.ndarray]
    tokens: list[list[str]]

    @property
    def levels_ahead(self) -> int:
        """How far below the thoughts so far the nodes of ``values`` are: in symbols the next step names a child."""
        return int(self.in_symbols)


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
      advance: called with a number of questions: ``K + 3`` times for each of them.
    """
    tokenized = [subject.tokenize(example) for example in examples]
    most = max(map(len, intervened.thoughts))
    written = []
    for count in range(most + 1):
        asked = dataclasses.replace(config, thoughts=count)
        texts = [x.text for x in answer_questions(*subject.asked, tokenized, asked, advance=advance)]
        right = [subject.task.check(text, example) for text, example in zip(texts, examples, strict=True)]
        written.append((texts, right))
    graphs = all(example.graph is not None for example in examples)
    in_symbols = graphs and subject.text_format.answer_prefix.strip() == ANSWER
    values = beliefs = None
    hidden_steps = [number // subject.placing.curriculum.c_thought for number in range(most + 1)]
    classes: list[list[OutputClass]] | None = None
    # A feedback that draws has no one value.
    if graphs and not draws(subject.model.feedback):
        values, beliefs = _values(subject, examples, range(most + 1), in_symbols, config.batch_size)
    if graphs:
        classes = [
            [
                classify_output(example, text, subject.text_format, hidden_steps=steps)
                for text, example in zip(texts, examples, strict=True)
            ]
            for steps, (texts, _) in zip(hidden_steps, written, strict=True)
        ]
    advance(len(examples))
    attention = _attention(subject, examples, intervened.thoughts, advance)
    return Readings(
        written=written,
        classes=classes,
        hidden_steps=hidden_steps,
        values=values,
        beliefs=beliefs,
        in_symbols=in_symbols,
        lens=[decode_thoughts(subject.model, subject.tokenizer, own, top) for own in intervened.thoughts],
        attention=attention,
        tokens=[[subject.tokenizer.token(token) for token in example.question] for example in tokenized],
    )


def _values(
    subject: Subject, examples: Sequence[Example], numbers: Sequence[int], in_symbols: bool, batch_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """How likely each node is to be named next, as a step; and as a step or as the answer.

    In sentences the paper's way: the model is made to begin a step, and asked whom it is about. No answer begins so.
    """
    if not in_symbols:
        values = node_values(subject, examples, numbers, forced=STEP_BEGINS, batch_size=batch_size)
        return values, values
    symbols = [graph_of(example).symbols for example in examples]
    prefix = subject.text_format.answer_prefix
    texts = [[*names, *(prefix + name for name in names)] for names in symbols]
    both = text_values(subject, examples, texts, numbers, batch_size=batch_size)
    steps = [own[:, : len(names)] for own, names in zip(both, symbols, strict=True)]
    return steps, [own[:, : len(x)] + own[:, len(x) :] for own, x in zip(both, symbols, strict=True)]


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
    answer = intervened.answers[index]
    belief = None if readings.beliefs is None else readings.beliefs[index]
    after = [
        {
            "thoughts": count,
            "text": texts[index],
            "right": right[index],
            "class": None if readings.classes is None else readings.classes[count][index].replace("_", " "),
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
