"""Published models: the ids of Hugging Face's library, whatever the text and whatever file they come from."""

import base64
import json
import unicodedata

import numpy as np
import pytest
import tiktoken
import tiktoken.load

from coconut import tokenizers
from coconut.errors import CoconutError
from coconut.tokenizers import TEXT, Tokenizer, gpt2_tokenizer, load_tokenizer
from coconut.types import Example
from tests.tokenizers import published

FAMILIES = pytest.mark.parametrize("family", published.FAMILIES)


@pytest.mark.slow
@FAMILIES
def test_ten_thousand_texts_have_the_ids_of_hugging_face(family):
    ours, theirs = load_tokenizer(published.folder(family)), published.trained(family)
    texts = published.random_texts(10_000, seed=0)
    expected = [encoded.ids for encoded in theirs.encode_batch(texts, add_special_tokens=False)]
    ids = [ours.encode(text) for text in texts]
    assert [text for text, own, other in zip(texts, ids, expected, strict=True) if own != other] == []
    # The texts use the vocabulary, not its single bytes alone.
    assert len({token_id for row in ids for token_id in row}) > 2_000
    for text, row in zip(texts, ids, strict=True):
        decoded = ours.decode(row)
        if ours.normalization:  # Behind an added token a mark stays alone, so the whole is normalized to compare.
            assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)
        else:
            assert decoded == text


def test_qwen_normalizes_behind_the_names_it_has_cut_out():
    ours = load_tokenizer(published.folder("qwen2"))
    think = ours.special_token_ids()["<think>"]
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9")
    # > and U+0338 would make one character, and the name would be gone.
    assert ours.encode("<think>\u0338") == [think, *ours.encode("\u0338")]
    assert ours.encode("\ud83d\ude00 \ud800<think>") == [*ours.encode("\U0001f600 \ufffd"), think]


def test_known_difference_of_a_mark_younger_than_the_table_of_hugging_face():
    # U+0C3C came with Unicode 14: Python sorts it before U+0301, the library's NFC knows no such mark.
    text = "q\u0301\u0c3c"
    normalized = published.trained("qwen2").normalizer.normalize_str(text)
    assert normalized == text != unicodedata.normalize("NFC", text) == "q\u0c3c\u0301"


@FAMILIES
def test_only_names_that_are_not_special_can_be_spelled(family):
    ours = load_tokenizer(published.folder(family))
    spelled = {token.content for token in published.ADDED[family] if not token.special}
    special = ours.special_token_ids()
    assert set(ours.spelled) == spelled and set(tokenizers.MARKERS) < set(special)
    for name, token_id in special.items():
        assert (token_id in ours.encode(f"a {name} b")) == (name in spelled)


@FAMILIES
def test_markers_follow_the_last_id(family):
    ours, theirs = load_tokenizer(published.folder(family)), published.trained(family)
    size = theirs.get_vocab_size()
    assert (ours.start_latent_id, ours.latent_id, ours.end_latent_id) == (size, size + 1, size + 2)
    assert ours.vocab_size == size + 3
    assert ours.eos_id == theirs.token_to_id(published.EOS[family])
    names = [ours.token(token_id) for token_id in range(256, size)]
    assert names[-1] == published.ADDED[family][-1].content


def test_markers_on_reserved_tokens():
    ours = load_tokenizer(published.folder("llama3"), markers="reserved")
    theirs = published.trained("llama3")
    assert ours.vocab_size == theirs.get_vocab_size()
    reserved = [theirs.token_to_id(f"<|reserved_special_token_{number}|>") for number in range(3)]
    assert [ours.start_latent_id, ours.latent_id, ours.end_latent_id] == reserved
    assert "<|reserved_special_token_1|>" not in ours.special_tokens
    with pytest.raises(CoconutError, match=r"markers = 'reserved': there are 0 special tokens named"):
        load_tokenizer(published.folder("gpt2"), markers="reserved")


@FAMILIES
def test_the_question_alone_gets_what_the_vocabulary_wants_before_a_text(family):
    ours, theirs = load_tokenizer(published.folder(family)), published.trained(family)
    example = Example(question="Is it <<3>>?", steps=("It is.",), answer="3")
    encoded = tokenizers.encode_example(ours, example, TEXT)
    with_special = theirs.encode("Is it <<3>>?\n").ids
    assert encoded.question.tolist() == with_special
    assert ours.decode(encoded.question) == ("<|begin_of_text|>" if family == "llama3" else "") + "Is it <<3>>?\n"
    assert encoded.written_steps[0].tolist() == theirs.encode("It is.\n", add_special_tokens=False).ids
    assert encoded.answer.tolist() == [*theirs.encode("### 3", add_special_tokens=False).ids, ours.eos_id]
    assert encoded.question.dtype == np.int32


