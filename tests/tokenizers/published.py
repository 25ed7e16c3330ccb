"""Vocabularies as of published models, but small and trained here (a test needs no network), and text to try them on.

Hugging Face's library trains them, with each family's own pre-tokenizer, normalizer and special tokens; the folders
look like those on its hub.
"""

# ruff: noqa: RUF001
import functools
import json
import random
import tempfile
import unicodedata
from pathlib import Path

import tokenizers as hf
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

FAMILIES = ("gpt2", "llama3", "qwen2", "smollm", "deepseek")

_LLAMA3_SPECIAL = (
    ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    + ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"]
    + ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    + [f"<|reserved_special_token_{number}|>" for number in range(3, 248)]
)
ADDED = {
    "gpt2": [AddedToken("<|endoftext|>", special=True)],
    "llama3": [AddedToken(name, special=True, normalized=False) for name in _LLAMA3_SPECIAL],
    "qwen2": [
        *(AddedToken(name, special=True, normalized=False) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        *(AddedToken(name, special=False, normalized=False) for name in ("<tool_call>", "</tool_call>", "<think>")),
    ],
}
ADDED["smollm"] = [AddedToken(name, special=True, normalized=False) for name in ("<|endoftext|>", "<|im_start|>")]
ADDED["deepseek"] = [AddedToken("<｜end▁of▁sentence｜>", special=True, normalized=False)]
ADDED["deepseek"] += [AddedToken("<think>", special=False, normalized=False)]
# Numbers of up to three digits, Chinese and Japanese, and then all else; none matches what the others take.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
EOS = {"smollm": "<|im_start|>", "deepseek": "<｜end▁of▁sentence｜>"}
EOS |= {"gpt2": "<|endoftext|>", "llama3": "<|end_of_text|>", "qwen2": "<|im_end|>"}

_SCRIPTS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "àéîõüçñßøåæœſﬁŁ",
    "абвгдежзийклмнопрстуфхцчшщъыьэюяЁЖ",
    "αβγδεζηθικλμνξοπρστυφχψωάέή",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "अआइकखगघचजटडतदनपबमयरलवशसहािीुे्",
    "กขคงจฉชซญดตถทธนบปผพภมยรลวสหอะาิีึืุู่้",
    "가나다라마바사한국어ᄀᄂᄃ각ᅡᆨ",
    "あいうえおかがきアイウエオカガキー",
    "的一是不了人我在有他这中大来上国个到说们",
    "𝒳𝔸𝕏𐍈𐐷🄰",
)
_DIGITS = ("0123456789", "٠١٢٣٤٥", "०१२३", "０１２３", "ⅧⅣↂ", "²³¼½①㈠", "𝟘𝟙𝟚")
_SPACES = (" ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", " \t", "\v", "\f", "\u00a0", "\u3000", "\u2009")
_ODD_SPACES = ("\x85", "\u2028", "\u2029", "\u1680", "\x1c", "\u200b", "\ufeff", "\u200e", "\x00", "\x7f")
_MARKS = tuple(map(chr, (0x300, 0x301, 0x302, 0x303, 0x308, 0x323, 0x327, 0x338, 0x345, 0x5B4, 0x64B, 0x93C, 0x20DD)))
_EMOJI = ("😀", "👍🏽", "👩🏿‍🚀", "👨‍👩‍👧‍👦", "❤️", "🇨🇭", "1️⃣", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "\u200d", "\ufe0f", "🏾")
_PUNCTUATION = (
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "’",
    "“",
    "—",
    "…",
    "¿",
    "、",
    "。",
    "###",
    "<<",
    ">>",
    "...",
    "€",
)
_CONTRACTIONS = tuple(
    quote + ending
    for quote in ("'", "’")
    for ending in (
        "s",
        "S",
        "t",
        "T",
        "re",
        "RE",
        "Re",
        "ve",
        "vE",
        "m",
        "M",
        "ll",
        "LL",
        "lL",
        "d",
        "D",
        "ſ",
        "l",
        "x",
    )
)
_NAMES = ("<|endoftext|>", "<|latent|>", "<|begin_of_text|>", "<tool_call>", "</tool_call>", "<think>", "<think")
# Not the youngest characters: the library's table for NFC is of Unicode 9, Python's is younger.
_ANY = [chr(code) for code in range(0x30000) if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs")]


def random_texts(count: int, seed: int) -> list[str]:
    """Text of all scripts, digits, spaces, marks, emoji, punctuation and contractions, well mixed."""
    draw, words = random.Random(seed), _words()

    def word() -> str:
        letters = draw.choice(_SCRIPTS)
        return "".join(draw.choice(letters) for _ in range(draw.randint(1, 7)))

    def number() -> str:
        digits = draw.choice(_DIGITS)
        return "".join(draw.choice(digits) for _ in range(draw.randint(1, 6)))

    makers = [word] * 4 + [lambda: draw.choice(words)] * 4 + [number] * 2 + [lambda: draw.choice(_SPACES)] * 6
    groups = (_ODD_SPACES, _MARKS, _MARKS, _EMOJI, _PUNCTUATION, _PUNCTUATION, _CONTRACTIONS, _CONTRACTIONS, _NAMES)
    makers += [functools.partial(draw.choice, group) for group in (*groups, _ANY)]
    return ["".join(draw.choice(makers)() for _ in range(draw.randint(0, 14))) for _ in range(count)]


def _words() -> list[str]:
    """The words of the corpus."""
    draw = random.Random(1)
    return ["".join(draw.choice(letters) for _ in range(draw.randint(2, 6))) for letters in _SCRIPTS for _ in range(60)]


def _corpus() -> list[str]:
    draw = random.Random(2)
    words = _words()
    words += [*_CONTRACTIONS, *_PUNCTUATION, *_EMOJI, "2024", "12", "365", "e\u0301", "é", "\n\n", "   ", "\t\t"]
    weights = [1 / (1 + index % 60) for index in range(len(words))]
    lines = []
    for _ in range(4000):
        separators = [draw.choice((" ", " ", " ", "", "\n", "  ")) for _ in range(8)]
        lines.append("".join(map("".join, zip(draw.choices(words, weights, k=8), separators, strict=True))))
    return lines


@functools.cache
def trained(family: str) -> hf.Tokenizer:
    """A vocabulary of a few thousand merges, as Hugging Face's library holds it."""
    tokenizer = hf.Tokenizer(models.BPE())
    single = {"llama3": (TikTokenConverter().pattern,), "qwen2": (PRETOKENIZE_REGEX,)}
    splits = {**single, "deepseek": _DEEPSEEK}.get(family, ())
    cuts = [pre_tokenizers.Split(hf.Regex(regex), behavior="isolated", invert=False) for regex in splits]
    if family == "smollm":
        cuts = [pre_tokenizers.Digits(individual_digits=True)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level]) if cuts else byte_level
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    for token in ADDED[family]:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if family == "llama3":
        begin = "<|begin_of_text|>"
        template = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, tokenizer.token_to_id(begin))],
        )
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    else:
        tokenizer.post_processor = byte_level
    # Text never spells a special token; with us that is always so.
    tokenizer.encode_special_tokens = True
    return tokenizer


@functools.cache
def content(family: str) -> str:
    """The ``tokenizer.json`` of a family."""
    declared = json.loads(trained(family).to_str())
    declared["model"]["ignore_merges"] = family == "llama3"
    if family == "gpt2":  # The added token stands in its vocabulary, too.
        declared["model"]["vocab"]["<|endoftext|>"] = declared["added_tokens"][0]["id"]
    return json.dumps(declared)


def write_folder(family: str, folder: Path) -> Path:
    """A folder as on Hugging Face's hub, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content(family))
    settings: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": EOS[family]}}
    if family == "gpt2":  # Its own says nothing of the kind.
        settings = {"model_max_length": 1024}
        eos_id = trained(family).token_to_id(EOS[family])
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": eos_id}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@functools.cache
def folder(family: str) -> Path:
    """A folder of `write_folder` that the tests of a run share; nobody writes into it."""
    return write_folder(family, Path(_shared().name) / family)


@functools.cache
def _shared() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # Removed when the process ends.
