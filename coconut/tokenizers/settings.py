"""What lies beside a vocabulary: ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``.

`transformers` adds tokens from all three to the vocabulary, behind its last id, where our latent markers would go. What
these files say about ids is honoured, or refused by its name. As in `transformers` 5, the second and the third are read
only where the first has no ``added_tokens_decoder``.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.errors import CoconutError
from coconut.tokenizers.byte_level import to_bytes
from coconut.tokenizers.tokenizer_json import Vocabulary

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Lists of names, or objects that give names to names; the first is the older word for the second.
_COLLECTIONS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
# Flags that change which ids a text gets, in a way we do not follow.
_REFUSED = {
    "add_eos_token": "the end of a sequence is ours to place",
    "add_prefix_space": "text would be cut as if a space stood before it",
    "fix_mistral_regex": "the pattern would be another one",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The files beside a vocabulary, read.

    Attributes:
      where: path of ``tokenizer_config.json``, for error messages.
      fields: its content, with that of ``special_tokens_map.json`` where it counts.
      added: tokens these files add, as ``added_tokens`` of a ``tokenizer.json`` writes them.
    """

    where: str
    fields: Mapping[str, Any]
    added: tuple[dict[str, Any], ...]

    def name(self, field: str) -> str | None:
        """The name of the token in a field; None where there is none.

        Raises:
          CoconutError: the field holds something else.
        """
        return _name(self.fields.get(field), field, self.where)


def read_settings(folder: Path) -> Settings:
    """The settings of a folder; those of one without such files are empty.

    Raises:
      CoconutError: a file is malformed, or sets a flag that changes ids and is not honoured.
    """
    path = folder / "tokenizer_config.json"
    fields, where = read_json(path), str(path)
    for field, why in _REFUSED.items():
        if fields.get(field):
            raise CoconutError(f"{where}: {field} = {fields[field]!r:.80}: not supported ({why})")
    if "added_tokens_decoder" in fields:
        return Settings(where, fields, tuple(_decoder(fields["added_tokens_decoder"], where)))
    fields = fields | read_json(folder / "special_tokens_map.json")
    special = {name for _, name in _special_names(fields, where)}
    path = folder / "added_tokens.json"
    added = [
        {"id": token_id, "content": name, "special": name in special, "normalized": name not in special}
        for name, token_id in read_json(path).items()
    ]
    return Settings(where, fields, tuple(added))


def with_settings(
    vocabulary: Vocabulary, settings: Settings, *, from_tokenizer_json: bool, begin: str | None
) -> Vocabulary:
    """The vocabulary as the settings change it.

    Args:
      vocabulary: what the vocabulary's own file says, with the tokens that are added.
      settings: what lies beside it.
      from_tokenizer_json: whether that file says itself what stands before a text.
      begin: the token before a text where the settings name none.

    Raises:
      CoconutError: a special token is none of the vocabulary's, so that `transformers` would add it behind the last
        id; or ``add_bos_token`` contradicts ``tokenizer.json``.
    """
    for field, name in _special_names(settings.fields, settings.where):
        if name not in vocabulary.special_ids and not _is_ordinary(name, vocabulary):
            raise CoconutError(
                f"{settings.where}: {field} = {name!r:.80} is no token of the vocabulary, and is given no id: "
                "`transformers` would add it behind the last one; write it into added_tokens_decoder, or take it out"
            )
    declared = settings.fields.get("add_bos_token")
    if declared is None:
        return vocabulary
    begin = settings.name("bos_token") or begin
    leading = (begin,) if declared and begin is not None else ()
    if from_tokenizer_json and leading != vocabulary.leading:
        # Release 4 of `transformers` follows the flag for some classes, release 5 follows tokenizer.json for all.
        raise CoconutError(
            f"{settings.where}: add_bos_token = {declared!r:.80}: the post_processor of tokenizer.json puts "
            f"{list(vocabulary.leading)} before a text, and the flag {list(leading)}; make them agree"
        )
    return dataclasses.replace(vocabulary, leading=leading)


def read_json(file: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object; an empty one where the file may be missing and is.

    Raises:
      CoconutError: the file cannot be read or holds something else.
    """
    if not required and not file.exists():
        return {}
    try:
        content = json.loads(read_bytes(file))
    except CoconutError:
        raise
    except (ValueError, RecursionError) as error:
        raise CoconutError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CoconutError(f"{file}: must hold a JSON object, not {content!r:.80}")
    return content


def read_bytes(file: Path) -> bytes:
    """The content of a file.

    Raises:
      CoconutError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise CoconutError(f"{file}: cannot read it: {error.strerror}") from error


def _decoder(declared: Any, where: str) -> Sequence[dict[str, Any]]:
    try:
        return [{**token, "id": int(token_id)} for token_id, token in declared.items()]
    except (TypeError, AttributeError, ValueError) as error:
        raise CoconutError(f"{where}: added_tokens_decoder must map ids to tokens: {error}") from error


def _special_names(fields: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """The names of all special tokens, each with the field that holds it."""
    found = [(field, _name(fields.get(field), field, where)) for field in _NAMED]
    # `transformers` takes any field that ends so for the name of a special token.
    more = [field for field in fields if field.endswith("_token") and isinstance(fields[field], str)]
    found += [(field, fields[field]) for field in more if field not in _NAMED]
    for field in _COLLECTIONS:
        held = fields.get(field) or ()
        if not isinstance(held, list | dict | tuple):
            raise CoconutError(f"{where}: {field} = {held!r:.80}: must be a list of tokens, or an object of them")
        names = held.values() if isinstance(held, dict) else held
        found += [(field, _name(name, field, where)) for name in names]
    return [(field, name) for field, name in found if name is not None]


def _name(token: Any, field: str, where: str) -> str | None:
    """The name of a token: a string, or an object that holds it."""
    name = token.get("content") if isinstance(token, Mapping) else token
    if name is not None and not isinstance(name, str):
        raise CoconutError(f"{where}: {field} = {token!r:.80}: must be the name of a token")
    return name


def _is_ordinary(name: str, vocabulary: Vocabulary) -> bool:
    try:
        return to_bytes(name) in vocabulary.ids
    except KeyError:
        return False
