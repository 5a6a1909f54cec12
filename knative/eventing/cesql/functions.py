"""The built-in functions (CESQL 1.0 section 3.5). Arguments arrive in the types that the signature asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from knative.eventing.cesql.values import Result, Type, Value, bounded, cast, failed


@dataclass(frozen=True, slots=True)
class Function:
    """`parameters` are the fixed ones; `rest` is the type of any number more. None as a type takes any value."""

    call: Callable[..., Result]
    parameters: tuple[Type | None, ...]
    returns: Type
    rest: Type | None = None

    def takes(self, count: int) -> bool:
        return count == len(self.parameters) or (self.rest is not None and count > len(self.parameters))

    def parameter(self, index: int) -> Type | None:
        return self.parameters[index] if index < len(self.parameters) else self.rest


TEXT_MAX = 1 << 20  # characters of a result; an expression can name a long attribute thousands of times


def find(name: str, count: int) -> Function | None:
    """The function of that name (in any case) for `count` arguments."""
    return next((function for function in _FUNCTIONS.get(name.upper(), ()) if function.takes(count)), None)


def names() -> list[str]:
    return sorted(_FUNCTIONS)


def _left(text: str, count: int) -> Result:
    if count < 0:
        return failed(text, "functionEvaluation", f"LEFT of {count} characters")
    return Result(text[:count])


def _right(text: str, count: int) -> Result:
    if count < 0:
        return failed(text, "functionEvaluation", f"RIGHT of {count} characters")
    return Result(text[-count:] if count else "")


def _substring(text: str, position: int, length: int | None = None) -> Result:
    """Characters count from 1; a negative position counts from the end; position 0 gives nothing."""
    if not -len(text) <= position <= len(text):
        return failed("", "functionEvaluation", f"SUBSTRING from {position} of {len(text)} characters")
    if length is not None and length < 0:
        return failed("", "functionEvaluation", f"SUBSTRING of {length} characters")
    if position == 0:
        return Result("")
    start = position - 1 if position > 0 else len(text) + position
    return Result(text[start:] if length is None else text[start : start + length])


def _concat(*texts: str) -> Result:
    return _concat_ws("", *texts)


def _concat_ws(delimiter: str, *texts: str) -> Result:
    length = sum(map(len, texts)) + len(delimiter) * max(0, len(texts) - 1)
    if length > TEXT_MAX:
        return failed("", "functionEvaluation", f"CONCAT to {length} characters, at most {TEXT_MAX} are made")
    return Result(delimiter.join(texts))


def _integer(value: Value) -> Result:
    return cast(value, "Integer")


def _boolean(value: Value) -> Result:
    return cast(value, "Boolean")


def _string(value: Value) -> Result:
    return cast(value, "String")


_FUNCTIONS: dict[str, tuple[Function, ...]] = {
    "INT": (Function(_integer, (None,), "Integer"),),
    "BOOL": (Function(_boolean, (None,), "Boolean"),),
    "STRING": (Function(_string, (None,), "String"),),
    "ABS": (Function(lambda number: bounded(abs(number)), ("Integer",), "Integer"),),
    "LENGTH": (Function(lambda text: Result(len(text)), ("String",), "Integer"),),
    "CONCAT": (Function(_concat, (), "String", rest="String"),),
    "CONCAT_WS": (Function(_concat_ws, ("String",), "String", rest="String"),),
    "LOWER": (Function(lambda text: Result(text.lower()), ("String",), "String"),),
    "UPPER": (Function(lambda text: Result(text.upper()), ("String",), "String"),),
    "TRIM": (Function(lambda text: Result(text.strip()), ("String",), "String"),),
    "LEFT": (Function(_left, ("String", "Integer"), "String"),),
    "RIGHT": (Function(_right, ("String", "Integer"), "String"),),
    "SUBSTRING": (
        Function(_substring, ("String", "Integer"), "String"),
        Function(_substring, ("String", "Integer", "Integer"), "String"),
    ),
}
