"""ProntoQA: every question proved by program, and the whole compared with 9,200 official ones."""

import dataclasses
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coconut.errors import CoconutError
from coconut.tasks import content_hash, get_task, prontoqa
from coconut.tasks.ontology import FORMS, Statement, deduce, read_question, read_statement, verify, write_statement
from coconut.tasks.prontoqa import CONCEPTS, NAMES, PROPERTY_FAMILIES, load
from coconut.types import Example

COUNT = 4000
TASK = get_task("prontoqa")
FAMILY = {word: number for number, family in enumerate(PROPERTY_FAMILIES) for word in family}


@pytest.fixture(scope="module")
def official(shared_data):
    return load(shared_data / "prontoqa_5hop_0shot_random.json")


@pytest.fixture(scope="module")
def generated():
    return prontoqa.generate(COUNT, seed=0)


def check_structure(example: Example, hops: int) -> dict[str, str]:
    """Checks that a question has the one structure of the official ones; returns the role of each concept."""
    verify(example)
    assert len(example.steps) == hops + 1
    question = read_question(example.question)
    assert all(len(re.findall(r"[.]", step)) == 2 for step in example.written_steps[:-1])
    chain = [read_statement(re.split(r"(?<=\.) ", step)[0]).predicate for step in example.written_steps[:-1]]
    parents: dict[str, set[str]] = {}
    properties: dict[str, list[Statement]] = {}
    for rule in question.rules:
        assert not (rule.is_a and rule.negated)
        if rule.is_a:
            parents.setdefault(rule.subject, set()).add(rule.predicate)
        else:
            properties.setdefault(rule.subject, []).append(rule)
    roles = {concept: f"chain {index}" for index, concept in enumerate(chain)}
    for index, concept in enumerate(chain):
        *_, other = others = sorted(
            parents.pop(concept) - set(chain[index + 1 : index + 2]), key=properties.__contains__
        )
        roles[other] = f"side {index}"
        assert len(others) == (2 if index == hops - 1 else 1)
        if len(others) == 2:
            roles[others[0]] = "root"
    [stray] = {fact.predicate for fact in question.facts} - {chain[0]}
    [dead_end] = parents.pop(stray)
    [lonely] = set(properties) - {*roles, stray}
    roles |= {stray: "stray", dead_end: "dead end", lonely: "lonely"}
    assert not parents and len(roles) == 2 * hops + 4
    assert set(properties) == set(roles) - {dead_end, *(c for c, role in roles.items() if role == "root")}
    assert all(len(rules) == 1 for rules in properties.values())
    assert len(question.rules) == 4 * hops + 3 and len(question.facts) == 2
    assert {fact.subject for fact in question.facts} == {question.query.subject}
    [asked], [opposite] = properties[chain[-1]], properties.pop(lonely)
    assert asked.predicate == opposite.predicate == question.query.predicate and asked.negated != opposite.negated
    if hops <= 6:
        assert {question.query.subject} <= set(NAMES) and set(roles) <= set(CONCEPTS)
        assert len({FAMILY[rule.predicate] for [rule] in properties.values()}) == 2 * hops + 1
    return roles


def measure(examples: list[Example]) -> dict[str, Counter]:
    """Everything by which two sets of five-hop questions can differ once their structure is the same."""
    counters: dict[str, Counter] = {}

    def count(name, value):
        counters.setdefault(name, Counter())[value] += 1

    for example in examples:
        roles = check_structure(example, hops=5)
        question = read_question(example.question)
        sentences = re.split(r"(?<=\.) ", example.question)
        count("answer and query", (example.answer, question.query.negated))
        count("name", question.query.subject)
        count("the chain's fact is first", roles[question.facts[0].predicate] == "chain 0")
        count("words", len(example.question.split()))
        count("words of steps", sum(len(step.split()) for step in example.written_steps))
        for concept, role in roles.items():
            count(f"concept: {role[:5]}", concept)
        negated = 0
        for position, rule in enumerate(question.rules):
            role = roles[rule.subject]
            form = sentences[position].split()[0]
            form = form if form in ("Every", "Each") else "plural"
            kind = "is a" if rule.is_a else "property"
            count(f"form: {kind}", (form, rule.negated))
            count("form: article", (form, rule.is_a, sentences[position].split()[-2] if form != "plural" else ""))
            count(f"position: {kind} {role[:5]}", position)
            if not rule.is_a:
                count(f"property: {role[:5]}", rule.predicate)
                count(f"negated: {role}", rule.negated)
                negated += rule.negated and role[:5] == "chain"
        count("negated on the chain", negated)
        last = next(
            r for r in question.rules if r.predicate == question.query.predicate and roles[r.subject] == "chain 4"
        )
        count("negated at the end, and on the chain", (last.negated, negated))
    return counters


