"""A ``tokenizer.json`` is honoured or refused: whatever else it declares is one error that names it."""

import json

import pytest

from coconut.errors import CoconutError
from coconut.tokenizers import huggingface_files, load_tokenizer
from coconut.tokenizers.byte_level import BYTE_OF, merges_of, to_bytes, to_characters
from coconut.tokenizers.tokenizer_json import GPT2_PATTERN
from tests.tokenizers import published

# As many ways to match a word as to leave letters out of it: more than the regular expressions of Rust try.
_PANICS = r"(?:(?:\w?){30}){30}(?=\B\b)|[\s\S]"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split(**changes):
    return {"type": "Split", "pattern": {"Regex": r"\S+|\s+"}, "behavior": "Isolated", "invert": False} | changes


def _sequence(*items):
    return {"type": "Sequence", "pretokenizers": list(items)}


def _template(*single):
    names = [item["SpecialToken"]["id"] for item in single if "SpecialToken" in item]
    special = {name: {"id": name, "ids": [0], "tokens": [name]} for name in names}
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": special}


def _added(**changes):
    token = {"id": 3001, "content": "<x>", "special": False, "normalized": False}
    return [{"id": 3000, "content": "<|endoftext|>", "special": True}, token | changes]


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("model", {"type": "Unigram", "vocab": []}, "model.type = 'Unigram'"),
        ("model", {"type": "WordPiece"}, "model.type = 'WordPiece'"),
        ("model", {"byte_fallback": True}, "model.byte_fallback = True"),
        ("model", {"dropout": 0.1}, "model.dropout = 0.1"),
        ("model", {"end_of_word_suffix": "</w>"}, "model.end_of_word_suffix = '</w>'"),
        ("model", {"continuing_subword_prefix": "##"}, "model.continuing_subword_prefix = '##'"),
        ("model", {"vocab": {"▁a": 0}}, "token '▁a' .id 0. is no byte-level token"),
        ("model", {"vocab": {"a": "0"}}, "the id of token 'a' is '0': must be an integer"),
        ("model", {"merges": ["a b c"]}, "merge 'a b c' is no pair of tokens"),
        ("model", {"merges": [["q", "\u0123"]]}, "merge 'q' 'ģ' is not of ordinary tokens"),
        ("normalizer", {"type": "NFKC"}, "normalizer = 'NFKC'"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, "NFC, Lowercase"),
        ("pre_tokenizer", None, "pre_tokenizer = ''"),
        ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer = 'Metaspace'"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "pre_tokenizer.add_prefix_space = True"),
        ("pre_tokenizer", BYTE_LEVEL, "pre_tokenizer.use_regex = False"),
        ("pre_tokenizer", _sequence({"type": "Punctuation"}, BYTE_LEVEL), "pre_tokenizer = 'Punctuation, ByteLevel'"),
        ("pre_tokenizer", _sequence(BYTE_LEVEL, _split()), "pre_tokenizer = 'ByteLevel, Split'"),
        ("pre_tokenizer", _sequence(_split(), _split(pattern={"Regex": "("}), BYTE_LEVEL), r"splits: '\(' is no valid"),
        ("pre_tokenizer", _sequence({"type": "Digits"}, _split(invert=True), BYTE_LEVEL), "behavior, invert"),
        ("pre_tokenizer", _sequence(_split(behavior="Removed"), BYTE_LEVEL), "behavior, invert = ..Removed., False"),
        ("pre_tokenizer", _sequence(_split(invert=True), BYTE_LEVEL), "behavior, invert = ..Isolated., True"),
        (
            "pre_tokenizer",
            _sequence({"type": "Digits"}, _split(behavior="Removed", invert=True), BYTE_LEVEL),
            "behavior, invert = ..Removed., True",
        ),
        ("pre_tokenizer", _sequence(_split(pattern={"String": " "}), BYTE_LEVEL), "pre_tokenizer.pattern"),
        ("pre_tokenizer", _sequence(_split(pattern={"Regex": "("}), BYTE_LEVEL), r"pattern: '\(' is no valid regular"),
        ("pre_tokenizer", _sequence(_split(pattern={"Regex": r"\S+"}), BYTE_LEVEL), "drops text of '"),
        ("pre_tokenizer", _sequence(_split(pattern={"Regex": r"[^a]|a(?!b)"}), BYTE_LEVEL), "drops text of '.*ab"),
        ("pre_tokenizer", _sequence(_split(pattern={"Regex": _PANICS}), BYTE_LEVEL), "fails on '"),
        ("post_processor", _template({}, {"Sequence": {"id": "A"}}), "no tokenizer.json as Hugging Face"),
        ("post_processor", {"type": "Sequence", "processors": [{}]}, "no tokenizer.json as Hugging Face writes it"),
        ("added_tokens", _added(content=5), "added_tokens: 5: must be the name of a token"),
        ("post_processor", {"type": "BertProcessing"}, "post_processor = 'BertProcessing'"),
        (
            "post_processor",
            _template({"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|endoftext|>"}}),
            "special tokens behind the text",
        ),
        ("post_processor", _template({"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}), "leading: '<s>' is"),
        ("added_tokens", _added(lstrip=True), "added_tokens: '<x>': lstrip = True"),
        ("added_tokens", _added(single_word=True), "added_tokens: '<x>': single_word = True"),
        ("added_tokens", _added(id=3002), "id 3001 stands for no token"),
        ("added_tokens", _added(id=17), "id 17 stands for two tokens"),
        ("added_tokens", _added(id="3001"), "the id of token '<x>' is '3001'"),
        ("added_tokens", [{"id": 0}], "no tokenizer.json as Hugging Face writes it: KeyError"),
        ("model", [], "no tokenizer.json as Hugging Face writes it"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(section, value, message, tmp_path):
    folder = published.write_folder("gpt2", tmp_path)
    declared = json.loads(published.content("gpt2"))
    merged = declared[section] | value if section == "model" and isinstance(value, dict) else value
    (folder / "tokenizer.json").write_text(json.dumps(declared | {section: merged}))
    with pytest.raises(CoconutError, match=rf"tokenizer.json: .*{message}"):
        load_tokenizer(folder)


def test_an_added_token_that_is_matched_in_normalized_text_is_refused(tmp_path):
    folder = published.write_folder("qwen2", tmp_path)
    declared = json.loads(published.content("qwen2"))
    declared["added_tokens"][-1]["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(declared))
    with pytest.raises(CoconutError, match=r"added_tokens: '<think>': normalized = True: not supported"):
        load_tokenizer(folder)


def test_a_split_that_takes_for_ever_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("coconut.tokenizers.splits._SECONDS", 0.05)
    folder = published.write_folder("gpt2", tmp_path)
    slow = _sequence(_split(pattern={"Regex": r"(?:(?:\w?){30}){30}(?=\B\b)"}), BYTE_LEVEL | {"use_regex": True})
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(published.content("gpt2")) | {"pre_tokenizer": slow}))
    with pytest.raises(CoconutError, match=r"splits: .* takes too long on '"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "cut",
    [
        {"type": "Digits", "individual_digits": True},
        {"type": "Digits", "individual_digits": False},
        _split(pattern={"Regex": GPT2_PATTERN}, behavior="Removed", invert=True),
    ],
)
def test_text_is_cut_as_hugging_face_cuts_it(cut, tmp_path):
    import tokenizers as hf

    folder = published.write_folder("gpt2", tmp_path)
    cuts = _sequence(cut, BYTE_LEVEL)
    declared = json.loads(published.content("gpt2")) | {"pre_tokenizer": cuts}
    (folder / "tokenizer.json").write_text(json.dumps(declared))
    ours, theirs = load_tokenizer(folder), hf.Tokenizer.from_str(json.dumps(declared))
    theirs.encode_special_tokens = True
    for text in published.random_texts(300, seed=4):
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    for name, content in huggingface_files(ours).items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    assert again == ours and again.fingerprint == ours.fingerprint


def test_a_vocabulary_may_lack_bytes_that_no_text_has(tmp_path):
    """As SmolLM's lacks some control characters: Hugging Face's library leaves them out of a text, and says nothing."""
    import tokenizers as hf

    def without(*lacking):
        declared = json.loads(published.content("smollm"))
        lost = {to_characters(bytes([value])) for value in lacking}
        model, added = declared["model"], declared["added_tokens"]
        model["merges"] = [merge for merge in model["merges"] if lost.isdisjoint("".join(merge))]
        kept = [token for token in sorted(model["vocab"], key=model["vocab"].get) if lost.isdisjoint(token)]
        model["vocab"] = {token: index for index, token in enumerate(kept)}
        for offset, token in enumerate(added):
            token["id"] = len(kept) + offset
        published.write_folder("smollm", tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps(declared))
        return hf.Tokenizer.from_str(json.dumps(declared))

    theirs = without(0x04, 0xC0, 0xF1)
    ours = load_tokenizer(tmp_path)
    theirs.encode_special_tokens = True
    for text in published.random_texts(100, seed=6):
        if ours.can_spell(text):
            assert ours.encode(text) == theirs.encode(text).ids
    assert not ours.can_spell("a\x04b") and theirs.encode("a\x04b").ids == ours.encode("a") + ours.encode("b")
    with pytest.raises(CoconutError, match=r"no token for the character '\\x04' of 'a\\x04b'"):
        ours.encode("a\x04b")
    without(0x04, ord("q"))
    with pytest.raises(CoconutError, match="needs every single byte; 113 is missing"):
        load_tokenizer(tmp_path)


def test_files_that_are_no_json(tmp_path):
    for content, message in ((b"{", "not a JSON file"), (b"[]", r"must hold a JSON object, not \[\]")):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(CoconutError, match=f"tokenizer.json: {message}"):
            load_tokenizer(tmp_path)


def test_merges_that_tiktoken_would_not_follow_are_refused(tmp_path):
    folder = published.write_folder("gpt2", tmp_path)
    declared = json.loads(published.content("gpt2"))
    model = declared["model"]

    def refuses(message, **changes):
        (folder / "tokenizer.json").write_text(json.dumps(declared | {"model": model | changes}))
        with pytest.raises(CoconutError, match=message):
            load_tokenizer(folder)

    first, second, *rest = model["merges"]
    refuses("merges must stand in the order of the ids they make", merges=[second, first, *rest])
    refuses("the merge of .* into a token is missing", merges=[second, *rest])
    # The last token becomes one that no merges make: a whole piece of text would be one token with us alone.
    last = "".join(rest[-1])
    vocab = {token: token_id for token, token_id in model["vocab"].items() if token != last}
    vocab["zqzqz"] = model["vocab"][last]
    refuses("no merges make the token b'zqzqz', and ignore_merges", vocab=vocab, merges=[first, second, *rest[:-1]])


def test_special_tokens_may_stand_before_the_others(tmp_path):
    # As in SmolLM's vocabulary: the special tokens have the first ids.
    folder = published.write_folder("gpt2", tmp_path)
    declared = json.loads(published.content("gpt2"))
    names = ["<|endoftext|>", "<|im_start|>"]
    vocab = {name: index for index, name in enumerate(names)}
    shifted = {token: token_id + 2 for token, token_id in declared["model"]["vocab"].items() if token not in vocab}
    declared["model"]["vocab"] = vocab | shifted
    declared["added_tokens"] = [
        {"id": index, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for index, name in enumerate(names)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(declared))
    ours = load_tokenizer(folder, eos_token="<|endoftext|>")
    plain = load_tokenizer(published.folder("gpt2"))
    assert ours.eos_id == 0 and ours.vocab_size == 2 + len(shifted) + 3
    for text in published.random_texts(200, seed=1):
        assert ours.encode(text) == [token_id + 2 for token_id in plain.encode(text)]
        assert ours.decode(ours.encode(text)) == text
    saved = type(ours).from_json(ours.to_json(), "memory")
    assert saved == ours and saved.fingerprint != plain.fingerprint


def test_the_characters_of_bytes_are_those_of_hugging_face():
    import tokenizers as hf

    assert sorted(BYTE_OF) == sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    everything = bytes(range(256))
    assert to_bytes(to_characters(everything)) == everything
    shown = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n\x00ÿ")
    assert to_characters("é \n\x00ÿ".encode()) == shown[0][0]


@pytest.mark.parametrize("family", published.FAMILIES)
def test_merges_are_those_of_the_training(family):
    tokenizer = load_tokenizer(published.folder(family))
    merges, unmade = merges_of(tokenizer.token_ids())
    declared = json.loads(published.content(family))["model"]["merges"]
    assert unmade == []
    assert [[to_characters(left), to_characters(right)] for left, right in merges] == declared
