"""Damaged and hostile versions of valid files: bytes and JSON documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from support.tampered import changed, places

# what json.dumps cannot write, by a text that stands for it
RAW = {
    "@deep list@": "[" * 50_000 + "]" * 50_000,
    "@deep object@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@digits@": "9" * 6000,
    "@large@": "1" + "0" * 400,
    "@infinite@": "1e999",
    "@NaN@": "NaN",
    "@twice@": '{"a": 1, "a": 2}',
}
STRINGS = ("", "\x1b[2J\x07", "x" * 10_000, "\u202e", "../..", "/dev/zero", "nan", "\x00", "\ud800")
VALUES = (
    ...,
    None,
    True,
    -1,
    0,
    2,
    1.5,
    1e308,
    -1e-308,
    2**31,
    2**63,
    -(2**70),
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    *STRINGS,
    *RAW,
)


def places_in(document: Any) -> list[tuple[str | int, ...]]:
    """Every place of a document, in lists the first entry only."""
    return list(places(document))


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> bytes:
    """A JSON document with one or two entries changed or removed, or with something next to it."""
    document = valid
    for _ in range(draw(st.integers(1, 2))):
        where = list(places(document))
        if not where:
            break
        document = changed(document, draw(st.sampled_from(where)), draw(st.sampled_from(VALUES)))
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return draw(st.sampled_from((text, text, text, text + "x", "\ufeff" + text))).encode(errors="surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes with a few of them flipped, replaced, removed, repeated or inserted, mostly near the start, where headers are."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        most = draw(st.sampled_from((16, 64, 600, len(content))))
        place = draw(st.integers(0, max(0, min(len(content), most) - 1)))
        bit = draw(st.integers(0, 7))
        change: Callable[[bytes], bytes] = draw(
            st.sampled_from(
                (
                    lambda rest: b"",
                    lambda rest, bit=bit: bytes([rest[0] ^ 1 << bit]) + rest[1:] if rest else b"\x01",
                    lambda rest: b"\xff" * 8 + rest[8:],
                    lambda rest: b"\x00" * 8 + rest[8:],
                    lambda rest: rest[: len(rest) // 2] + rest,
                    lambda rest: rest[1:],
                    lambda rest: b"\x7f\xff\xff\xff" + rest,
                    lambda rest: b"-9999999999" + rest,
                )
            )
        )
        content = content[:place] + change(content[place:])
    return content
