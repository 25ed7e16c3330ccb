"""A tokenizer as the files that Hugging Face's libraries read."""

import json
from typing import Any

from coconut.tokenizers.byte_level import merges_of, to_characters
from coconut.tokenizers.splits import WHOLE
from coconut.tokenizers.tokenizer import Tokenizer
from coconut.tokenizers.tokenizer_json import GPT2_PATTERN


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files from which ``transformers.AutoTokenizer`` gives the same ids.

    The markers are special tokens there. That library turns the names of special tokens in a text into these tokens
    unless it is called with ``split_special_tokens=True``; ours never does.

    For a model of type ``qwen2``, release 5 of that library takes Qwen's own class and pattern whatever these files
    say. Where such a decoder has another tokenizer, call ``transformers.PreTrainedTokenizerFast`` instead.

    Returns:
      Content by name: ``tokenizer.json`` and ``tokenizer_config.json``.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.eos_token,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.leading:
        settings["bos_token"] = tokenizer.leading[0]
    files = {"tokenizer.json": _tokenizer_json(tokenizer), "tokenizer_config.json": settings}
    return {
        name: (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode() for name, content in files.items()
    }


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    symbols = tokenizer.kind == "symbol"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # Read again, the splits are splits, and the pattern is the pattern: one expression by itself is the pattern.
    behind = len(tokenizer.splits) > (tokenizer.pattern == WHOLE) and tokenizer.pattern in (GPT2_PATTERN, WHOLE)
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in (*tokenizer.splits, *(() if behind else (tokenizer.pattern,)))
    ]
    cuts_as_gpt2 = behind and tokenizer.pattern == GPT2_PATTERN
    added = [
        {
            "id": token_id,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": name not in tokenizer.spelled,
        }
        for name, token_id in sorted(tokenizer.special_token_ids().items(), key=lambda item: item[1])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": tokenizer.normalization} if tokenizer.normalization else None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}
        if symbols
        else {"type": "Sequence", "pretokenizers": [*splits, byte_level | {"use_regex": cuts_as_gpt2}]},
        "post_processor": _leading(tokenizer),
        "decoder": None if symbols else byte_level,
        "model": _symbols(tokenizer) if symbols else _byte_pairs(tokenizer),
    }


def _leading(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = dict(zip(tokenizer.leading, tokenizer.leading_ids, strict=True))

    def parts(sequence: str, type_id: int) -> list[dict[str, Any]]:
        special = [{"SpecialToken": {"id": name, "type_id": type_id}} for name in tokenizer.leading]
        return [*special, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": parts("A", 0),
        "pair": [*parts("A", 0), *parts("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]} for name, token_id in ids.items()},
    }


def _symbols(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = {token.decode("utf-8"): token_id for token, token_id in tokenizer.token_ids().items()}
    # The library insists on a name here; it is in no vocabulary, so that an unknown symbol is an error there, too.
    return {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}


def _byte_pairs(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = tokenizer.token_ids()
    merges, unmade = merges_of(ids)
    vocabulary = {to_characters(token): token_id for token, token_id in ids.items()}
    # The library numbers added tokens from the end of the vocabulary on, so those before that stand in it.
    last = max(ids.values())
    vocabulary |= {name: token_id for name, token_id in tokenizer.special_token_ids().items() if token_id < last}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": bool(unmade),
        "vocab": vocabulary,
        "merges": [[to_characters(left), to_characters(right)] for left, right in merges],
    }
