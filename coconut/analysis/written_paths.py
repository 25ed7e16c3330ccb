"""What a model writes of a graph question after some thoughts: which kind of path, or which answer without one.

Hao et al. (2024, arXiv 2412.06769, section 4.1) let a model think ``k`` thoughts and write on by itself, and sort what
it writes: a shortest path, a longer one, one with an edge that does not exist, one that ends elsewhere, or an answer
alone. A path behind thoughts is only the rest of one, and is judged by the path that it completes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.evaluation.evaluate import wilson_interval
from coconut.evaluation.subject import Subject
from coconut.tasks.graph_form import ANSWER, CANDIDATES, EDGE_END, ROOT, START
from coconut.tasks.graphs import distances, walk_ends
from coconut.tasks.prosqa import read_statement
from coconut.tokenizers import TextFormat
from coconut.types import Example, Graph

OutputClass = Literal[
    "correct_path", "longer_path", "wrong_target", "hallucination", "correct_label", "incorrect_label", "other"
]
OUTPUT_CLASSES: tuple[OutputClass, ...] = get_args(OutputClass)

_MARKS = (START, EDGE_END, CANDIDATES, ROOT, ANSWER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A written output, read.

    Attributes:
      path: names of the nodes of the written path in order, its start included where the form writes it; empty where no
        path is written; None where what stands before the answer cannot be read, or is no single chain of words.
      joined: whether each sentence goes on from where the one before it ended; a path in symbols always does.
      starts: whether the first of the names is where the path starts, as in sentences. In the symbol form a step is
        the child alone, so that the first name is one edge further.
      label: the node named as the answer; empty where no answer is written; None where it cannot be read.
    """

    path: tuple[str, ...] | None
    joined: bool
    starts: bool
    label: str | None


def read_output(text: str, text_format: TextFormat) -> Written:
    """Takes a written output apart: the path, and the answer behind the answer's mark.

    Args:
      text: what was written, without EOS and markers.
      text_format: how the task writes an answer. The mark ``[A]`` means the symbol form (a node for each step), any
        other one ProsQA's sentences.

    Raises:
      CoconutError: the text format marks no answer, so that it cannot be told from a step.
    """
    mark = text_format.answer_prefix.strip()
    if not mark:
        raise CoconutError(
            f"answer_prefix = {text_format.answer_prefix!r}: an answer needs a mark to be told from steps"
        )
    steps, found, answer = text.partition(mark)
    if mark == ANSWER:
        path, names = tuple(steps.split()), answer.split()
        readable = not any(name in _MARKS for name in path)
        label = names[0] if len(names) == 1 and names[0] not in _MARKS else None
        return Written(path=path if readable else None, joined=True, starts=False, label=label if found else "")
    statements, answered = _statements(steps), _statements(answer)
    pairs = [statement for statement in statements if statement]
    label = answered[0][1] if len(answered) == 1 and answered[0] else None
    return Written(
        path=None if len(pairs) < len(statements) else (*(pair[0] for pair in pairs[:1]), *(pair[1] for pair in pairs)),
        joined=all(before[1] == after[0] for before, after in itertools.pairwise(pairs)),
        starts=True,
        label=label if found else "",
    )


def classify_output(
    example: Example, text: str, text_format: TextFormat, *, hidden_steps: int | None = 0
) -> OutputClass:
    """Sorts what was written of a graph question.

    A path is judged by itself, whatever answer follows it; an answer counts only where no path is written.

    ========================  =======================================================================================
    ``correct_path``          completed, a shortest path from the root to the target
    ``longer_path``           completed, a path from the root to the target that is longer
    ``wrong_target``          all its edges exist, and it ends at another node than the target (also on the way to it)
    ``hallucination``         an edge or a node that does not exist, sentences that are not joined, or a start that the
                              thoughts before it cannot have led to
    ``correct_label``         no path, and the answer is the target
    ``incorrect_label``       no path, and the answer is anything else that has the form of one
    ``other``                 nothing, words that are no steps, a sentence that breaks off, or no readable answer
    ========================  =======================================================================================

    Args:
      example: the question, with its graph.
      text: what was written, without EOS and markers.
      text_format: how the task writes steps and answers (`read_output`).
      hidden_steps: edges that thoughts took before the first written one, so that the path starts where a walk of
        exactly so many edges from the root ends; None for any number: whatever walk completes the path, the shortest
        one first, as the paper has it.

    Raises:
      CoconutError: the example has no graph, ``hidden_steps`` is negative, or the text format marks no answer.
    """
    graph = example.graph
    if graph is None:
        raise CoconutError(f"the question has no graph to find paths in: {example.question!r:.80}")
    if hidden_steps is not None and hidden_steps < 0:
        raise CoconutError(f"hidden_steps = {hidden_steps}: must be None or at least 0")
    written = read_output(text, text_format)
    if written.path is None:
        return "other"
    if not written.path:
        if not written.label:
            return "other"
        return "correct_label" if written.label == graph.symbols[graph.target] else "incorrect_label"
    ids = {name: node for node, name in enumerate(graph.symbols)}
    if not written.joined or not all(name in ids for name in written.path):
        return "hallucination"
    path = [ids[name] for name in written.path]
    before = _hops_before(graph, path[0], written.starts, hidden_steps)
    edges = set(graph.edges)
    if before is None or not all(edge in edges for edge in itertools.pairwise(path)):
        return "hallucination"
    if path[-1] != graph.target:
        return "wrong_target"
    shortest = distances(graph, graph.root)[graph.target]
    return "correct_path" if before + len(path) - 1 == shortest else "longer_path"


