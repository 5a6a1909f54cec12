"""CPU and memory quantities: "500m", "1Gi", 2. After k8s.io/apimachinery pkg/api/resource/quantity.go."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_FORM = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?P<suffix>[KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,3}|)"
)
_BINARY = {f"{letter}i": Decimal(1024**power) for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL = {
    "": 0, "n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18,
}  # fmt: skip
_MAX = Decimal(2**63 - 1)
_DIGITS_MAX = 64


def parse_quantity(value: object) -> Decimal:
    """The number that a quantity stands for. Raises ValueError with the form that is allowed."""
    text = _text(value)
    match = _FORM.fullmatch(text) if len(text) <= _DIGITS_MAX else None
    if match is None:
        raise ValueError('a quantity is a number with an optional unit, such as "500m", "2", "512Mi" or "1.5Gi"')
    quantity = Decimal(match["number"]) * _factor(match["suffix"])
    if abs(quantity) > _MAX:
        raise ValueError("a quantity is at most 2^63-1")
    return quantity


def parse_cpus(value: object) -> float:
    """Cores: "500m" is 0.5. Raises ValueError."""
    return float(_not_negative(parse_quantity(value)))


def parse_memory_bytes(value: object) -> int:
    """Bytes, a fraction rounded up: "1Gi" is 1073741824. Raises ValueError."""
    return math.ceil(_not_negative(parse_quantity(value)))


def parse_count(value: object) -> int:
    """Whole devices, such as GPUs. Raises ValueError for a fraction."""
    quantity = _not_negative(parse_quantity(value))
    if quantity != int(quantity):
        raise ValueError("devices are counted in whole numbers")
    return int(quantity)


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a quantity is a number or text")
    return repr(value) if isinstance(value, float) else str(value)


def _factor(suffix: str) -> Decimal:
    if suffix in _BINARY:
        return _BINARY[suffix]
    # "E" alone is exa, with digits behind it an exponent
    exponent = _DECIMAL[suffix] if suffix in _DECIMAL else int(suffix[1:])
    return Decimal(1).scaleb(exponent)


def _not_negative(quantity: Decimal) -> Decimal:
    if quantity < 0:
        raise ValueError("must be greater than or equal to 0")
    return quantity
