"""Captions as editors and exporters leave them: read right, or refused by name; and which are too long."""

import codecs
import re
from collections.abc import Callable, Iterable

WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # longest first
# What is put around a text: white space, byte order marks (also one taken for Latin letters), joiners and
# marks of direction that join and turn nothing there, the ends of texts in C and DOS.
AROUND = r"(?:[\s\0\x1a\u200b\u200e\u200f\u2060\ufeff]|\u00ef\u00bb\u00bf)+"
EDGES = re.compile(rf"\A{AROUND}|{AROUND}\Z")
BROKEN = {
    "half of a letter": "\ud800-\udfff",
    "a control character": "\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f",
    "the sign of a letter that was lost": "\ufff9-\uffff",
}
FOREIGN = re.compile("|".join(f"([{letters}])" for letters in BROKEN.values()))
NAMED = 5  # captions that the line about cut ones names


def to_utf8(data: bytes) -> bytes:
    """The bytes of a text in UTF-8, UTF-16 or UTF-32, as its byte order mark says -> UTF-8 without a mark."""
    if mark := next((mark for mark in WIDE if data.startswith(mark)), None):
        return data.decode(f"utf-{8 * len(mark)}").encode()
    return data.removeprefix(codecs.BOM_UTF8)


def clean_caption(text: str, where: str) -> str:
    """The caption itself. ValueError that begins with `where` if it is empty or a letter in it is broken."""
    text = EDGES.sub("", text).replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise ValueError(f"{where} is empty; write a text there")
    if broken := FOREIGN.search(text):
        what = list(BROKEN)[broken.lastindex - 1]
        raise ValueError(f"{where} has U+{ord(broken[0]):04X} in it, {what}; write it anew, in UTF-8")
    return text


def say_cut(captions: Iterable[tuple[str, str]], length: Callable[[str], int], limit: int) -> str:
    """A line about the captions, (origin, text), that are longer than `limit` tokens, or "" if none is."""
    tokens = [(origin, length(text)) for origin, text in captions]
    cut = [(origin, n) for origin, n in tokens if n > limit]
    if not cut:
        return ""
    named = ", ".join(f"{origin} ({n:,})" for origin, n in cut[:NAMED]) + ", ..." * (len(cut) > NAMED)
    return f"{len(cut):,} of {len(tokens):,} captions are cut to {limit:,} tokens: {named}"
