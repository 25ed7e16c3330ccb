"""What the thoughts of all questions say together: numbers for ``inspect.json``, and figures of them.

What is measured depends on the questions: those with a graph get a search tree, those in symbols also the measures of
reasoning by superposition, and all whose written steps have results are searched for traces of these. Of a model with
experts it is measured which ones thoughts use.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from coconut.analysis.expert_plots import plot_expert_distances, plot_expert_shares
from coconut.analysis.experts import chosen_experts, column_kinds, expert_use
from coconut.analysis.geometry import geometry
from coconut.analysis.gold_results import gold_results, gold_traces, result_tokens
from coconut.analysis.interventions import Intervened
from coconut.analysis.lens import top_tokens
from coconut.analysis.matrix_plot import plot_matrices
from coconut.analysis.patching import patch_thoughts, with_other_questions
from coconut.analysis.probes import node_token_ids, thought_neighbors
from coconut.analysis.search_tree import (
    Candidates,
    candidates_at,
    cumulative_values,
    graph_of,
    percentile_curves,
    values_by_height,
)
from coconut.analysis.search_tree_plots import plot_output_classes, plot_percentile_curves, plot_values_by_height
from coconut.analysis.superposition import edge_attention, edge_attention_by_group, histograms_by_group
from coconut.analysis.superposition_plots import plot_edge_attention, plot_histograms
from coconut.analysis.traces import Rows, lay_out
from coconut.analysis.written_paths import count_classes
from coconut.commands.inspect.figures import Drawing
from coconut.commands.inspect.questions import Readings
from coconut.evaluation.reading import given_pages
from coconut.evaluation.subject import Subject
from coconut.pages import Text
from coconut.tasks.graphs import Height, distances
from coconut.tokenizers import TokenizedExample
from coconut.types import Example, Graph

GOLD_AMONG = 10
"""Tokens of each thought among which a result counts as found."""


class Summary(NamedTuple):
    """What all questions say.

    Attributes:
      numbers: as plain values, by what was measured.
      drawings: the figures.
    """

    numbers: dict[str, Any]
    drawings: list[Drawing]


def summarize(
    subject: Subject, examples: Sequence[Example], intervened: Intervened, readings: Readings, batch_size: int
) -> Summary:
    """Measures what can be measured of these questions.

    Args:
      subject: the model, and how it is asked.
      examples: the questions.
      intervened: their thoughts and answers.
      readings: what was read of each.
      batch_size: rows run together.
    """
    parts = [_geometry(intervened), _gold_results(subject, examples, intervened)]
    if readings.classes is not None:
        counts = [len(own) for own in intervened.thoughts]
        parts.append(_outputs(readings))
        if readings.values is not None:
            parts.append(_search_tree(examples, readings, counts))
        # One thought has to stand for one step of the search.
        if readings.in_symbols and len(set(counts)) == 1 and subject.placing.curriculum.c_thought == 1:
            parts.append(_superposition(subject, examples, intervened))
    parts.append(_patching(subject, examples, intervened, batch_size))
    if subject.model.decoder.config.experts is not None:
        parts.append(_experts(subject, examples, intervened, batch_size))
    return Summary(
        {name: value for part in parts for name, value in part.numbers.items()},
        [drawing for part in parts for drawing in part.drawings],
    )


def _geometry(intervened: Intervened) -> Summary:
    found = geometry(intervened.thoughts)
    at_place = {
        "norm": np.nanmean(found.norms, 0),
        "cosine_between_questions": found.cosine_between,
        "distance_between_questions": found.distance_between,
        "effective_rank_between_questions": found.rank_between,
        "questions": found.counts,
    }
    has_pairs = np.isfinite(found.cosine)
    inside = {"questions": int(has_pairs.sum())}
    if has_pairs.any():
        inside |= {
            name: float(np.nanmean(values))
            for name, values in (("cosine", found.cosine), ("distance", found.distance), ("rank", found.rank))
        }
    return Summary({"geometry": {"by_thought": _plain(at_place), "within_a_question": inside}}, [])


def _gold_results(subject: Subject, examples: Sequence[Example], intervened: Intervened) -> Summary:
    """Traces of the written steps' results."""
    tokenizer, decoder = subject.tokenizer, subject.model.decoder
    golds = [result_tokens(tokenizer, gold_results(example)) for example in examples]
    if not any(tokens for gold in golds for tokens in gold):
        return Summary({}, [])
    top = min(GOLD_AMONG, max(1, tokenizer.vocab_size // 10))
    tops = [
        top_tokens(decoder, own, top, vocab_size=tokenizer.vocab_size, normed=True).ids for own in intervened.thoughts
    ]
    answers = [frozenset().union(*result_tokens(tokenizer, [example.answer])) for example in examples]
    found = gold_traces(tops, golds, np.asarray(intervened.right), answers=answers)
    numbers = {
        among: {
            whose: {
                "all_results_found": part.complete._asdict(),
                "share_of_results_found": _plain(part.results._asdict()),
                "by_thought_and_result": _plain(part.by_thought._asdict()),
            }
            for whose, part in traces._asdict().items()
        }
        for among, traces in found.items()
    }
    panels = {"own results": found["all"].own.by_thought, "those of another question": found["all"].control.by_thought}
    drawing = Drawing(
        "gold_results",
        f"Share of questions whose result of a written step is among the {top} most likely tokens of a thought, read "
        "as it is fed through the model's own head; n: questions that have both. Beside it the same with the results "
        "of another question, but for those that the question shares: what is found there is no trace.",
        lambda path: plot_matrices(panels, path, rows="thought", columns="result of step"),
    )
    return Summary({"gold_results": {"among_the_top": top, **numbers}}, [drawing])


def _outputs(readings: Readings) -> Summary:
    """What is written after each number of thoughts, as the paper sorts it."""
    assert readings.classes is not None
    counts = {
        number: count_classes(readings.classes[number], right) for number, (_, right) in enumerate(readings.written)
    }
    drawing = Drawing(
        "outputs",
        "What the model writes after each number of thoughts, nothing forced (Hao et al. 2024, section 4). A path has "
        "to start where the steps end that the thoughts stand for. The interval is that of the right outputs, 95 % "
        "(Wilson).",
        lambda path: plot_output_classes(counts, path),
    )
    return Summary({"outputs": {str(number): own.to_json() for number, own in counts.items()}}, [drawing])


def _search_tree(examples: Sequence[Example], readings: Readings, counts: Sequence[int]) -> Summary:
    """Values of the candidates that a search would be at; ``counts`` are the thoughts of each question."""
    assert readings.values is not None
    by_thoughts: dict[int, list[tuple[Graph, Candidates]]] = {}
    for number, hidden in enumerate(readings.hidden_steps):
        level = hidden + readings.levels_ahead
        # Questions that have so many thoughts, and a step left to write about that level: behind the target is none.
        found = [
            (graph, candidates_at(graph, own[number], level))
            for graph, own, thoughts in zip(map(graph_of, examples), readings.values, counts, strict=True)
            if number <= thoughts and 1 <= level <= distances(graph, graph.root)[graph.target]
        ]
        if any(len(own.nodes) > 1 for _, own in found):
            by_thoughts[number] = found
    if not by_thoughts:
        return Summary({}, [])
    curves = {
        number: percentile_curves(cumulative_values([own for _, own in found])) for number, found in by_thoughts.items()
    }
    curves = {number: own for number, own in curves.items() if own.values.size}
    drawings = []
    if curves:
        drawings.append(
            Drawing(
                "cumulative_values",
                "Value of the best candidate of the search tree, of the best two and the best three together, against "
                "their percentile among the questions that have three (Hao et al. 2024, section 5). Where the curves "
                "lie apart, the model keeps several.",
                lambda path: plot_percentile_curves(curves, path),
            )
        )
    flat = [pair for found in by_thoughts.values() for pair in found]
    numbers = {}
    for kind in get_args(Height):
        found = values_by_height([graph for graph, _ in flat], [own for _, own in flat], kind)
        numbers[kind] = {
            "leads to the target" if leads else "does not": _plain(means._asdict()) for leads, means in found.items()
        }
        drawings.append(
            Drawing(
                f"values_by_{kind}_height",
                f"Value of candidates against their height, the {kind} distance to a leaf; 95 % intervals by a "
                "bootstrap over questions.",
                lambda path, found=found, kind=kind: plot_values_by_height(found, kind, path),
            )
        )
    return Summary({"values_by_height": numbers}, drawings)


def _superposition(subject: Subject, examples: Sequence[Example], intervened: Intervened) -> Summary:
    """The measures of Zhu et al. 2025."""
    graphs = list(map(graph_of, examples))
    layer = subject.model.decoder.config.num_layers - 1
    attention = edge_attention(subject, examples, intervened.thoughts, layer=layer)
    by_group = edge_attention_by_group(attention, graphs)
    products = [
        thought_neighbors(subject.model, own, node_token_ids(subject.tokenizer, graph))
        for own, graph in zip(intervened.thoughts, graphs, strict=True)
    ]
    histograms = histograms_by_group(products, graphs)
    drawings = [
        Drawing(
            "attention_to_edges",
            f"Attention of the last layer ({layer + 1}) to an edge, summed over heads and the edge's three tokens, by "
            "where a breadth-first search would find the edge's source (Zhu et al. 2025); step 0 is the column that "
            "the first thought is made at, step k the k-th thought. 95 % intervals by a bootstrap over questions.",
            lambda path: plot_edge_attention(by_group, path),
        ),
        Drawing(
            "inner_products",
            "Inner products of each thought with the nodes' embeddings, by where a breadth-first search would find the "
            "node (Zhu et al. 2025).",
            lambda path: plot_histograms(histograms, path),
        ),
    ]
    numbers = {group: _plain(means._asdict()) for group, means in by_group.items()}
    return Summary({"attention_to_edges": {"layer": layer, **numbers}}, drawings)


def _patching(subject: Subject, examples: Sequence[Example], intervened: Intervened, batch_size: int) -> Summary:
    """Which state of which thought carries the answer."""
    tokenized = [subject.tokenize(example) for example in examples]
    rows = _answered_rows(subject, tokenized, intervened)
    chosen, corrupted = with_other_questions(rows)
    if not len(chosen):
        return Summary({}, [])
    clean = rows.take(chosen)
    answer = np.zeros(clean.tokens.shape, bool)
    for row, index in enumerate(chosen):
        own, length = np.flatnonzero(clean.text[row]), len(tokenized[index].answer)
        answer[row, own[len(own) - length + tokenized[index].answer_prefix :]] = True
    found = patch_thoughts(
        subject.model.decoder, clean, corrupted, answer, vocab_size=subject.tokenizer.vocab_size, batch_size=batch_size
    )
    if not found.counted.any():
        return Summary({"patching": _plain(found.effect._asdict())}, [])
    drawing = Drawing(
        "patching",
        "Share of the right answer's log-probability that comes back if the state of one thought before one layer is "
        "restored, while question and thoughts are another question's; n: questions where something was lost. "
        "The last row is what the last layer leaves, which nothing reads but the next thought.",
        lambda path: plot_matrices({"restored": found.effect}, path, rows="before layer", columns="thought"),
    )
    return Summary({"patching": _plain(found.effect._asdict())}, [drawing])


def _answered_rows(subject: Subject, tokenized: Sequence[TokenizedExample], intervened: Intervened) -> Rows:
    """What each question is given with, its thoughts, and the right answer behind."""
    pages = [
        (*page, Text(example.answer))
        for page, example in zip(given_pages(subject.method, subject.placing, tokenized), tokenized, strict=True)
    ]
    return lay_out(pages, subject.tokenizer, intervened.thoughts)


def _experts(subject: Subject, examples: Sequence[Example], intervened: Intervened, batch_size: int) -> Summary:
    """Which experts thoughts use, and which ones tokens do."""
    decoder, tokenizer = subject.model.decoder, subject.tokenizer
    config = decoder.config.experts
    assert config is not None
    rows = _answered_rows(subject, [subject.tokenize(example) for example in examples], intervened)
    chosen = chosen_experts(decoder, rows, batch_size=batch_size)
    markers = {"start marker": tokenizer.start_latent_id, "end marker": tokenizer.end_latent_id}
    layers = range(config.first_layer + 1, decoder.config.num_layers + 1)
    use = expert_use(chosen, column_kinds(rows, markers), config.count, layers=layers)
    drawings = [
        Drawing(
            "expert_shares",
            "Share in % of each expert in what the columns of each kind choose (in brackets how many columns), the "
            "right answer written behind the thoughts.",
            lambda path: plot_expert_shares(use, path),
        ),
        Drawing(
            "expert_distances",
            "Distance (total variation) between the shares of experts of thoughts and of tokens; 95 % intervals by a "
            "bootstrap over questions. Beside it that of as many tokens, drawn at random in each question, to the "
            "question's other tokens.",
            lambda path: plot_expert_distances(use, path),
        ),
    ]
    numbers = dataclasses.asdict(use) | {"evenness": _plain(use.evenness)}
    arrays = {name: value for name, value in numbers.items() if isinstance(value, np.ndarray)}
    return Summary({"experts": {**numbers, **_plain(arrays)}}, drawings)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as lists, and None for what is not a number."""
    return {name: _without_nan(np.asarray(value).tolist()) for name, value in values.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
