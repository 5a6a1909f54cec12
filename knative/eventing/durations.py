"""Durations in ISO 8601 notation, such as PT0.2S, as delivery settings have them.

After github.com/rickb777/date/period, which Knative uses: a year is 365.2425 days, a month a twelfth of it.
"""

from __future__ import annotations

import re

_DAY_S = 86_400.0
_YEAR_S = 365.2425 * _DAY_S
_UNITS_S = (_YEAR_S, _YEAR_S / 12, 7 * _DAY_S, _DAY_S, 3600.0, 60.0, 1.0)
_NUMBER = r"([0-9]{1,9}(?:[.,][0-9]{1,9})?)"
_DURATION = re.compile(
    rf"([+-]?)P(?=[0-9T])(?:{_NUMBER}Y)?(?:{_NUMBER}M)?(?:{_NUMBER}W)?(?:{_NUMBER}D)?"
    rf"(?:T(?=[0-9])(?:{_NUMBER}H)?(?:{_NUMBER}M)?(?:{_NUMBER}S)?)?"
)


def parse_iso_duration_s(text: str) -> float:
    """Seconds of "PT0.2S", "PT1M30S", "P1DT12H", "-PT1S". Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("expected an ISO 8601 duration, such as PT0.2S or PT1M30S")
    sign, *numbers = match.groups()
    total_s = sum(
        float(number.replace(",", ".")) * unit_s
        for number, unit_s in zip(numbers, _UNITS_S, strict=True)
        if number is not None
    )
    return -total_s if sign == "-" else total_s
