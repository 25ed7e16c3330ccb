"""How much of ProntoQA can be answered without following a rule, and what its questions are made of."""

from collections.abc import Callable, Iterable, Mapping

from coconut.tasks.ontology import Question, Statement, read_question
from coconut.tasks.statistics import Accuracy, Marginal, accuracies, marginals
from coconut.types import Example


def statistics(examples: Iterable[Example]) -> dict[str, Marginal]:
    """The distribution of every property by which two sets of ProntoQA questions can be compared.

    Raises:
      CoconutError: if there are no examples, or one is no question of ProntoQA.
    """
    return marginals(map(_measure, examples))


def shortcut_accuracies(examples: Iterable[Example]) -> dict[str, Accuracy]:
    """Accuracy of every rule of `RULES`.

    Raises:
      CoconutError: if there are no examples, or one is no question of ProntoQA.
    """
    points = dict.fromkeys(RULES, 0.0)
    count = 0
    for example in examples:
        question = read_question(example.question)
        count += 1
        for name, rule in RULES.items():
            verdict = rule(question)
            points[name] += 0.5 if verdict is None else float(verdict == (example.answer == "True"))
    return accuracies(points, count)


def _measure(example: Example) -> dict[str, list[int]]:
    question = read_question(example.question)
    is_a = sum(rule.is_a for rule in question.rules)
    return {
        "facts and rules": [len(question.rules) + len(question.facts)],
        "is-a facts and rules": [is_a + len(question.facts)],
        "property rules": [len(question.rules) - is_a],
        "concepts": [len({rule.subject for rule in question.rules} | _concepts(question))],
        "rules with the queried property": [len(_with_queried_property(question))],
        "negated property rules": [sum(rule.negated for rule in question.rules)],
        "negated queries": [int(question.query.negated)],
        "answers that are True": [int(example.answer == "True")],
    }


def _concepts(question: Question) -> set[str]:
    return {statement.predicate for statement in (*question.rules, *question.facts) if statement.is_a}


def _with_queried_property(question: Question) -> list[Statement]:
    return [rule for rule in question.rules if rule.predicate == question.query.predicate]


def _named_more_often(question: Question) -> bool | None:
    """Believes the rule whose concept is named in more sentences."""

    def mentions(rule: Statement) -> int:
        statements = (*question.rules, *question.facts)
        return sum(rule.subject in (statement.subject, statement.predicate) for statement in statements)

    best = max((mentions(rule) for rule in _with_queried_property(question)), default=0)
    return _believe([rule for rule in _with_queried_property(question) if mentions(rule) == best], question)


def _said_first(question: Question) -> bool | None:
    """Believes the rule that comes first."""
    return _believe(_with_queried_property(question)[:1], question)


def _affirmative(question: Question) -> bool | None:
    """Believes whatever is asked without ``not``."""
    return not question.query.negated


def _believe(rules: list[Statement], question: Question) -> bool | None:
    verdicts = {rule.negated == question.query.negated for rule in rules}
    return verdicts.pop() if len(verdicts) == 1 else None


RULES: Mapping[str, Callable[[Question], bool | None]] = {
    "the property's concept named in more sentences": _named_more_often,
    "the property's rule said first": _said_first,
    "what is asked without 'not' is true": _affirmative,
    "always True": lambda _: True,
}
"""Each rule says whether the queried statement is true; None where it cannot decide."""
