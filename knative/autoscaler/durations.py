"""Durations in Go's notation, such as "1m30s", as every Knative setting writes them."""

from __future__ import annotations

import re
from decimal import Decimal

_UNIT_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # micro sign
    "μs": 1_000,  # Greek mu
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_TERM = r"(\d++(?:\.\d*+)?|\.\d++)(ns|us|µs|μs|ms|s|m|h)"
# possessive: where digits could belong to two terms, a long text that is no duration would take for ever
_DURATION = re.compile(rf"([+-]?)((?:{_TERM})++)", re.ASCII)
_TERMS = re.compile(_TERM, re.ASCII)
_MAX_NS = 2**63 - 1


def parse_duration_s(text: str) -> float:
    """Seconds of a duration like "60s", "1m30s", "-0.5s" or "0"; parts below a nanosecond are cut off.

    Raises ValueError in the words of Go's time.ParseDuration.
    """
    if text in ("0", "+0", "-0"):
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f'time: invalid duration "{text}"')
    total_ns = sum(int(Decimal(number) * _UNIT_NS[unit]) for number, unit in _TERMS.findall(match[2]))
    if total_ns > _MAX_NS:
        raise ValueError(f'time: invalid duration "{text}"')
    return (-total_ns if match[1] == "-" else total_ns) / 1e9


def format_duration(seconds: float) -> str:
    """The duration as Go prints it: "1h0m0s", "1m30s", "500ms", "0s"."""
    ns = round(abs(seconds) * 1e9)
    sign = "-" if seconds < 0 and ns else ""
    if ns == 0:
        return "0s"
    for unit in ("ns", "µs", "ms"):
        if ns < _UNIT_NS[unit] * 1000:
            return f"{sign}{_decimal(ns, _UNIT_NS[unit])}{unit}"
    minutes, rest_ns = divmod(ns, _UNIT_NS["m"])
    hours, minutes = divmod(minutes, 60)
    text = f"{_decimal(rest_ns, _UNIT_NS['s'])}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{sign}{hours}h{text}" if hours else sign + text


def _decimal(ns: int, unit_ns: int) -> str:
    whole, rest = divmod(ns, unit_ns)
    digits = f"{rest:0{len(str(unit_ns)) - 1}d}".rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)