@FAMILIES
def test_saved_with_a_checkpoint_it_is_the_same(family, tmp_path):
    ours = load_tokenizer(published.folder(family))
    ours.save(tmp_path / "saved.json")
    loaded = Tokenizer.load(tmp_path / "saved.json")
    assert loaded == ours and loaded.fingerprint == ours.fingerprint
    text = "caf\u0065\u0301 <think> 12345"
    assert loaded.encode(text) == ours.encode(text) and loaded.leading_ids == ours.leading_ids


@pytest.mark.slow
def test_gpt2_from_every_kind_of_file(tmp_path, monkeypatch):
    expected = load_tokenizer(published.folder("gpt2"))
    model = json.loads(published.content("gpt2"))["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]) + "\n"
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        folder = tmp_path / vocab_name
        folder.mkdir()
        (folder / vocab_name).write_text(json.dumps(model["vocab"]))
        (folder / merges_name).write_text(merges)
        assert gpt2_tokenizer(folder) == expected
        assert load_tokenizer(folder / vocab_name, eos_token="<|endoftext|>") == expected
    # tiktoken reads the same files, and asks its cache first.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    cached = tiktoken.Encoding(
        "gpt2", pat_str="unused", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": cached}.__getitem__)
    assert gpt2_tokenizer() == expected


def test_gpt2_that_is_nowhere_to_be_had(monkeypatch, tmp_path):
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(CoconutError, match=r"ConnectionError: no route to host.*TIKTOKEN_CACHE_DIR"):
        gpt2_tokenizer()
    with pytest.raises(CoconutError, match=r"holds no tokenizer \(looked for tokenizer.json, vocab.json \+ merges.txt"):
        gpt2_tokenizer(tmp_path)
    with pytest.raises(CoconutError, match="there is no such file or folder"):
        load_tokenizer(tmp_path / "missing")


def _write_ranks(path, tokenizer):
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in tokenizer.token_ids().items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def test_llama3_from_the_file_of_its_makers(tmp_path):
    expected = load_tokenizer(published.folder("llama3"))
    _write_ranks(tmp_path / "tokenizer.model", expected)
    assert load_tokenizer(tmp_path) == expected
    assert load_tokenizer(tmp_path / "tokenizer.model", markers="reserved") == load_tokenizer(
        published.folder("llama3"), markers="reserved"
    )
    assert load_tokenizer(tmp_path, eos_token="<|eot_id|>").eos_id == expected.special_token_ids()["<|eot_id|>"]
    # As it lies in a folder of the hub, whose settings name the end of a sequence; a changed file is read anew.
    _write_ranks(tmp_path / "hub" / "original" / "tokenizer.model", expected)
    (tmp_path / "hub" / "generation_config.json").write_text(json.dumps({"eos_token_id": [expected.eos_id + 8, 0]}))
    assert load_tokenizer(tmp_path / "hub").eos_token == "<|eot_id|>"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(CoconutError, match=r"tokenizer.model: line 2 is no token in base 64 .*sentencepiece"):
        load_tokenizer(tmp_path)


def test_qwen_from_vocabulary_and_merges(tmp_path):
    declared = json.loads(published.content("qwen2"))
    (tmp_path / "vocab.json").write_text(json.dumps(declared["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in declared["model"]["merges"]))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "added_tokens_decoder": {str(token["id"]): token for token in declared["added_tokens"]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path) == load_tokenizer(published.folder("qwen2"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "CLIPTokenizer"}))
    with pytest.raises(CoconutError, match=r"tokenizer_config.json: tokenizer_class = 'CLIPTokenizer': .*Qwen2Token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"eos_token": "<|eot_id|>"}, {"eos_token_id": 0}, "<|eot_id|>"),
        ({"eos_token": None}, {"eos_token_id": 3001}, "<|end_of_text|>"),
        ({}, {"eos_token_id": [3008, 3001]}, "<|eom_id|>"),
        ({}, {}, "no end-of-sequence token is known"),
        ({}, {"eos_token_id": 5}, r"config.json: eos_token_id = 5 is no special token"),
        ({"eos_token": "</s>"}, {}, r"tokenizer_config.json: eos_token = '</s>' is no token of the vocabulary"),
        ({"eos_token": 5}, {}, r"tokenizer_config.json: eos_token = 5: must be the name of a token"),
        ({}, {"eos_token_id": [[]]}, r"config.json: eos_token_id = \[\[\]\] is no special token"),
        ({"add_eos_token": True}, {}, r"tokenizer_config.json: add_eos_token = True: not supported"),
    ],
)
def test_the_end_of_a_sequence(settings, config, expected, tmp_path):
    folder = published.write_folder("llama3", tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    if expected.startswith("<|"):
        assert load_tokenizer(folder).eos_token == expected
    else:
        with pytest.raises(CoconutError, match=expected):
            load_tokenizer(folder)


def test_the_end_of_a_sequence_that_is_asked_for(tmp_path):
    folder = published.write_folder("llama3", tmp_path)
    assert load_tokenizer(folder / "tokenizer.json", eos_token="<|eot_id|>").eos_token == "<|eot_id|>"
