"""What the operators of CESQL do with values (CESQL 1.0 section 3.4).

An operand with errors makes the whole operation the zero value of its type, with those errors: `1 / missing` is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from knative.eventing.cesql.functions import Function
from knative.eventing.cesql.like import LikePattern
from knative.eventing.cesql.values import ZERO, Result, Type, Value, bounded, cast, failed, type_of

Attributes = Mapping[str, Value]
Evaluate = Callable[[Attributes], Result]
LogicOperator = Literal["AND", "OR", "XOR"]

TRUE, FALSE = Result(True), Result(False)


def literal(value: Value) -> Evaluate:
    result = Result(value)
    return lambda attributes: result


def attribute(name: str) -> Evaluate:
    def evaluate(attributes: Attributes) -> Result:
        value = attributes.get(name)
        if value is None:
            return failed(False, "missingAttribute", f"the event has no attribute {name}")
        return Result(value)

    return evaluate


def exists(name: str) -> Evaluate:
    return lambda attributes: TRUE if name in attributes else FALSE


def negation(operand: Evaluate) -> Evaluate:
    """NOT. Of a value that is no boolean it is true, with a cast error: so the specification's test kit has it, which
    also counts integers to those values, though BOOL() takes them."""

    def evaluate(attributes: Attributes) -> Result:
        result = operand(attributes)
        if result.errors:
            return Result(False, result.errors)
        if type_of(result.value) == "Integer":
            return failed(True, "cast", f"NOT of the integer {result.value}; use BOOL() first")
        truth = cast(result.value, "Boolean")
        return Result(not truth.value, truth.errors)

    return evaluate


def logic(operands: Sequence[Evaluate], operators: Sequence[LogicOperator]) -> Evaluate:
    """A chain of AND, OR, XOR, grouped from the right: what stands to the right is evaluated only where it matters."""

    def evaluate(attributes: Attributes) -> Result:
        flipped = False  # by the XORs passed
        for index, operand in enumerate(operands):
            truth = _as(operand(attributes), "Boolean")
            if truth.errors:
                return Result(False, truth.errors)
            operator = operators[index] if index < len(operators) else None
            if operator is None or (operator == "AND" and not truth.value) or (operator == "OR" and truth.value):
                return TRUE if bool(truth.value) != flipped else FALSE
            if operator == "XOR":
                flipped ^= bool(truth.value)
        raise AssertionError("a chain ends with an operand")

    return evaluate


def equality(left: Evaluate, right: Evaluate, *, negated: bool) -> Evaluate:
    """= and !=: the left side is cast to the type of the right one."""

    def evaluate(attributes: Attributes) -> Result:
        first = left(attributes)
        if first.errors:
            return Result(False, first.errors)
        second = right(attributes)
        if second.errors:
            return Result(False, second.errors)
        first = cast(first.value, type_of(second.value))
        return Result((first.value == second.value) != negated) if not first.errors else Result(False, first.errors)

    return evaluate


def integers(left: Evaluate, right: Evaluate, operate: Callable[[int, int], Result], returns: Type) -> Evaluate:
    """An operator on two integers."""

    def evaluate(attributes: Attributes) -> Result:
        numbers = []
        for operand in (left, right):
            number = _as(operand(attributes), "Integer")
            if number.errors:
                return Result(ZERO[returns], number.errors)
            numbers.append(int(number.value))
        return operate(*numbers)

    return evaluate


def minus(operand: Evaluate) -> Evaluate:
    def evaluate(attributes: Attributes) -> Result:
        number = _as(operand(attributes), "Integer")
        return bounded(-int(number.value)) if not number.errors else Result(0, number.errors)

    return evaluate


def like(operand: Evaluate, pattern: str, *, negated: bool) -> Evaluate:
    compiled = LikePattern(pattern)

    def evaluate(attributes: Attributes) -> Result:
        text = _as(operand(attributes), "String")
        if text.errors:
            return Result(False, text.errors)
        return Result(compiled.matches(str(text.value)) != negated)

    return evaluate


def membership(operand: Evaluate, members: Sequence[Evaluate], *, negated: bool) -> Evaluate:
    """IN: members are cast to the type of the left side, one after the other up to the first that is equal."""

    def evaluate(attributes: Attributes) -> Result:
        wanted = operand(attributes)
        if wanted.errors:
            return Result(False, wanted.errors)
        for member in members:
            found = _as(member(attributes), type_of(wanted.value))
            if found.errors:
                return Result(False, found.errors)
            if found.value == wanted.value:
                return Result(not negated)
        return Result(negated)

    return evaluate


def call(function: Function, arguments: Sequence[Evaluate]) -> Evaluate:
    def evaluate(attributes: Attributes) -> Result:
        values = []
        for index, argument in enumerate(arguments):
            wanted = function.parameter(index)
            result = argument(attributes)
            result = _as(result, wanted) if wanted else result
            if result.errors:
                return Result(ZERO[function.returns], result.errors)
            values.append(result.value)
        return function.call(*values)

    return evaluate


def missing_function(name: str, count: int) -> Evaluate:
    result = failed(False, "missingFunction", f"there is no function {name} of {count} arguments")
    return lambda attributes: result


def divided(dividend: int, divisor: int) -> Result:
    if divisor == 0:
        return failed(0, "math", f"{dividend} divided by zero")
    quotient = abs(dividend) // abs(divisor)
    return bounded(quotient if (dividend < 0) == (divisor < 0) else -quotient)


def remainder(dividend: int, divisor: int) -> Result:
    """With the sign of the dividend."""
    if divisor == 0:
        return failed(0, "math", f"remainder of {dividend} by zero")
    rest = abs(dividend) % abs(divisor)
    return Result(-rest if dividend < 0 else rest)


def _as(result: Result, to: Type) -> Result:
    return result if result.errors else cast(result.value, to)
