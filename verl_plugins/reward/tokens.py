"""An answer in normal form as tokens, and its parts between separators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class NotUnderstood(Exception):
    """A text that is no answer this grammar knows; the message says where it stopped."""


class Token(NamedTuple):
    kind: str
    text: str
    spaced: bool
    """Whether a space stands before it."""
    start: int
    end: int


_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)|(?P<command>\\[A-Za-z]+|\\.)"
    r"|(?P<letters>[^\W\d_]+)|(?P<sign>[^\s\w]|_)|(?P<space>\s+)"
)


def tokens(text: str) -> list[Token]:
    """The tokens of a text in normal form."""
    found, spaced = [], False
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "space":
            spaced = True
            continue
        found.append(Token(match.lastgroup, match[0], spaced, match.start(), match.end()))
        spaced = False
    return found


def pieces(text: str, separators: set[str]) -> Iterator[tuple[str, str]]:
    """The parts of a text between separators outside of brackets, each with the separator before it."""
    depth, start, before = 0, 0, ""
    for token in tokens(text):
        if token.text in ("(", "[", "{", "\\{", "\\langle") or token.text == "\\begin":
            depth += 1
        elif token.text in (")", "]", "}", "\\}", "\\rangle") or token.text == "\\end":
            depth -= 1
        elif depth == 0 and token.text in separators:
            yield text[start : token.start].strip(), before
            start, before = token.end, token.text
    yield text[start:].strip(), before
