"""The sentences of ProntoQA's made-up ontologies, and what follows from them.

A rule is ``Every X is a Y.``, ``Each X is a Y.`` or ``Xs are Ys.``, a fact ``Name is an X.``; in place of a concept
either may give a property (``Every X is red.``), and any of them may say ``not``. Concepts end in ``pus``. In
symbols all that is left of either is subject, perhaps ``not``, and predicate: ``X Y.``, ``Name not red.``
"""

import dataclasses
import functools
import re

from coconut.errors import CoconutError
from coconut.types import Example

QUERY = "True or false: "
"""What precedes the statement a question asks about."""

FORMS = ("Xs are", "Every X is", "Each X is")
"""The ways to word a rule."""

SYMBOLS = "X"
"""The form of rules and facts without words."""

_RULE = re.compile(r"(?:Every|Each) (\S+) is (not )?(an? )?(\S+)\.")
_PLURAL_RULE = re.compile(r"(\S+pus)es are (not )?(\S+)\.")
_FACT = re.compile(r"(\S+) is (not )?(an? )?(\S+)\.")
_SYMBOLS = re.compile(r"(\S+) (not )?(\S+)\.")
_SENTENCE_END = re.compile(r"(?<=\.) ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """What a sentence says.

    Attributes:
      subject: a concept, or the name of an individual.
      predicate: a concept or a property.
      negated: whether the subject is said *not* to be that.
      is_rule: whether the subject is a concept.
      is_a: whether the predicate is a concept.
    """

    subject: str
    predicate: str
    negated: bool = False
    is_rule: bool
    is_a: bool

    def of(self, subject: str) -> "Statement":
        """What the statement says of an individual it applies to."""
        return dataclasses.replace(self, subject=subject, is_rule=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question taken apart.

    Attributes:
      rules: the rules, in the order of their sentences.
      facts: the facts, likewise.
      query: what is asked: is it true or false?
    """

    rules: tuple[Statement, ...]
    facts: tuple[Statement, ...]
    query: Statement


def write_statement(statement: Statement, form: str = FORMS[0]) -> str:
    """The sentence that makes a statement; ``form`` is `SYMBOLS` or one of `FORMS`, which are no matter for a fact."""
    subject, predicate = statement.subject, statement.predicate
    negation = "not " if statement.negated else ""
    if form == SYMBOLS:
        return f"{subject} {negation}{predicate}."
    if statement.is_rule and form == "Xs are":
        return f"{subject.capitalize()}es are {negation}{predicate}{'es' * statement.is_a}."
    article = ("an " if predicate[0] in "aeiou" else "a ") if statement.is_a else ""
    start = form.replace("X", subject) if statement.is_rule else f"{subject} is"
    return f"{start} {negation}{article}{predicate}."


@functools.lru_cache(maxsize=1 << 16)  # A file holds few different sentences, each many times.
def read_statement(sentence: str) -> Statement:
    """The inverse of `write_statement`, for every form.

    Raises:
      CoconutError: if the sentence is none of ProntoQA's.
    """
    if match := _RULE.fullmatch(sentence):
        subject, negation, article, predicate = match.groups()
        return Statement(subject=subject, predicate=predicate, negated=bool(negation), is_rule=True, is_a=bool(article))
    if match := _PLURAL_RULE.fullmatch(sentence):
        subject, negation, predicate = match.groups()
        is_a = predicate.endswith("puses")
        return Statement(
            subject=subject.lower(),
            predicate=predicate.removesuffix("es") if is_a else predicate,
            negated=bool(negation),
            is_rule=True,
            is_a=is_a,
        )
    if match := _FACT.fullmatch(sentence):
        subject, negation, article, predicate = match.groups()
        return Statement(
            subject=subject, predicate=predicate, negated=bool(negation), is_rule=False, is_a=bool(article)
        )
    if match := _SYMBOLS.fullmatch(sentence):
        subject, negation, predicate = match.groups()
        is_rule, is_a = subject.endswith("pus"), predicate.endswith("pus")
        return Statement(subject=subject, predicate=predicate, negated=bool(negation), is_rule=is_rule, is_a=is_a)
    raise CoconutError(f"not a sentence of ProntoQA: {sentence!r}")


def read_question(question: str) -> Question:
    """Takes a question apart.

    Raises:
      CoconutError: if it has no query, or a sentence that is none of ProntoQA's.
    """
    context, mark, query = question.rpartition(QUERY)
    if not mark or not context.endswith(" "):
        raise CoconutError(f"not a ProntoQA question: nothing after {QUERY!r} in {question[-80:]!r}")
    statements = [read_statement(sentence) for sentence in _SENTENCE_END.split(context.removesuffix(" "))]
    return Question(
        rules=tuple([statement for statement in statements if statement.is_rule]),
        facts=tuple([statement for statement in statements if not statement.is_rule]),
        query=read_statement(query),
    )


def deduce(question: Question) -> str:
    """Answers a question by applying its rules until nothing new follows.

    Returns:
      ``True`` or ``False``.

    Raises:
      CoconutError: if neither the queried statement nor its negation follows, or both do.
    """
    known: set[Statement] = set()
    new = set(question.facts)
    while new:
        known |= new
        concepts = {(fact.subject, fact.predicate) for fact in new if fact.is_a and not fact.negated}
        new = {
            rule.of(subject) for subject, concept in concepts for rule in question.rules if rule.subject == concept
        } - known
    query = question.query
    opposite = dataclasses.replace(query, negated=not query.negated)
    if (query in known) == (opposite in known):
        which = "both" if query in known else "neither"
        raise CoconutError(f"{which} of {write_statement(query)!r} and {write_statement(opposite)!r} follow")
    return str(query in known)


def verify(example: Example) -> None:
    """Checks that the steps prove the answer: a stated fact, then by turns a stated rule and what it gives.

    Raises:
      CoconutError: saying which sentence of the steps is wrong, or that the answer is not what follows.
    """
    question = read_question(example.question)
    deduced = deduce(question)
    if example.answer != deduced:
        raise CoconutError(f"the answer must be {deduced!r}, got {example.answer!r}")
    chain = [read_statement(sentence) for step in example.written_steps for sentence in _SENTENCE_END.split(step)]
    if not chain or chain[0] not in question.facts:
        raise CoconutError(f"the steps must start from a stated fact, got {example.written_steps[:1]!r}")
    current = chain[0]
    for rule, conclusion in zip(chain[1::2], chain[2::2], strict=len(chain) % 2 == 1):
        if rule not in question.rules:
            raise CoconutError(f"the steps use a rule that is not stated: {write_statement(rule)!r}")
        if rule.subject != current.predicate or not current.is_a or current.negated:
            raise CoconutError(
                f"the steps apply {write_statement(rule)!r}, but had only shown {write_statement(current)!r}"
            )
        if conclusion != rule.of(current.subject):
            raise CoconutError(f"the steps conclude {write_statement(conclusion)!r} from {write_statement(rule)!r}")
        current = conclusion
    if len(chain) % 2 == 0:
        raise CoconutError(f"the steps end in a rule, not in a conclusion: {write_statement(chain[-1])!r}")
    if current != dataclasses.replace(question.query, negated=question.query.negated == (deduced == "True")):
        raise CoconutError(f"the steps end in {write_statement(current)!r}, which does not give {deduced!r}")
