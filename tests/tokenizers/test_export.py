"""What we write for Hugging Face's libraries gives them our ids, and us the same tokenizer again."""

import dataclasses
import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coconut import tokenizers
from coconut.tokenizers import Tokenizer, huggingface_files, load_tokenizer
from coconut.tokenizers.byte_level import merges_of
from tests.tokenizers import published

CORPUS = ("Every rompus is a zumpus. Alex is a rompus.\n", "### Alex is a zumpus.", "<<12*3=36>>\n", "naïve café 🙂\n")


def _published(family, **options) -> Tokenizer:
    return load_tokenizer(published.folder(family), **options)


TOKENIZERS = {
    "gpt2": lambda: _published("gpt2"),
    "llama3": lambda: _published("llama3"),
    "llama3-reserved": lambda: _published("llama3", markers="reserved"),
    "qwen2": lambda: _published("qwen2"),
    "smollm": lambda: _published("smollm"),
    "deepseek": lambda: _published("deepseek"),
    "byte_pair": lambda: tokenizers.byte_pair_tokenizer(CORPUS, 300),
    "word": lambda: tokenizers.word_tokenizer(CORPUS),
}


def _write(tokenizer, folder):
    files = huggingface_files(tokenizer)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("model_type", [None, "gpt2", "llama", "qwen2"])
def test_transformers_gives_the_same_ids(name, model_type, tmp_path):
    ours = TOKENIZERS[name]()
    folder = _write(ours, tmp_path)
    if model_type is not None:  # The class that the library would take for such a model must not replace ours.
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    # For a model of type qwen2 AutoTokenizer takes Qwen's class whatever the settings say, and with it Qwen's pattern.
    reader = PreTrainedTokenizerFast if model_type == "qwen2" and name != "qwen2" else AutoTokenizer
    theirs = reader.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id
    for marker in tokenizers.MARKERS:
        token_id = ours.special_token_ids()[marker]
        assert theirs.convert_tokens_to_ids(marker) == token_id
        assert theirs.encode(f"a{marker}b", add_special_tokens=False).count(token_id) == 1
        assert theirs.decode([token_id], skip_special_tokens=True) == ""
    texts = [*CORPUS, "Every rompuses, 3 zum\tpus\n", *published.random_texts(300, seed=2)]
    for text in texts:
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == [*ours.leading_ids, *ours.encode(text)], text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_we_read_the_same_tokenizer_again(name, tmp_path):
    ours = TOKENIZERS[name]()
    again = load_tokenizer(_write(ours, tmp_path))
    if ours.kind == "byte_pair":
        assert again == ours and again.fingerprint == ours.fingerprint
    for text in published.random_texts(300, seed=3):
        assert again.encode(text) == ours.encode(text)


@pytest.mark.parametrize("family", published.FAMILIES)
def test_what_was_read_is_written_as_it_was(family):
    written = json.loads(huggingface_files(_published(family))["tokenizer.json"])
    declared = json.loads(published.content(family))
    assert written["model"]["merges"] == declared["model"]["merges"]
    assert written["added_tokens"][:-3] == [token | {"normalized": False} for token in declared["added_tokens"]]
    ordinary = {token: token_id for token, token_id in declared["model"]["vocab"].items() if token != "<|endoftext|>"}
    assert written["model"]["vocab"] == ordinary


def test_a_token_made_of_later_ones_keeps_its_merge(tmp_path):
    # No training gives such an order of ids; a word vocabulary, and Llama 3's, may.
    single = tuple(bytes([value]) for value in range(256))
    word = tokenizers.word_tokenizer(CORPUS)
    ours = dataclasses.replace(word, kind="byte_pair", tokens=(*single, b"abcd", b"ab", b"cd"))
    merges, unmade = merges_of(ours.token_ids())
    assert merges == [(b"ab", b"cd"), (b"a", b"b"), (b"c", b"d")] and unmade == [b"abcd"]
    theirs = AutoTokenizer.from_pretrained(_write(ours, tmp_path))
    assert theirs.encode("xabcdab") == ours.encode("xabcdab") == [ord("x"), 256, 257]
    assert load_tokenizer(tmp_path) == ours


def test_symbols(tmp_path):
    ours = tokenizers.symbol_tokenizer(["<eos>", "|", "[Q]", "[R]", "[A]", *(str(number) for number in range(28))])
    theirs = AutoTokenizer.from_pretrained(_write(ours, tmp_path))
    text = "3 4 | 14 7 |  [Q] 7 9\n[R] 3"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.eos_token_id == ours.eos_id == 0
    assert theirs.convert_tokens_to_ids(list(tokenizers.MARKERS)) == [33, 34, 35]
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("zumpus")
