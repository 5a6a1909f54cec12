"""Values of CESQL and how they are cast, explicitly and to fit an operator (CESQL 1.0 sections 3.1, 3.3 and 3.7)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, assert_never

Value = str | int | bool
Type = Literal["String", "Integer", "Boolean"]
ErrorKind = Literal["math", "cast", "missingFunction", "functionEvaluation", "missingAttribute", "generic"]

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
ZERO: dict[Type, Value] = {"String": "", "Integer": 0, "Boolean": False}
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")


@dataclass(frozen=True, slots=True)
class EvaluationError:
    kind: ErrorKind
    message: str


@dataclass(frozen=True, slots=True)
class Result:
    """Every expression has a value, also after errors."""

    value: Value
    errors: tuple[EvaluationError, ...] = ()


def failed(value: Value, kind: ErrorKind, message: str) -> Result:
    return Result(value, (EvaluationError(kind, message),))


def type_of(value: Value) -> Type:
    if isinstance(value, bool):
        return "Boolean"
    return "Integer" if isinstance(value, int) else "String"


def cast(value: Value, to: Type) -> Result:
    """`value` as `to`; where that cannot be, the type's zero and a cast error."""
    if type_of(value) == to:
        return Result(value)
    match to:
        case "String":
            return Result(str(value).lower() if isinstance(value, bool) else str(value))
        case "Integer":
            return _to_integer(value)
        case "Boolean":
            return _to_boolean(value)
        case _:
            assert_never(to)


def bounded(number: int) -> Result:
    """An Integer; beyond 32 bits the nearest one and a math error, as the specification has it for ABS."""
    if INT_MIN <= number <= INT_MAX:
        return Result(number)
    return failed(INT_MAX if number > 0 else INT_MIN, "math", f"the result does not fit into 32 bits: {number}")


def _to_integer(value: Value) -> Result:
    if isinstance(value, bool):
        return Result(int(value))
    text = str(value)
    if _INTEGER.fullmatch(text) and INT_MIN <= int(text) <= INT_MAX:
        return Result(int(text))
    return failed(0, "cast", f"{text[:60]!r} is no 32-bit integer")


def _to_boolean(value: Value) -> Result:
    if isinstance(value, int):
        return Result(value != 0)
    lowered = value.lower()
    if lowered in ("true", "false"):
        return Result(lowered == "true")
    return failed(False, "cast", f"{value[:60]!r} is neither true nor false")
