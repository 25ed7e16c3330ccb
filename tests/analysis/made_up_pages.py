"""Content for the page of one run, made up: as it would be, but of no model."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coconut.analysis.layout import layered_positions
from coconut.evaluation.evaluate import wilson_interval
from coconut.tasks import small_graphs
from coconut.tasks.graphs import distances
from coconut.types import Example

INTERVENTIONS = ("noise (all)", "mean (all)", "another question's (all)", "noise (2)")
Question = dict[str, Any]


def graph_content(count: int, *, seed: int = 0, thoughts: int = 3, graphs: int = 2) -> dict[str, Any]:
    """Questions over small graphs, with beliefs that move down from the root by one hop a thought."""
    random_numbers = np.random.default_rng(seed)
    drawn = random.Random(seed)
    # Few graphs: their layout takes the most time by far where every call is checked.
    drawings = [
        (example, layered_positions(example.graph))
        for example in small_graphs.generate(graphs, seed=seed, config="e12_matched")
        if example.graph is not None
    ]
    questions = [_graph_question(*drawings[index % graphs], thoughts, random_numbers, drawn) for index in range(count)]
    return _content("Inside a thought: Coconut on small graphs", "small_graphs", questions, drawn)


def _graph_question(
    example: Example,
    places: Mapping[int, tuple[float, float]],
    thoughts: int,
    random_numbers: np.random.Generator,
    drawn: random.Random,
) -> Question:
    graph = example.graph
    assert graph is not None
    depth = distances(graph, graph.root)
    right = drawn.random() < 0.85
    end = graph.target if right else graph.negative
    after = []
    for count in range(thoughts + 1):
        logits = random_numbers.normal(0, 0.7, len(graph.symbols))
        for node, hops in depth.items():
            logits[node] += 3.5 * (hops == count)
        logits[end] += 1.6 * count
        belief = np.exp(logits) / np.exp(logits).sum()
        best = int(belief.argmax())
        kind = "right option" if best == graph.target else "wrong option" if best == graph.negative else "another node"
        after.append(
            {
                "thoughts": count,
                "text": graph.symbols[best],
                "right": best == graph.target,
                "class": kind,
                "belief": belief,
            }
        )
    tokens = example.question.split()
    lens = [
        [[graph.symbols[node], belief[node]] for node in np.argsort(-belief)[:5]]
        for belief in (held["belief"] for held in after[1:])
    ]
    return {
        "question": example.question,
        "expected": graph.symbols[graph.target],
        "answer": graph.symbols[end],
        "right": right,
        "thoughts": thoughts,
        "tokens": tokens,
        "after": after,
        "lens": lens,
        "attention": _attention(thoughts, len(tokens), random_numbers),
        "interventions": _interventions(
            right, graph.symbols[end], lambda: graph.symbols[drawn.choice([graph.target, graph.negative])], drawn
        ),
        "graph": {
            "symbols": graph.symbols,
            "edges": graph.edges,
            "root": graph.root,
            "target": graph.target,
            "negative": graph.negative,
            "positions": [places[node] for node in range(len(graph.symbols))],
        },
    }


def text_content(count: int, *, seed: int = 0, thoughts: int = 6) -> dict[str, Any]:
    """Word problems with numbers as answers."""
    random_numbers = np.random.default_rng(seed)
    drawn = random.Random(seed)
    questions = [_text_question(thoughts, random_numbers, drawn) for _ in range(count)]
    return _content("Inside a thought: Coconut on GSM8K", "gsm8k", questions, drawn)


def _text_question(thoughts: int, random_numbers: np.random.Generator, drawn: random.Random) -> Question:
    name = drawn.choice(["Mina", "Ali", "Joana", "Piet", "Chidi", "Sora"])
    boxes, each, price = drawn.randint(2, 9), drawn.randint(3, 12), drawn.randint(2, 5)
    question = (
        f"{name} packs {boxes} boxes of {each} pears every morning and sells each pear for ${price} at the market. "
        f"On the way there, {drawn.randint(1, 3)} of the boxes fall off the cart and are lost. "
        f"How many dollars does {name} take home that day?"
    )
    expected = str((boxes - 1) * each * price)
    right = drawn.random() < 0.4
    answer = expected if right else str(boxes * each * price)
    known = [str(boxes * each), str(price), str((boxes - 1) * each), answer, expected, name]
    after = [
        {"thoughts": count, "text": text, "right": text == expected, "class": None, "belief": None}
        for count in range(thoughts + 1)
        for text in [answer if count > 3 else drawn.choice(known[:3])]
    ]
    lens = []
    for _ in range(thoughts):
        shares = np.sort(random_numbers.dirichlet(np.full(12, 0.5)))[::-1]
        words = drawn.sample([*dict.fromkeys(known), " the", " pears", "\n", " $", " times", " boxes"], 8)
        lens.append([[word, share] for word, share in zip(words, shares, strict=False)])
    tokens = [f" {word}" if index else word for index, word in enumerate(question.split())]
    return {
        "question": question,
        "expected": expected,
        "answer": answer,
        "right": right,
        "thoughts": thoughts,
        "tokens": tokens,
        "after": after,
        "lens": lens,
        "attention": _attention(thoughts, len(tokens), random_numbers),
        "interventions": _interventions(right, answer, lambda: drawn.choice(known), drawn),
        "graph": None,
    }


def _attention(thoughts: int, tokens: int, random_numbers: np.random.Generator) -> dict[str, Any]:
    weights = 0.8 * random_numbers.dirichlet(np.full(tokens, 0.15), size=(2, thoughts))
    return {"layers": weights}


def _interventions(right: bool, answer: str, other: Callable[[], str], drawn: random.Random) -> Question:
    results = {}
    for name in INTERVENTIONS:
        text = other() if drawn.random() < 0.3 else answer
        results[name] = {"text": text, "right": right and text == answer, "flipped": text != answer}
    return results


def _content(title: str, task: str, questions: Sequence[Question], drawn: random.Random) -> dict[str, Any]:
    count, correct = len(questions), sum(question["right"] for question in questions)
    effects = []
    for name in INTERVENTIONS:
        results = [question["interventions"][name] for question in questions]
        right, flips = (sum(result[field] for result in results) for field in ("right", "flipped"))
        effects.append(
            {
                "name": name.split(" (")[0],
                "thoughts": name.split("(")[1].rstrip(")"),
                "later": "made again" if "2" in name else "kept",
                "examples": count,
                "accuracy": right / count,
                "interval_95": wilson_interval(right, count),
                "accuracy_before": correct / count,
                "flips": flips / count,
                "flips_interval_95": wilson_interval(flips, count),
                "p_value": drawn.choice([0.00002, 0.034, 0.61]),
                "log_probability_change": -drawn.random(),
                "kl": drawn.random(),
            }
        )
    return {
        "title": title,
        "run": {
            "method": "coconut",
            "task": task,
            "split": "test",
            "seed": 0,
            "step": 12000,
            "stage": 3,
            "commit": "48449ac",
            "command": f"coconut inspect runs/{task} --split test --examples {count} --interventions noise,mean",
        },
        "measures": {
            "examples": count,
            "correct": correct,
            "accuracy": correct / count,
            "interval_95": wilson_interval(correct, count),
        },
        "interventions": effects,
        "figures": None,
        "questions": questions,
    }
