"""JSON objects whose members keep their source text, so that what is passed on does not change on the way (RFC 8259).

Stricter than json.loads: no NaN or Infinity, no member twice, nothing but UTF-8.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple, NoReturn

_SPACE = re.compile(r"[ \t\n\r]*+")
_SPARE_LEVELS = 200  # what a document may be deeper nested where it is read again than where it was checked


class JsonError(ValueError):
    """Says what is wrong and where."""


class JsonNumber(str):
    """A number as it was written."""

    __slots__ = ()


class JsonValue(NamedTuple):
    value: object  # as json.loads has it, numbers as JsonNumber
    source: str


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not allowed")


_DECODER = json.JSONDecoder(parse_int=JsonNumber, parse_float=JsonNumber, parse_constant=_refuse_constant)


def read_object(document: bytes) -> dict[str, JsonValue]:
    """The members of the object that is the whole document. Raises JsonError."""
    text = _decoded(document)
    members, end = _object_at(text, _skip(text, 0))
    _expect_end(text, end)
    return members


def read_array(document: bytes, *, items_max: int | None = None) -> list[dict[str, JsonValue]]:
    """The objects of the array that is the whole document. Raises JsonError."""
    text = _decoded(document)
    at = _after(text, _skip(text, 0), "[", "an array of objects")
    items: list[dict[str, JsonValue]] = []
    if text[at : at + 1] == "]":
        _expect_end(text, at + 1)
        return items
    while True:
        item, at = _object_at(text, at)
        items.append(item)
        if items_max is not None and len(items) > items_max:
            raise JsonError(f"more than {items_max} items; send several requests")
        if text[at : at + 1] == "]":
            _expect_end(text, at + 1)
            return items
        at = _after(text, at, ",", "a comma or the end of the array")


def is_document(data: bytes) -> bool:
    """Whether the bytes are one JSON value in UTF-8, nested so little that it can be read again anywhere."""
    try:
        text = data.decode()
        _DECODER.decode(text)
        if text.count("[") + text.count("{") > _SPARE_LEVELS:
            _DECODER.decode("[" * _SPARE_LEVELS + text + "]" * _SPARE_LEVELS)
    except (ValueError, RecursionError):
        return False
    return True


def _decoded(document: bytes) -> str:
    try:
        return document.decode("utf-8-sig")  # a byte order mark may be passed over
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from None


def _object_at(text: str, at: int) -> tuple[dict[str, JsonValue], int]:
    members: dict[str, JsonValue] = {}
    at = _after(text, at, "{", "an object")
    if text[at : at + 1] == "}":
        return members, _skip(text, at + 1)
    while True:
        name, at = _value_at(text, at, "a member name in double quotes")
        if not isinstance(name, str) or isinstance(name, JsonNumber):
            raise JsonError(f"expected a member name in double quotes before character {at}")
        if name in members:
            raise JsonError(f"the member {name[:60]!r} is there twice")
        start = _after(text, _skip(text, at), ":", "a colon")
        value, end = _value_at(text, start, "a value")
        members[name] = JsonValue(value, text[start:end])
        at = _skip(text, end)
        if text[at : at + 1] == "}":
            return members, _skip(text, at + 1)
        at = _after(text, at, ",", "a comma or the end of the object")


def _value_at(text: str, at: int, wanted: str) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise JsonError(f"expected {wanted} at character {at}: {error.msg}") from None
    except RecursionError:
        raise JsonError("too deeply nested") from None


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _after(text: str, at: int, sign: str, wanted: str) -> int:
    if text[at : at + 1] != sign:
        found = repr(text[at]) if at < len(text) else "the end"
        raise JsonError(f"expected {wanted} at character {at}, found {found}")
    return _skip(text, at + 1)


def _expect_end(text: str, at: int) -> None:
    at = _skip(text, at)
    if at != len(text):
        raise JsonError(f"expected the end at character {at}, found {text[at]!r}")
