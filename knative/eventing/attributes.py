"""What the attributes of a CloudEvent may be (CloudEvents spec 1.0.2, sections "Type System" and "Context Attributes").

URIs are checked against RFC 3986, timestamps against RFC 3339, content types against RFC 2046. Knative's SDK takes some
more (spaces in a source, for one); what it takes beyond the specification is refused here with the reason.
"""

from __future__ import annotations

import re
from datetime import datetime

_NAME = re.compile(r"[a-z0-9]++")
_PLANE_ENDS = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
_FORBIDDEN = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_PLANE_ENDS}]")

_CHARACTER = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@]|%[0-9A-Fa-f]{2})"
_URI_REFERENCE = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*+):)?+"
    rf"(?P<authority>//(?:{_CHARACTER}|[\[\]])*+)?+"
    rf"(?P<path>(?:{_CHARACTER}|/)*+)"
    rf"(?:\?(?:{_CHARACTER}|[/?])*+)?+(?:#(?:{_CHARACTER}|[/?])*+)?+"
)
_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}):([0-9]{2})(?:\.[0-9]++)?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_TOKEN = r"[A-Za-z0-9!#$%&'*+\-.^_`|~]++"
_QUOTED = r'"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\[\x20-\x7e])*+"'
_MEDIA_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?: *+; *+(?:{_TOKEN}=(?:{_TOKEN}|{_QUOTED}))?+)*+")
_CHARSET = re.compile(rf"; *+charset=({_TOKEN}|{_QUOTED})", re.IGNORECASE)


def problem_of(name: str, text: str) -> str | None:
    """What is wrong with the attribute, in words for people; None if nothing."""
    if _NAME.fullmatch(name) is None or name == "data":
        return (
            f"the attribute name {name[:60]!r} is not allowed, use lower-case ASCII letters and digits, and not 'data'"
        )
    if not (text.isascii() and text.isprintable()) and (match := _FORBIDDEN.search(text)):
        return f"{name} holds the character U+{ord(match[0]):04X}; control characters and noncharacters are not allowed"
    if not text and name in _NEVER_EMPTY:
        return f"{name} must not be empty"
    check = _CHECKS.get(name)
    return check(text) if check else None


def charset(content_type: str) -> str:
    """The charset parameter of a media type in lower case; "" if there is none."""
    match = _CHARSET.search(content_type)
    return match[1].strip('"').lower() if match else ""


def _version_problem(text: str) -> str | None:
    return None if text == "1.0" else f"specversion is {text[:20]!r}, must be '1.0'"


def _source_problem(text: str) -> str | None:
    match = _URI_REFERENCE.fullmatch(text)
    if match is None or (match["scheme"] is None and match["authority"] is None and ":" in _first_segment(match)):
        return f"source {text[:80]!r} is no URI-reference (RFC 3986); write other characters as %XY"
    return None


def _first_segment(match: re.Match[str]) -> str:
    return match["path"].partition("/")[0]


def _schema_problem(text: str) -> str | None:
    match = _URI_REFERENCE.fullmatch(text)
    if match is None or match["scheme"] is None:
        return f"dataschema {text[:80]!r} is no absolute URI (RFC 3986), such as https://example.com/schema"
    return None


def _time_problem(text: str) -> str | None:
    match = _TIME.fullmatch(text)
    if match is not None:
        second = "59" if match[3] == "60" else match[3]  # a leap second
        try:
            datetime.fromisoformat(f"{match[1]}T{match[2]}:{second}")
        except ValueError:
            pass
        else:
            return None
    return f"time {text[:40]!r} is no RFC 3339 timestamp, such as 2018-04-05T17:31:00Z"


def _content_type_problem(text: str) -> str | None:
    if _MEDIA_TYPE.fullmatch(text):
        return None
    return f"datacontenttype {text[:80]!r} is no media type (RFC 2046), such as application/json"


_NEVER_EMPTY = frozenset(("id", "source", "specversion", "type", "dataschema", "subject"))
_CHECKS = {
    "specversion": _version_problem,
    "source": _source_problem,
    "dataschema": _schema_problem,
    "time": _time_problem,
    "datacontenttype": _content_type_problem,
}
