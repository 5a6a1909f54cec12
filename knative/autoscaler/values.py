"""Numbers and truth values in Go's notation, as annotations and ConfigMaps hold them. All raise ValueError."""

from __future__ import annotations

import math
import re

INT32_MAX = 2**31 - 1

_INT = re.compile(r"[+-]?\d+", re.ASCII)
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BOOLS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "FALSE", "false", "False"), False
)


class OutOfRange(ValueError):
    """A number, but not one of 32 bits."""


def parse_int32(text: str) -> int:
    """After strconv.ParseInt(text, 10, 32). Raises OutOfRange for an integer that does not fit."""
    if not _INT.fullmatch(text):
        raise ValueError(f'parsing "{text}": invalid syntax')
    # int() refuses thousands of digits, which no 32-bit number has
    value = int(text) if len(text) < 1000 else INT32_MAX + 1
    if not -INT32_MAX - 1 <= value <= INT32_MAX:
        raise OutOfRange(f'parsing "{text}": value out of range')
    return value


def parse_float(text: str) -> float:
    """After strconv.ParseFloat, but finite: no setting means anything as infinity or as no number."""
    value = float(text) if _FLOAT.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f'parsing "{text}": invalid syntax')
    return value


def parse_bool(text: str) -> bool:
    """After strconv.ParseBool."""
    if text not in _BOOLS:
        raise ValueError(f'parsing "{text}": invalid syntax')
    return _BOOLS[text]


def format_number(value: float) -> str:
    """Shortest decimal, without ".0" of a whole number (as Go's %v prints it)."""
    return str(int(value)) if float(value).is_integer() else repr(value)