def _statements(text: str) -> list[tuple[str, str] | None]:
    """What each sentence says; None for one that is no statement, and for what breaks off before a full stop."""
    *sentences, rest = text.split(".")
    return [*(read_statement(sentence.strip()) for sentence in sentences), *([None] if rest.strip() else [])]


def _hops_before(graph: Graph, first: int, starts: bool, hidden_steps: int | None) -> int | None:
    """Edges from the root to the first named node, that node's own included; None where it cannot stand there."""
    own = 0 if starts else 1
    if hidden_steps is not None:
        return hidden_steps + own if first in walk_ends(graph, hidden_steps + own) else None
    hops = distances(graph, graph.root)
    # In the symbol form the root itself is no step, unless a cycle leads back to it; no task here makes any.
    return hops[first] if hops.get(first, -1) >= own else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputCounts:
    """How often what was written.

    Attributes:
      counts: by class, outputs.
      right: by class, how many of them also give the right answer by the task's own rule: a path may end in one answer
        and be followed by another.
    """

    counts: Mapping[OutputClass, int]
    right: Mapping[OutputClass, int]

    @property
    def number(self) -> int:
        """All outputs: each question wrote exactly one."""
        return sum(self.counts.values())

    def share(self, name: OutputClass) -> float:
        """Share of a class among all outputs."""
        return self.counts[name] / self.number

    def interval(self, name: OutputClass) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson_interval(self.counts[name], self.number)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "number": self.number,
            "classes": {
                name: {
                    "count": self.counts[name],
                    "share": self.share(name),
                    "interval_95": list(self.interval(name)),
                    "right_answers": self.right[name],
                }
                for name in OUTPUT_CLASSES
            },
        }


def count_classes(classes: Sequence[OutputClass], right: Sequence[bool]) -> OutputCounts:
    """Counts outputs that were sorted already.

    Args:
      classes: of each output.
      right: whether it gives the right answer by the task's own rule.
    """
    counts, of_right = (dict.fromkeys(OUTPUT_CLASSES, 0) for _ in range(2))
    for name, is_right in zip(classes, right, strict=True):
        counts[name] += 1
        of_right[name] += is_right
    return OutputCounts(counts=counts, right=of_right)


def count_outputs(
    subject: Subject,
    examples: Sequence[Example],
    thoughts: Sequence[int],
    config: AnswerConfig,
    *,
    exact: bool = True,
    record: Callable[[int, int, str, OutputClass], None] = lambda thoughts, example, text, name: None,
) -> dict[int, OutputCounts]:
    """Lets a model think each number of thoughts and write on by itself, and sorts what it writes.

    Of a model whose stages were not mixed in training (``CurriculumConfig.uniform_prob``) mind that it has seen no
    fewer thoughts than its last stage has, for thousands of steps.

    Args:
      subject: who is asked.
      examples: graph questions.
      thoughts: the numbers of thoughts.
      config: how questions are answered; its ``thoughts`` are set here. Nothing may be forced.
      exact: thoughts stand for as many steps as the curriculum lets them replace (``k / c_thought``, rounded down), and
        a path has to start there; else for any number (`classify_output`).
      record: called with the number of thoughts, the index of the example, what was written, and its class.

    Returns:
      By number of thoughts.

    Raises:
      CoconutError: there are no questions, one has no graph, a text is forced, or the model has no place for thoughts.
    """
    if not examples:
        raise CoconutError("there are no questions whose outputs could be counted")
    for index, example in enumerate(examples):
        if example.graph is None:
            raise CoconutError(f"question {index} has no graph to find paths in: {example.question!r:.80}")
    if config.forced:
        raise CoconutError(f"AnswerConfig.forced = {config.forced!r}: here the model writes on by itself")
    tokenized = [subject.tokenize(example) for example in examples]
    by_thoughts = {}
    for number in thoughts:
        hidden = number // subject.placing.curriculum.c_thought if exact else None
        classes, right = [], []
        answers = answer_questions(*subject.asked, tokenized, dataclasses.replace(config, thoughts=number))
        for answer in answers:
            example = examples[answer.example]
            name = classify_output(example, answer.text, subject.text_format, hidden_steps=hidden)
            classes.append(name)
            right.append(subject.task.check(answer.text, example))
            record(number, answer.example, answer.text, name)
        by_thoughts[number] = count_classes(classes, right)
    return by_thoughts