def p_values(ours: dict[str, Counter], theirs: dict[str, Counter]) -> dict[str, float]:
    """How likely two samples come from one distribution (chi-squared; rare values are put together)."""
    assert ours.keys() == theirs.keys()
    values = {}
    for name, left in ours.items():
        right = theirs[name]
        columns, rest = [], [0, 0]
        for value in sorted({*left, *right}):
            column = [left[value], right[value]]
            if min(column) >= 5:
                columns.append(column)
            else:
                rest = [have + new for have, new in zip(rest, column, strict=True)]
        if sum(rest):
            columns.append(rest)
        values[name] = stats.chi2_contingency(columns).pvalue if len(columns) > 1 else 1.0  # pyright: ignore
    return values


@pytest.mark.slow
def test_generated_cannot_be_told_from_official(generated, official):
    theirs = measure(official)
    values = p_values(measure(generated), theirs)
    assert len(values) > 30
    # The smallest of about 45 values.
    assert min(values.values()) > 0.001, values
    assert {name: sum(theirs[f"property: {name}"].values()) for name in ("chain", "side ", "stray", "lonel")} == {
        "chain": 5 * 9200,
        "side ": 5 * 9200,
        "stray": 9200,
        "lonel": 9200,
    }


@pytest.fixture(scope="module")
def some_official(official):
    return measure(official[:1500])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "told_by"),
    [
        ("_NEGATED_AT_END", 1 / 3, "negated: chain 4"),
        ("_NEGATED_ON_CHAIN", 1 / 3, "negated: chain 0"),
        ("_NEGATED_ASIDE", 0.4, "negated: side 0"),
        ("_FORM_SHARES", FORMS, "form: is a"),
        ("NAMES", NAMES[:-1], "name"),
        ("CONCEPTS", CONCEPTS[:-1], "concept: chain"),
    ],
)
def test_a_wrong_generator_is_told_from_official(name, value, told_by, some_official, monkeypatch):
    monkeypatch.setattr(prontoqa, name, value)
    values = p_values(measure(prontoqa.generate(1500, seed=0)), some_official)
    assert values[told_by] < 0.001, values


@pytest.mark.parametrize("hops", [1, 2, 3, 6, 7, 20])
def test_any_number_of_hops_has_the_same_structure(hops):
    examples = prontoqa.generate(30, seed=0, hops=hops)
    for example in examples:
        check_structure(example, hops)
    assert {example.answer for example in examples} == {"True", "False"}
    assert len(set(map(content_hash, examples))) == 30


def test_coined_names_are_distinct():
    families = prontoqa._pool(PROPERTY_FAMILIES, 1000)
    assert len(families) >= 1000 and families[:13] == list(PROPERTY_FAMILIES)
    words = [word for family in families for word in family]
    assert len(set(words)) == len(words)


def test_records_depend_on_seed_and_index_only():
    whole = prontoqa.generate(30, seed=9)
    assert whole[10:] == prontoqa.generate(20, seed=9, start=10)
    assert whole[0] != prontoqa.generate(1, seed=10)[0]
    excluded = content_hash(whole[0])
    again = prontoqa.generate(30, seed=9, exclude={excluded})
    assert again[1:] == whole[1:] and content_hash(again[0]) != excluded


@pytest.mark.parametrize("hops", [1, 3])
def test_without_distractors_the_proof_and_its_answer_are_the_same(hops):
    for whole, bare in zip(
        *(prontoqa.generate(20, seed=0, hops=hops, distractors=distractors) for distractors in (True, False)),
        strict=True,
    ):
        assert (bare.steps, bare.answer) == (whole.steps, whole.answer)
        sentences, kept = (
            [text.strip() for text in re.findall(r"[^.]+\.", example.question)] for example in (whole, bare)
        )
        assert set(kept) < set(sentences) and kept[-1] == sentences[-1]
        # The chain to the root, a property each, the opposite elsewhere, one fact, the query.
        assert len(kept) == hops + hops + 1 + 1 + 1
        names = Counter(re.findall(r"\w+pus", bare.question.lower()))
        assert len(names) == hops + 2, "the chain, the root and the concept of the opposite"


