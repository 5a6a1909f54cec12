"""The words of a CESQL expression (CESQL 1.0 section 2)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

KEYWORDS = frozenset(("AND", "OR", "XOR", "NOT", "LIKE", "EXISTS", "IN", "TRUE", "FALSE"))

Kind = Literal["word", "keyword", "integer", "string", "sign", "end"]

_TOKEN = re.compile(
    r"[ \t\r\n]*+(?:"
    r"(?P<word>[A-Za-z0-9_]++)"
    r"|(?P<string>'(?:[^'\\]|\\.)*+'|\"(?:[^\"\\]|\\.)*+\")"
    r"|(?P<sign><=|>=|<>|!=|[-+*/%=<>(),])"
    r"|(?P<end>\Z))",
    re.DOTALL,
)
_SPACE = re.compile(r"[ \t\r\n]*+")


class ParseError(ValueError):
    """`position` counts the characters before the place, from 0."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} at character {position}")
        self.position = position


@dataclass(frozen=True, slots=True)
class Token:
    kind: Kind
    text: str  # a keyword in capitals, a string without its quotes and escapes
    position: int

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else f"{self.kind} {self.text[:40]!r}"


def tokens(text: str) -> Iterator[Token]:
    """The tokens, the last one "end". Raises ParseError."""
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None:
            raise _unreadable(text, at)
        kind = match.lastgroup or ""
        position = match.start(kind)
        yield _token(kind, match[kind], position)
        if kind == "end":
            return
        at = match.end()


def _token(kind: str, text: str, position: int) -> Token:
    if kind == "word" and text.upper() in KEYWORDS:
        return Token("keyword", text.upper(), position)
    if kind == "word":
        return Token("integer" if text.isdigit() else "word", text, position)
    if kind == "string":
        # only the quote that encloses the string is escaped; other backslashes stand for themselves (LIKE needs them)
        return Token("string", text[1:-1].replace("\\" + text[0], text[0]), position)
    return Token("sign" if kind == "sign" else "end", text, position)


def _unreadable(text: str, at: int) -> ParseError:
    space = _SPACE.match(text, at)
    position = space.end() if space else at
    if text[position] in "'\"":
        return ParseError("the string has no closing quote", position)
    return ParseError(f"unexpected character {text[position]!r}", position)
