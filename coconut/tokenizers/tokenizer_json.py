"""Hugging Face's ``tokenizer.json``, read without its library: byte-level byte-pair vocabularies only.

Whatever the file declares that decides ids is honoured or refused; ``truncation`` and ``padding``, which the caller
of a tokenizer decides, are not looked at.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from coconut.errors import CoconutError
from coconut.tokenizers.byte_level import merges_of, to_bytes
from coconut.tokenizers.splits import WHOLE

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the files of a real model say about its tokenizer.

    Attributes:
      ids: ordinary tokens and their ids.
      special_ids: special tokens, and those added beside the ordinary ones, and their ids.
      pattern: the regular expression that cuts text into pieces.
      splits: those that cut it before, one after the other.
      spelled: the names in ``special_ids`` that text may spell.
      leading: the names in ``special_ids`` that precede a text.
      normalization: ``NFC`` or nothing.
    """

    ids: Mapping[bytes, int]
    special_ids: Mapping[str, int]
    pattern: str
    splits: tuple[str, ...] = ()
    spelled: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    normalization: str = ""


def read_tokenizer_json(content: Any, where: str, further: Sequence[Mapping[str, Any]] = ()) -> Vocabulary:
    """What a parsed ``tokenizer.json`` declares.

    Args:
      content: the JSON object.
      where: what it was read from, for error messages.
      further: tokens that the files beside it add, in its own words; it may have them, too.

    Raises:
      CoconutError: it declares something that is not honoured here (another model than byte-level BPE, another
        normalizer, ...), or is malformed; the message names the field and the value.
    """
    try:
        normalization = _normalization(content.get("normalizer"), where)
        added = _with_further(content.get("added_tokens") or [], further, where)
        special_ids, spelled = read_added_tokens(added, normalization, where)
        *splits, pattern = _patterns(content.get("pre_tokenizer"), where)
        leading = _leading(content.get("post_processor"), where)
        ids = _ids(content["model"], special_ids, where)
    except (LookupError, TypeError, AttributeError) as error:
        raise CoconutError(f"{where}: no tokenizer.json as Hugging Face writes it: {error!r}") from error
    return Vocabulary(
        ids=ids,
        special_ids=special_ids,
        pattern=pattern,
        splits=tuple(splits),
        spelled=spelled,
        leading=leading,
        normalization=normalization,
    )


def _with_further(
    added: Sequence[Mapping[str, Any]], further: Sequence[Mapping[str, Any]], where: str
) -> list[Mapping[str, Any]]:
    known = {token["content"]: token for token in added}
    for token in further:
        own = known.setdefault(token["content"], token)
        for field, default in (("id", None), ("special", False)):
            here, beside = own.get(field, default), token.get(field, default)
            if here != beside:
                raise CoconutError(
                    f"{where}: added_tokens: {token['content']!r} has {field} = {here!r:.80}, and {beside!r:.80} in "
                    "the files beside it"
                )
    return list(known.values())


