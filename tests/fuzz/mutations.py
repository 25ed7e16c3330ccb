"""Inputs for readers: what was valid once, with a few things changed; and bytes of no meaning."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

# What files hold that nobody meant to write, or that somebody meant ill.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, -(2**63), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", " ", "a", "#", "####", "||", "[A]", "[Q]", "\u0000", "\ud800", "\u200b", "e\u0301", "9" * 5000, "x" * 300),
    *([], {}, [[]], [None], [0, 1], {"a": 1}, {"think": 10**9}, {"": {}}),
)
PIECES = (
    *(b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"||", b"####", b"<<", b">>", b"=", b"#", b"[", b"]"),
    *(b"{", b"}", b'"', b",", b":", b"\\u0000", b"1e999", b"NaN", b"-", b"null", b"[" * 2000, b"9" * 5000),
)


def mutate(seeds: Sequence[bytes], number: int) -> bytes:
    """One input of a reader: a function of its valid inputs and a number.

    Half of the inputs are a JSON text with changed values where there is one, which gets past the parser; the others
    have changed bytes, and one in twenty is random alone.
    """
    draw = random.Random(number)
    if draw.random() < 0.05:
        return draw.randbytes(draw.randrange(200))
    data = draw.choice(seeds)
    if draw.random() < 0.6:
        lines = data.split(b"\n")
        place = draw.randrange(len(lines))
        for start, part, end in (
            (b"", data, b""),
            (b"\n".join(lines[:place]), lines[place], b"\n".join(lines[place + 1 :])),
        ):
            try:
                content = json.loads(part)
            except ValueError:
                continue
            for _ in range(draw.choice((1, 1, 1, 2, 4))):
                content = _changed(content, draw)
            return b"\n".join(filter(None, (start, json.dumps(content).encode(errors="surrogatepass"), end)))
    for _ in range(draw.choice((1, 1, 2, 5))):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((0, 1, 1, 4, 30)))
        copied = data[(at := draw.randrange(len(data) + 1)) : at + 20]
        data = data[:start] + draw.choice((draw.choice(PIECES), copied, draw.randbytes(1))) + data[stop:]
    return data


def _changed(content: Any, draw: random.Random) -> Any:
    """The same JSON value with one thing in it changed."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    if not keys or draw.random() < 0.1:
        return copy.deepcopy(draw.choice(VALUES))
    key = draw.choice(keys)
    if draw.random() < 0.7:
        content[key] = _changed(content[key], draw)
    elif draw.random() < 0.5:
        del content[key]
    elif isinstance(content, dict):
        content[draw.choice(("target", "edges", "root", "idx_to_symbol", "steps", "x", ""))] = copy.deepcopy(
            draw.choice(VALUES)
        )
    else:
        content.insert(key, copy.deepcopy(draw.choice(VALUES)))
    return content
