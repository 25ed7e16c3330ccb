"""Tokenizers: round trips, specials that text cannot spell, files that are checked when read."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut import tokenizers
from coconut.errors import CoconutError
from coconut.tokenizers import SYMBOLS, TEXT, Tokenizer
from coconut.types import Example, Think

SYMBOL_NAMES = ("<eos>", "|", "[Q]", "[R]", "[A]", *(str(number) for number in range(28)))
CORPUS = (
    "Every rompus is a zumpus. Alex is a rompus.\n",
    "Is Alex a zumpus or yumpus?\n",
    "### Alex is a zumpus.",
    "<<12*3=36>>\n",
)
SYMBOL = tokenizers.symbol_tokenizer(SYMBOL_NAMES)
WORD = tokenizers.word_tokenizer(CORPUS)
BYTE_PAIR = tokenizers.byte_pair_tokenizer(CORPUS, 280)
ALL = {"symbol": SYMBOL, "word": WORD, "byte_pair": BYTE_PAIR}
SPECIAL = (*tokenizers.MARKERS, "<x>")
LOSSLESS = {"word": WORD, "byte_pair": BYTE_PAIR}

# Text that mixes what the vocabularies know, what they do not, and the names of special tokens.
texts = st.lists(
    st.text() | st.sampled_from((*tokenizers.MARKERS, tokenizers.TEXT_EOS, " Alex", "zumpus", " ", "\n", *CORPUS))
).map("".join)


@pytest.fixture(params=ALL)
def tokenizer(request) -> Tokenizer:
    return ALL[request.param]


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=texts)
def test_round_trip_is_lossless_and_never_gives_a_special_id(kind, text):
    vocabulary = LOSSLESS[kind]
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert all(0 <= token_id < len(vocabulary.tokens) for token_id in ids)


@given(
    symbols=st.lists(st.sampled_from(SYMBOL_NAMES)), separators=st.lists(st.sampled_from([" ", "\n", "\t ", "\x1c"]))
)
def test_symbol_round_trip_does_not_depend_on_the_white_space(symbols, separators):
    text = "".join(
        symbol + (separators[index % len(separators)] if separators else " ") for index, symbol in enumerate(symbols)
    )
    assert SYMBOL.encode(text) == [SYMBOL_NAMES.index(symbol) for symbol in symbols]
    assert SYMBOL.decode(SYMBOL.encode(text)) == " ".join(symbols)


@given(text=st.text(st.characters()))
def test_lone_surrogates_are_replaced(text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert WORD.decode(WORD.encode(text)) == expected
    assert tokenizers.word_tokenizer([text + "a"]).decode(WORD.encode("a")) == "a"


@given(data=st.data())
def test_decode_and_token_are_total(data):
    for vocabulary in ALL.values():
        ids = data.draw(st.lists(st.integers(0, vocabulary.vocab_size - 1)))
        vocabulary.decode(ids).encode("utf-8")
        assert all(vocabulary.token(token_id).isprintable() for token_id in ids)


def test_special_ids(tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("start_latent_id", "latent_id", "end_latent_id", "eos_id")}
    assert len(set(ids.values())) == 4
    assert tokenizer.decode([ids["start_latent_id"]]) == "<|start-latent|>"
    assert tokenizer.token(ids["latent_id"]) == "<|latent|>"
    assert tokenizer.token(ids["end_latent_id"]) == "<|end-latent|>"
    assert tokenizer.vocab_size == tokenizer.encoding.n_vocab
    # The encoding, read as tiktoken users do, agrees on the ids.
    assert tokenizer.encoding.encode("<|latent|>", allowed_special="all") == [ids["latent_id"]]


def test_eos():
    assert SYMBOL.eos_id == 0 and SYMBOL.encode("<eos> 3")[0] == 0
    without = tokenizers.symbol_tokenizer(["a", "b"])
    assert without.eos_id == 2 and without.decode([0, 2]) == "a <eos>"
    with pytest.raises(CoconutError, match="unknown symbol '<eos>'"):
        without.encode("a <eos>")
    assert WORD.decode([WORD.eos_id]) == "<|endoftext|>"


@pytest.mark.parametrize("token_id", [-1, SYMBOL.vocab_size])
def test_decode_names_an_id_out_of_range(token_id):
    for read in (lambda: SYMBOL.decode([1, token_id]), lambda: SYMBOL.token(token_id)):
        with pytest.raises(CoconutError, match=f"token id {token_id} is out of range 0 .. {SYMBOL.vocab_size - 1}"):
            read()


def test_decode_takes_arrays():
    assert SYMBOL.decode(np.asarray([1, 5], np.int32)) == "| 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 | 280", "unknown symbol '280'; the nearest known one is '20'"),
        ("[q]", r"unknown symbol '\[q\]'"),
        ("<|latent|>", "unknown symbol '<|latent|>'"),
        ("\ud800", r"unknown symbol '\\ud800'"),
    ],
)
def test_unknown_symbol(text, message):
    with pytest.raises(CoconutError, match=message.replace("|", r"\|")):
        SYMBOL.encode(text)


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ([], "there is none"),
        (["a", "b", "a"], "'a' stands there twice"),
        (["a b"], "'a b' holds white space"),
        ([""], "one is empty"),
        (["<|latent|>"], "'<|latent|>' is also an ordinary token"),
        (["\ud800"], "is no UTF-8"),
        ("ab", "not one text"),
    ],
)
def test_bad_symbols(symbols, message):
    with pytest.raises(CoconutError, match=message.replace("|", r"\|")):
        tokenizers.symbol_tokenizer(symbols)


def test_word_vocabulary():
    pieces = [WORD.token(token_id) for token_id in WORD.encode("Every rompus is a zumpus.\n<<12*3=36>>")]
    assert pieces == ["Every", " rompus", " is", " a", " zumpus", ".", "\\n", "<<", "12", "*", "3", "=", "36", ">>"]
    assert WORD.vocab_size < 256 + 40
    # The order and the repetition of texts do not matter.
    assert tokenizers.word_tokenizer([*reversed(CORPUS), CORPUS[0]]) == WORD


def test_byte_pair_vocabulary_equals_the_trained_one():
    import tokenizers as hf

    assert tokenizers.byte_pair_tokenizer(CORPUS, 280) == BYTE_PAIR
    assert BYTE_PAIR.vocab_size == 280
    assert set(BYTE_PAIR.tokens[:256]) == {bytes([value]) for value in range(256)}
    # The same training by hand, read back by the library's own encoder.
    trained = hf.Tokenizer(hf.models.BPE())
    trained.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(BYTE_PAIR.pattern), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS, hf.trainers.BpeTrainer(vocab_size=276, initial_alphabet=alphabet, show_progress=False)
    )
    for text in (*CORPUS, "Every rompuses, 3 zum\tpus\n"):
        assert BYTE_PAIR.encode(text) == trained.encode(text).ids


def test_byte_pair_errors(monkeypatch):
    with pytest.raises(CoconutError, match=r"at least 260 .*: 259"):
        tokenizers.byte_pair_tokenizer(CORPUS, 259)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CoconutError, match=r"pip install 'coconut-jax\[hf\]'"):
        tokenizers.byte_pair_tokenizer(CORPUS, 300)


@pytest.mark.parametrize(("corpus", "message"), [([], "no text"), ([""], "no text"), ("text", "not one text")])
def test_bad_corpus(corpus, message):
    with pytest.raises(CoconutError, match=message):
        tokenizers.word_tokenizer(corpus)
    with pytest.raises(CoconutError, match=message):
        tokenizers.byte_pair_tokenizer(corpus, 300)


def test_fingerprint_changes_with_whatever_changes_ids():
    tokens = WORD.tokens
    more = dataclasses.replace(WORD, special_tokens=(*WORD.special_tokens, "<|more|>"))
    changed = [
        dataclasses.replace(WORD, tokens=(*tokens[:-2], tokens[-1], tokens[-2])),
        dataclasses.replace(WORD, tokens=(*tokens[:-1], tokens[-1] + b"x")),
        dataclasses.replace(WORD, tokens=tokens[:-1]),
        dataclasses.replace(WORD, special_tokens=WORD.special_tokens[::-1]),
        more,
        dataclasses.replace(more, eos_token="<|more|>"),
        dataclasses.replace(WORD, pattern=WORD.pattern + "|x"),
        dataclasses.replace(WORD, kind="byte_pair"),
        dataclasses.replace(WORD, normalization="NFC"),
        dataclasses.replace(WORD, leading=("<|endoftext|>",)),
        dataclasses.replace(WORD, spelled=("<|endoftext|>",)),
        dataclasses.replace(WORD, special_ids=(3, 4, 5, 6)),
    ]
    fingerprints = [WORD.fingerprint, *(vocabulary.fingerprint for vocabulary in changed)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert dataclasses.replace(WORD).fingerprint == WORD.fingerprint
    # Written down, because checkpoints store it: it may not depend on the process or the release.
    expected = "a35f49d749e036b0e3d3448acdb4c68885671886c9c3764307709c08758866e0"
    assert tokenizers.symbol_tokenizer(["a", "b"]).fingerprint == expected


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("older")
    tokenizer.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    loaded = Tokenizer.load(path)
    assert loaded == tokenizer and loaded.fingerprint == tokenizer.fingerprint
    assert Tokenizer.from_json(tokenizer.to_json(), "memory") == tokenizer


def test_special_tokens_may_have_any_ids():
    first = dataclasses.replace(WORD, special_ids=(0, 2, 1, WORD.vocab_size - 1))
    assert (first.eos_id, first.start_latent_id, first.latent_id, first.end_latent_id) == (
        0,
        2,
        1,
        first.vocab_size - 1,
    )
    assert first.encode("Alex is") == [token_id + 3 for token_id in WORD.encode("Alex is")]
    assert first.decode([0, *first.encode("Alex is"), 1]) == "<|endoftext|>Alex is<|latent|>"
    assert Tokenizer.from_json(first.to_json(), "memory") == first


def test_of_two_names_that_text_may_spell_the_longer_one_counts():
    names = (*WORD.special_tokens, "<a", "<a>")
    spelling = dataclasses.replace(WORD, special_tokens=names, spelled=("<a", "<a>"))
    longer, shorter = spelling.special_token_ids()["<a>"], spelling.special_token_ids()["<a"]
    assert spelling.encode("<a><a <a>") == [longer, shorter, *WORD.encode(" "), longer]
    assert spelling.decode(spelling.encode("is<a>Alex")) == "is<a>Alex"


def test_symbols_are_neither_normalized_nor_spelled():
    for changes in ({"normalization": "NFC"}, {"spelled": ("<x>",), "special_tokens": SPECIAL}):
        with pytest.raises(CoconutError, match="a symbol vocabulary has none of them"):
            dataclasses.replace(SYMBOL, **({"eos_token": "0"} | changes))


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    SYMBOL.save(path)

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        WORD.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert Tokenizer.load(path) == SYMBOL


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "unigram", "kind: 'unigram' is none of"),
        ("kind", 3, "kind must be a string, not 3"),
        ("pattern", "(", r"pattern: '\(' is no valid regular expression"),
        ("pattern", "", "pattern: an empty pattern"),
        ("pattern", " ?\\w+|\\s", "fingerprint is"),
        ("tokens", "abc", "tokens must be a list of strings, not 'abc'"),
        ("tokens", [1], r"tokens must be a list of strings, not \[1\]"),
        ("tokens", ["%"], "tokens holds a string that is no base 64"),
        ("tokens", ["YQ=="], "needs every single byte; 0 is missing"),
        ("tokens", ["YQ==", "YQ=="], "'a' stands there twice"),
        ("tokens", [], "there is none"),
        ("special_tokens", ["<|endoftext|>"], "the marker '<.start-latent.>' is missing"),
        ("special_tokens", [*tokenizers.MARKERS, "\ud800"], "is empty or no valid text"),
        ("eos_token", "<|latent|>", "'<.latent.>' is a marker"),
        ("eos_token", "</s>", "'</s>' is neither a special token nor an ordinary one"),
        ("special_ids", [1, 2, 3], "special_ids: 4 different ones are needed within"),
        ("special_ids", [1, 2, 3, 3], "special_ids: 4 different ones are needed within"),
        ("special_ids", [1, 2, 3, 10**6], "special_ids: 4 different ones are needed within"),
        ("special_ids", [1, 2, 3, True], "special_ids must be a list of integers"),
        ("spelled", ["<|latent|>"], "spelled: text may not spell the marker '<.latent.>'"),
        ("spelled", ["<think>"], "spelled: '<think>' is no special token"),
        ("leading", ["<s>"], "leading: '<s>' is no special token"),
        ("leading", "<s>", "leading must be a list of strings"),
        ("normalization", "NFKC", "normalization: 'NFKC' is none of"),
        ("normalization", "NFC", "fingerprint is"),
        ("normalization", ["NFC"], "normalization must be a string"),
        ("fingerprint", "0" * 64, "fingerprint is '000"),
        ("fingerprint", None, "fingerprint must be a string, not None"),
    ],
)
def test_load_names_file_field_and_value(field, value, message, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(WORD.to_json() | {field: value}))
    with pytest.raises(CoconutError, match=f"broken.json: .*{message}"):
        Tokenizer.load(path)


@pytest.mark.parametrize("field", ["kind", "pattern", "tokens", "special_tokens", "eos_token", "fingerprint"])
def test_load_names_a_missing_field(field, tmp_path):
    content = WORD.to_json()
    del content[field]
    (tmp_path / "broken.json").write_text(json.dumps(content))
    with pytest.raises(CoconutError, match=f"broken.json: the field '{field}' is missing"):
        Tokenizer.load(tmp_path / "broken.json")


def test_load_of_a_damaged_file(tmp_path):
    path = tmp_path / "broken.json"
    WORD.save(path)
    whole = path.read_bytes()
    for damaged, message in [
        (whole[: len(whole) // 2], "not a JSON file: .*line"),
        (b"[]", r"a tokenizer is a JSON object, not \[\]"),
        (b"\xff\xfe{", "not a JSON file"),
        (whole.replace(b'"LgA', b'"LgB').replace(b'"\\n"', b'"x"').replace(b"IEFsZXg=", b"IEFsZXk="), "fingerprint is"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(CoconutError, match=f"broken.json: {message}"):
            Tokenizer.load(path)
    with pytest.raises(CoconutError, match=r"missing\.json: cannot read the tokenizer: No such file"):
        Tokenizer.load(tmp_path / "missing.json")


def test_encode_text_example():
    example = Example(question="Is Alex a zumpus?", steps=("Alex is a rompus.", "x"), answer="Alex is a zumpus.")
    encoded = tokenizers.encode_example(WORD, example, TEXT)
    assert WORD.decode(encoded.question) == "Is Alex a zumpus?\n"
    assert [WORD.decode(step) for step in encoded.written_steps] == ["Alex is a rompus.\n", "x\n"]
    assert WORD.decode(encoded.answer) == "### Alex is a zumpus.<|endoftext|>"
    assert encoded.answer[-1] == WORD.eos_id
    assert {part.dtype for part in (encoded.question, *encoded.written_steps, encoded.answer)} == {np.dtype(np.int32)}
    assert list(TEXT.texts([example])) == [
        "Is Alex a zumpus?\n",
        "Alex is a rompus.\n",
        "x\n",
        "### Alex is a zumpus.",
    ]


def test_blocks_of_thoughts_pass_through():
    steps = ("Alex is a rompus.", Think(2), "x")
    example = Example(question="Is Alex a zumpus?", steps=steps, answer="x")
    encoded = tokenizers.encode_example(WORD, example, TEXT)
    plain = tokenizers.encode_example(WORD, dataclasses.replace(example, steps=example.written_steps), TEXT)
    assert encoded.steps[1] == Think(2)
    assert [step.tolist() for step in encoded.written_steps] == [step.tolist() for step in plain.written_steps]
    assert (encoded.num_steps, len(encoded.steps)) == (2, 3)
    assert encoded.ids.tolist() == plain.ids.tolist()
    # A tokenizer is trained on text alone.
    assert list(TEXT.texts([example])) == ["Is Alex a zumpus?\n", "Alex is a rompus.\n", "x\n", "### x"]


def test_encode_symbol_example():
    example = Example(question="3 4 | 4 7 | [Q] 7 9 [R] 3", steps=(), answer="7")
    encoded = tokenizers.encode_example(SYMBOL, example, SYMBOLS)
    assert encoded.question.tolist() == [8, 9, 1, 9, 12, 1, 2, 12, 14, 3, 8]
    assert encoded.steps == ()
    assert encoded.answer.tolist() == [4, 12, 0]


@pytest.mark.slow
def test_every_official_question_survives(shared_data):
    rows = json.loads((shared_data / "prosqa_valid.json").read_text())
    examples = [Example(question=row["question"], steps=tuple(row["steps"]), answer=row["answer"]) for row in rows]
    corpus = list(TEXT.texts(examples))
    for vocabulary in (tokenizers.word_tokenizer(corpus), tokenizers.byte_pair_tokenizer(corpus, 500)):
        assert all(vocabulary.decode(vocabulary.encode(text)) == text for text in corpus)
    # As the paper counts for its own vocabulary: about 8.2 tokens for "### answer".
    words = tokenizers.word_tokenizer(corpus)
    assert {len(tokenizers.encode_example(words, example, TEXT).answer) for example in examples} == {7}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4, -1], "row 3: token id 4 at position 1 is out of range 0 .. 3"),
        (np.asarray([[0, 1], [-100, 9]]), r"row 3: token id -100 at position \(1, 0\) is out of range 0 .. 3"),
        (np.asarray([0.5]), "row 3: token ids must be integers, not float64"),
    ],
)
def test_validate_ids_names_the_first_wrong_one(ids, message):
    with pytest.raises(CoconutError, match=message):
        tokenizers.validate_ids(ids, 4, "row 3")


def test_validate_ids_accepts_what_is_in_range():
    tokenizers.validate_ids([0, 3], 4, "row")
    tokenizers.validate_ids([], 4, "row")
    tokenizers.validate_ids(np.asarray(2, np.uint16), 4, "row")