def read_added_tokens(
    added: Sequence[Mapping[str, Any]], normalization: str, where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The ids of added tokens, and the names of those that are not special, which text may spell.

    Raises:
      CoconutError: one that text may spell has a flag that is not honoured.
    """
    for token in added:
        if not isinstance(token["content"], str):
            raise CoconutError(f"{where}: added_tokens: {token['content']!r:.80}: must be the name of a token")
    spelled = tuple(token["content"] for token in added if not token.get("special", False))
    for token in added:
        # The flags say how a name is found in text; those of a special token decide nothing, as it never is.
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag, False)]
        if normalization and token.get("normalized", True):
            flags.append("normalized")
        if flags and token["content"] in spelled:
            _refuse(where, f"added_tokens: {token['content']!r}: {flags[0]}", True)
    return {token["content"]: token["id"] for token in added}, spelled


def vocabulary_ids(
    vocabulary: Mapping[str, Any],
    merges: Sequence[Any],
    special: Mapping[str, Any],
    where: str,
    *,
    ignore_merges: bool = False,
) -> dict[bytes, int]:
    """The ordinary tokens of a vocabulary in GPT-2's characters, if tiktoken's rule gives the ids of its merges.

    Args:
      vocabulary: tokens and ids; may hold the special ones, too.
      merges: pairs, or ``"left right"``, in their order.
      special: special tokens.
      where: what it was read from, for error messages.
      ignore_merges: whether a piece of text that is a token is taken whole, as tiktoken does.

    Raises:
      CoconutError: naming the token or the merge for which it would not.
    """
    ids = {}
    for token, token_id in [*special.items(), *vocabulary.items()]:
        if type(token_id) is not int:
            raise CoconutError(f"{where}: the id of token {token!r} is {token_id!r:.80}: must be an integer")
        if token in special:
            continue
        try:
            ids[to_bytes(token)] = token_id
        except KeyError as error:
            raise CoconutError(
                f"{where}: token {token!r} (id {token_id}) is no byte-level token: {error} stands for no byte"
            ) from error
    pairs, last = set(), -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise CoconutError(f"{where}: merge {merge!r:.80} is no pair of tokens")
        left, right = pair
        made = vocabulary.get(left + right)
        if left + right in special or left not in vocabulary or right not in vocabulary or made is None:
            raise CoconutError(f"{where}: merge {left!r} {right!r} is not of ordinary tokens of the vocabulary")
        if made < last:
            raise CoconutError(
                f"{where}: merge {left!r} {right!r} makes id {made} after id {last}: merges must stand in the order "
                "of the ids they make"
            )
        pairs.add((left, right))
        last = made
    expected, unmade = merges_of(ids)
    if unmade and not ignore_merges:
        raise CoconutError(f"{where}: no merges make the token {unmade[0]!r}, and ignore_merges is not set")
    declared = {(to_bytes(left), to_bytes(right)) for left, right in pairs}
    for left, right in expected:
        if (left, right) not in declared:
            raise CoconutError(f"{where}: the merge of {left!r} and {right!r} into a token is missing")
    return ids


def _refuse(where: str, field: str, value: Any) -> None:
    raise CoconutError(f"{where}: {field} = {value!r:.120}: not supported (byte-level BPE alone is)")


def _ids(model: Mapping[str, Any], special: Mapping[str, Any], where: str) -> dict[bytes, int]:
    # Files of old had no type; only BPE has merges.
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        _refuse(where, "model.type", kind)
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            _refuse(where, f"model.{field}", model[field])
    ignore_merges = bool(model.get("ignore_merges"))
    return vocabulary_ids(model["vocab"], model["merges"], special, where, ignore_merges=ignore_merges)


def _sequence(declared: Any, items: str) -> list[Mapping[str, Any]]:
    """What is declared, as a list: nothing, one thing, or a sequence of things."""
    if declared is None:
        return []
    if declared["type"] == "Sequence":
        return [inner for item in declared[items] for inner in _sequence(item, items)]
    return [declared]


def _normalization(declared: Any, where: str) -> str:
    kinds = [item["type"] for item in _sequence(declared, "normalizers")]
    if kinds not in ([], ["NFC"]):
        _refuse(where, "normalizer", ", ".join(kinds))
    return "NFC" if kinds else ""


def _patterns(declared: Any, where: str) -> list[str]:
    """The expressions that cut text, each the pieces of the one before it."""
    items = _sequence(declared, "pretokenizers")
    kinds = [item["type"] for item in items]
    if kinds[-1:] != ["ByteLevel"] or set(kinds[:-1]) - {"Split", "Digits"}:
        _refuse(where, "pre_tokenizer", ", ".join(kinds))
    *cuts, byte_level = items
    if byte_level.get("add_prefix_space", True):
        _refuse(where, "pre_tokenizer.add_prefix_space", True)
    alone = kinds == ["Split", "ByteLevel"]
    patterns = [_digits(cut) if cut["type"] == "Digits" else _split(cut, where, alone=alone) for cut in cuts]
    if byte_level.get("use_regex", True):
        return [*patterns, GPT2_PATTERN]
    if not patterns:
        _refuse(where, "pre_tokenizer.use_regex", False)
    # A single expression must match all text; of several each leaves what it does not match as it is.
    return patterns if alone or patterns[-1] == WHOLE else [*patterns, WHOLE]


def _digits(declared: Mapping[str, Any]) -> str:
    """Numbers apart from all else, digit by digit or as a whole."""
    return r"\p{N}" if declared.get("individual_digits", False) else r"\p{N}+"


def _split(declared: Mapping[str, Any], where: str, *, alone: bool) -> str:
    kind = declared.get("behavior"), bool(declared.get("invert"))
    # What is made of OpenAI's vocabularies (Phi 4's, OLMo 2's) removes all that does not match, which is nothing: a
    # pattern that leaves text out is refused.
    if kind != ("Isolated", False) and not (alone and kind == ("Removed", True)):
        _refuse(where, "pre_tokenizer.behavior, invert", (declared.get("behavior"), declared.get("invert")))
    if "Regex" not in declared["pattern"]:
        _refuse(where, "pre_tokenizer.pattern", declared["pattern"])
    return declared["pattern"]["Regex"]


def _leading(declared: Any, where: str) -> tuple[str, ...]:
    leading: tuple[str, ...] = ()
    for item in _sequence(declared, "processors"):
        if item["type"] == "TemplateProcessing":
            leading = (*_template(item, where), *leading)
        elif item["type"] != "ByteLevel":  # That one moves offsets, not ids.
            _refuse(where, "post_processor", item["type"])
    return leading


def _template(declared: Mapping[str, Any], where: str) -> tuple[str, ...]:
    kinds = [next(iter(item), "nothing") for item in declared["single"]]
    if kinds.count("Sequence") != 1 or kinds[-1] != "Sequence":
        _refuse(where, "post_processor.single (special tokens behind the text)", declared["single"])
    names = [item["SpecialToken"]["id"] for item in declared["single"][:-1]]
    return tuple(token for name in names for token in declared["special_tokens"][name]["tokens"])