def test_symbols_say_the_same_as_text():
    for text, symbols in zip(
        *(prontoqa.generate(20, seed=0, hops=3, form=form) for form in ("text", "symbols")), strict=True
    ):
        verify(symbols)
        assert read_question(symbols.question) == read_question(text.question)
        assert symbols.answer == text.answer
        assert re.fullmatch(r"(\w+ (not )?\w+\. )+True or false: \w+ (not )?\w+\.", symbols.question)
        assert all(re.fullmatch(r"\w+ (not )?\w+\.( \w+ (not )?\w+\.)?", step) for step in symbols.written_steps)
    with pytest.raises(CoconutError, match="form = 'graph': must be text or symbols"):
        TASK.generate(1, seed=0, form="graph")


@pytest.mark.parametrize("hops", [0, -1, True])
def test_impossible_hops_are_named(hops):
    with pytest.raises(CoconutError, match=f"hops = {hops}: must be a whole number of at least 1"):
        TASK.generate(1, seed=0, hops=hops)


# --- The official format ----------------------------------------------------------------------------------------


CHAIN = ["Max is an impus.", "Impuses are wumpuses.", "Max is a wumpus.", "Each wumpus is not red.", "Max is not red."]
TRIAL = {
    "question": "Each wumpus is not red. Every rompus is red. Impuses are wumpuses. Max is an impus.",
    "query": "True or false: Max is not red.",
    "chain_of_thought": CHAIN,
    "answer": "True",
}
EXAMPLE = Example(
    question=f"{TRIAL['question']} {TRIAL['query']}",
    steps=(
        "Max is an impus. Impuses are wumpuses.",
        "Max is a wumpus. Each wumpus is not red.",
        "Max is not red.",
    ),
    answer="True",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prontoqa")


def test_official_trials_become_examples(tmp_path):
    (tmp_path / "5hop.json").write_text(json.dumps({"example1": {"test_example": TRIAL}}))
    assert TASK.load(tmp_path / "5hop.json") == [EXAMPLE]
    verify(EXAMPLE)
    assert TASK.check("Max is not red.\n### True", EXAMPLE) and not TASK.check("### False", EXAMPLE)


def test_in_context_examples_are_left_out(tmp_path):
    record = {"in_context_example0": {**TRIAL, "answer": "False"}, "test_example": TRIAL}
    (tmp_path / "fewshot.json").write_text(json.dumps({"example1": record, "example2": record}, indent=2))
    assert TASK.load(tmp_path / "fewshot.json") == [EXAMPLE, EXAMPLE]


@given(chain=st.lists(st.text(alphabet="ab. ", min_size=1), max_size=12), answer=st.sampled_from(["True", "False"]))
def test_chains_are_joined_in_pairs(folder, chain, answer):
    trial = {**TRIAL, "chain_of_thought": chain, "answer": answer}
    (folder / "one.json").write_text(json.dumps({"example1": {"test_example": trial}}))
    [example] = load(folder / "one.json")
    said = [sentence for sentence in chain if sentence.strip()]  # A blank one says nothing.
    assert " ".join(example.written_steps) == " ".join(said) and example.answer == answer
    assert len(example.steps) == (len(said) + 1) // 2


def without(field):
    return {"test_example": {name: value for name, value in TRIAL.items() if name != field}}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([], "expected an object, got []"),
        ({}, "field 'test_example' is missing"),
        ({"test_example": 3}, "test_example: expected an object, got 3"),
        (without("query"), "field 'query' is missing"),
        ({"test_example": {**TRIAL, "question": ""}}, "field 'question' must be a text that is not blank, got ''"),
        ({"test_example": {**TRIAL, "chain_of_thought": [1]}}, "field 'chain_of_thought'[0] must be a text, got 1"),
        ({"test_example": {**TRIAL, "answer": "yes"}}, "field 'answer' must be 'True' or 'False', got 'yes'"),
        ({"test_example": {**TRIAL, "answer": True}}, "field 'answer' must be 'True' or 'False', got True"),
    ],
)
def test_a_malformed_trial_is_named(tmp_path, record, complaint):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"example1": {"test_example": TRIAL}, "example2": record}))
    with pytest.raises(CoconutError, match=re.escape(f"{path}: record 'example2'") + ".*" + re.escape(complaint)):
        load(path)


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text('{"example1":\n {"test_example": ')
    with pytest.raises(CoconutError, match=re.escape(f"{path}: line 2, column ")):
        load(path)


