"""Byte-level byte-pair vocabularies as files write them: bytes as printable characters, and merges.

A ``tiktoken`` vocabulary has no list of merges: any two neighbours whose bytes together are a token may merge, the
lowest id first. `merges_of` says which neighbours ever do, so that a list of merges can be compared and written.
"""

import itertools
from collections.abc import Mapping

# GPT-2's convention: printable bytes stand for themselves, the others for the characters from 256 up, in order.
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}
_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def to_bytes(token: str) -> bytes:
    """The bytes that a token of such a file stands for.

    Raises:
      KeyError: a character stands for no byte.
    """
    return bytes(BYTE_OF[character] for character in token)


def to_characters(token: bytes) -> str:
    """The inverse of `to_bytes`."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


def merges_of(ids: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The merges of a vocabulary, in the order of the ids they make, and the tokens that no merging makes.

    A token's own bytes are merged by the tokens before it. If two parts are left, these are the only neighbours that
    ever become this token, in any text: tokens are never split again, so where it appears, its bytes were merged
    among themselves alone. This holds of every token of a trained vocabulary. If more parts are left, the token
    only appears where a whole piece of text is one, or from parts that come after it: all its splits are listed.
    """
    merges, unmade = [], []
    for token in sorted(ids, key=ids.__getitem__):
        if len(token) == 1:
            continue
        parts = _parts(token, ids)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
            continue
        unmade.append(token)
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(left, right) for left, right in splits if left in ids and right in ids]
    return merges, unmade


def _parts(token: bytes, ids: Mapping[bytes, int]) -> list[bytes]:
    parts, own = [token[index : index + 1] for index in range(len(token))], ids[token]
    while len(parts) > 2:
        ranks = [ids.get(left + right, own) for left, right in itertools.pairwise(parts)]
        lowest = min(ranks)
        if lowest >= own:
            break
        place = ranks.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
