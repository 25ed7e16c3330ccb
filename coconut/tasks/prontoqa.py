"""ProntoQA: is a statement about an individual true or false, given an ontology? (Saparov and He, arXiv 2210.01240).

`load` reads what the official generator writes; of 10,000 five-hop questions Coconut (arXiv 2412.06769) takes the first
9,000 to train, the next 200 to validate and the rest to test. `generate` draws questions of the same grammar. All
official five-hop questions have one structure, which is drawn here for any number of hops h:

- A chain of h concepts, each but the last a subclass of the next, and the individual an instance of the first.
- Each concept of the chain has a side parent; the last has another one, the root.
- The individual is also an instance of a stray concept, whose parent is a dead end.
- Chain, side parents and stray concept have one property each, no two from one family (of colours, say). The last
  concept's property is asked about.
- One more concept, mentioned nowhere else, has that property with the opposite polarity.
- Rules are shuffled; half say ``Xs are``, a quarter each ``Every X is`` and ``Each X is``. The two facts follow, in
  random order, then the query: with ``not`` or without, so that about half the answers are True.

How often a property is negated was fitted to 9,200 official questions: 1/3, but 3/11 on the chain and 7/15 at its end.
Beyond six hops the official names do not suffice: further ones put syllables before them.

**ProntoQA has a shortcut.** Of the two concepts with the queried property, the chain's is named in four sentences, the
other in that one alone: no rule has to be followed to tell them apart.
"""

import dataclasses
import functools
import itertools
import os
import random
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.fields import read_field, require_object, require_text, require_texts, show_value
from coconut.tasks.ontology import FORMS, QUERY, SYMBOLS, Statement, write_statement
from coconut.tasks.records import BadRecords, load_examples, parse_json, read_each, read_text
from coconut.tasks.sampling import draw_unique
from coconut.tasks.tables import is_table
from coconut.types import Example

ANSWERS = ("True", "False")
# fmt: off
NAMES = ("Alex", "Fae", "Max", "Polly", "Rex", "Sally", "Sam", "Stella", "Wren")
CONCEPTS = (
    "brimpus", "dumpus", "gorpus", "grimpus", "impus", "jompus", "lempus", "lorpus", "numpus", "rompus", "shumpus",
    "sterpus", "tumpus", "vumpus", "wumpus", "yumpus", "zumpus",
)
PROPERTY_FAMILIES = (
    ("blue", "brown", "orange", "red"),
    ("large", "small"),
    ("liquid", "luminous", "metallic", "wooden"),
    ("opaque", "transparent"),
    ("feisty", "happy", "nervous", "shy"),
    ("bright", "dull"),
    ("bitter", "sour", "spicy", "sweet"),
    ("earthy", "floral", "fruity"),
    ("cold", "hot", "temperate"),
    ("aggressive", "amenable", "angry", "kind", "mean"),
    ("discordant", "loud", "melodic", "muffled"),
    ("fast", "moderate", "slow"),
    ("overcast", "rainy", "snowy", "sunny", "windy"),
)
# fmt: on

_NEGATED_ASIDE, _NEGATED_ON_CHAIN, _NEGATED_AT_END = 1 / 3, 3 / 11, 7 / 15
_FORM_SHARES = (FORMS[0], *FORMS)  # Half of the rules are in the first form.
_SYLLABLES = ("ba", "ke", "mi", "no", "tu")
_OFFICIAL_START = re.compile(r'\s*\{\s*"example\d+"\s*:')


def generate(
    count: int,
    *,
    seed: int,
    hops: int = 5,
    distractors: bool = True,
    form: str = "text",
    start: int = 0,
    exclude: AbstractSet[str] = frozenset(),
) -> list[Example]:
    """Draws distinct questions.

    Args:
      count: how many.
      seed: any integer; record ``i`` depends on the seed, the hops and ``i`` only (see `draw_unique`).
      hops: rules to apply, the last of which gives the property; a question has ``hops + 1`` steps.
      distractors: whether to say what leads nowhere: side parents, and the stray fact with its concept. Without them a
        written proof has one way to go at every step; with them its first step already takes all of it in the head.
      form: ``text``, or ``symbols``: subject, perhaps ``not``, and predicate, as in ``grimpus not orange.`` A concept
        is then the same word wherever it stands, and what it is comes right behind it. In text it has four words,
        ``Xs`` and ``xs`` besides, which a model trained from scratch must first find out to be one.
      start: index of the first record.
      exclude: `content_hash` of questions not to emit.

    Raises:
      CoconutError: for a negative count, hops that are no number of at least 1, or an unknown form.
    """
    if form not in ("text", "symbols"):
        raise CoconutError(f"form = {form!r}: must be text or symbols")
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 1:
        raise CoconutError(f"hops = {hops!r}: must be a whole number of at least 1")
    draw = functools.partial(_draw, hops=hops, distractors=distractors, symbols=form == "symbols")
    return draw_unique(draw, count, stream=f"prontoqa/{hops}", seed=seed, start=start, exclude=exclude)