# --- The grammar, and what follows ------------------------------------------------------------------------------


statements = st.fixed_dictionaries(
    {
        "subject": st.sampled_from(CONCEPTS + NAMES),
        "predicate": st.sampled_from([*CONCEPTS, *FAMILY]),
        "negated": st.booleans(),
    }
)


@given(fields=statements, form=st.sampled_from(FORMS))
def test_what_is_written_is_read(fields, form):
    statement = Statement(**fields, is_rule=fields["subject"] in CONCEPTS, is_a=fields["predicate"] in CONCEPTS)
    assert read_statement(write_statement(statement, form)) == statement


@pytest.mark.parametrize("text", ["", "Max is red", "Max are red.", "All impuses are red.", "Max is red. Max is shy."])
def test_other_sentences_are_not_read(text):
    with pytest.raises(CoconutError, match=re.escape(f"not a sentence of ProntoQA: {text!r}")):
        read_statement(text)


@pytest.mark.parametrize("text", ["Max is red.", "True or false: Max is red.", "Is Max red?"])
def test_other_questions_are_not_read(text):
    with pytest.raises(CoconutError, match="not a ProntoQA question"):
        read_question(text)


@pytest.mark.parametrize(
    ("rules", "query", "answer"),
    [
        ("Impuses are red. Max is an impus.", "Max is red.", "True"),
        ("Impuses are red. Max is an impus.", "Max is not red.", "False"),
        ("Each impus is not red. Max is an impus.", "Max is red.", "False"),
        ("Every impus is an impus. Every impus is a wumpus. Wumpuses are shy. Max is an impus.", "Max is shy.", "True"),
        ("Impuses are wumpuses. Max is an impus.", "Max is a wumpus.", "True"),
        ("Impuses are not wumpuses. Wumpuses are shy. Max is an impus. Max is not shy.", "Max is shy.", "False"),
    ],
)
def test_deduction_by_hand(rules, query, answer):
    assert deduce(read_question(f"{rules} True or false: {query}")) == answer


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ("Impuses are red. Rex is an impus.", "neither of 'Max is red.' and 'Max is not red.' follow"),
        ("Impuses are red. Max is not an impus.", "neither of"),
        ("Impuses are red. Max is not red. Max is an impus.", "both of 'Max is red.' and 'Max is not red.' follow"),
    ],
)
def test_what_does_not_follow_is_no_answer(rules, complaint):
    with pytest.raises(CoconutError, match=complaint):
        deduce(read_question(f"{rules} True or false: Max is red."))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": "False"}, "the answer must be 'True', got 'False'"),
        ({"steps": ()}, "must start from a stated fact"),
        ({"steps": ("Max is a wumpus.", *EXAMPLE.steps[1:])}, "must start from a stated fact"),
        ({"steps": ("Max is an impus. Wumpuses are impuses.", *EXAMPLE.steps[1:])}, "a rule that is not stated"),
        ({"steps": (EXAMPLE.steps[0], "Max is a rompus. Each wumpus is not red.", "Max is not red.")}, "conclude"),
        ({"steps": ("Max is an impus. Every rompus is red.", "Max is red.")}, "but had only shown 'Max is an impus.'"),
        ({"steps": EXAMPLE.steps[:-1]}, "end in a rule"),
        ({"steps": ("Max is an impus. Impuses are wumpuses.", "Max is a wumpus.")}, "does not give 'True'"),
    ],
)
def test_wrong_proofs_are_told(change, complaint):
    with pytest.raises(CoconutError, match=re.escape(complaint)):
        verify(dataclasses.replace(EXAMPLE, **change))