def load(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads the official generator's JSON, or the field's.

    The query is put behind the question. The chain of thought becomes steps as in Coconut's files: two sentences each,
    the last alone, so that five hops are six steps. ``bad`` says how many malformed records may be left out, and keeps
    the list of them.

    Raises:
      CoconutError: naming file, record, field and value of what is malformed.
    """
    if is_table(path) or not _OFFICIAL_START.match(text := read_text(path)):
        return load_examples(path, bad=bad)
    records = parse_json(text, path).items()
    examples = read_each(records, lambda item: _read_record(item[1], f"{path}: record {item[0]!r}"), bad)
    if not examples:
        raise CoconutError(f"{path}: holds no records")
    return examples


def _read_record(record: Any, where: str) -> Example:
    trial = read_field(require_object(record, where), "test_example", where)
    where = f"{where}, test_example"
    question, query, chain, answer = (
        read_field(require_object(trial, where), name, where)
        for name in ("question", "query", "chain_of_thought", "answer")
    )
    for name, value in (("question", question), ("query", query)):
        require_text(value, name, where)
    require_texts(chain, "chain_of_thought", where)
    if answer not in ANSWERS:
        raise CoconutError(f"{where}: field 'answer' must be 'True' or 'False', got {show_value(answer)}")
    return Example(question=f"{question.strip()} {query.strip()}", steps=_steps(chain), answer=answer)


def _steps(chain: Sequence[str]) -> tuple[str, ...]:
    chain = [sentence for sentence in chain if sentence.strip()]
    return tuple([" ".join(chain[index : index + 2]) for index in range(0, len(chain), 2)])


def _draw(rng: random.Random, hops: int, distractors: bool, symbols: bool) -> Example:
    num_concepts, num_properties = 2 * hops + 4, 2 * hops + 1
    concepts = [concept for [concept] in rng.sample(_pool(tuple(zip(CONCEPTS)), num_concepts), num_concepts)]
    chain, sides = concepts[:hops], concepts[hops : 2 * hops]
    root, stray, dead_end, lonely = concepts[2 * hops :]

    is_a = [*zip(chain, [*chain[1:], root], strict=True), *zip(chain, sides, strict=True), (stray, dead_end)]
    rules = [Statement(subject=child, predicate=parent, is_rule=True, is_a=True) for child, parent in is_a]
    negated = [_NEGATED_ON_CHAIN] * (hops - 1) + [_NEGATED_AT_END] + [_NEGATED_ASIDE] * (hops + 1)
    families = rng.sample(_pool(PROPERTY_FAMILIES, num_properties), num_properties)
    properties = [
        Statement(subject=concept, predicate=rng.choice(family), negated=rng.random() < p, is_rule=True, is_a=False)
        for concept, family, p in zip([*chain, *sides, stray], families, negated, strict=True)
    ]
    asked = properties[hops - 1]
    rules += [*properties, dataclasses.replace(asked, subject=lonely, negated=not asked.negated)]
    forms = {rule: rng.choice(_FORM_SHARES) for rule in rules}
    said = {rule: write_statement(rule, SYMBOLS if symbols else form) for rule, form in forms.items()}
    conclude = functools.partial(write_statement, form=SYMBOLS if symbols else FORMS[0])

    name = rng.choice(NAMES)
    facts = [Statement(subject=name, predicate=concept, is_rule=False, is_a=True) for concept in (chain[0], stray)]
    proof = [conclude(facts[0])]
    for rule in (*rules[: hops - 1], asked):
        proof += [said[rule], conclude(rule.of(name))]
    if not distractors:
        aside = {*sides, stray, dead_end}
        rules = [rule for rule in rules if not aside & {rule.subject, rule.predicate}]
        facts = facts[:1]
    answer = rng.choice(ANSWERS)
    query = dataclasses.replace(asked.of(name), negated=asked.negated == (answer == ANSWERS[0]))
    rng.shuffle(rules)
    rng.shuffle(facts)
    sentences = [*(said[rule] for rule in rules), *map(conclude, facts), QUERY + conclude(query)]
    return Example(question=" ".join(sentences), steps=_steps(proof), answer=answer)


@functools.lru_cache
def _pool(families: tuple[tuple[str, ...], ...], least: int) -> list[tuple[str, ...]]:
    """The official families, and as many more of them, each time with other syllables in front, as are needed."""
    prefixes = itertools.chain.from_iterable(itertools.product(_SYLLABLES, repeat=n) for n in itertools.count())
    pool: list[tuple[str, ...]] = []
    while len(pool) < least:
        prefix = "".join(next(prefixes))
        pool += [tuple([prefix + word for word in family]) for family in families]
    return pool
