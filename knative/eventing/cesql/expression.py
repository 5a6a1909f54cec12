"""CESQL text to an expression, by precedence climbing (grammar of CESQL 1.0, cesql/CESQLParser.g4).

From tightest to loosest: NOT and minus; LIKE and IN; * / %; + -; comparisons; AND, OR and XOR (from the right).
More than upstream's lexer: `4 -1` is a subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from knative.eventing.cesql import evaluation as ops
from knative.eventing.cesql import functions
from knative.eventing.cesql.lexer import ParseError, Token, tokens
from knative.eventing.cesql.values import INT_MAX, INT_MIN, Result, Type, Value, bounded

LENGTH_MAX = 8192  # characters of an expression
PATTERN_MAX = 2048  # characters after LIKE: matching takes this times the length of the attribute
DEPTH_MAX = 64  # operators and parentheses inside one another; a chain of AND, OR, XOR counts as one

_LIKE_RANK = 4
_RANKS = {"*": 3, "/": 3, "%": 3, "+": 2, "-": 2, "=": 1, "!=": 1, "<>": 1, "<": 1, "<=": 1, ">": 1, ">=": 1}
_ON_INTEGERS: dict[str, tuple[Callable[[int, int], Result], Type]] = {
    "*": (lambda left, right: bounded(left * right), "Integer"),
    "/": (ops.divided, "Integer"),
    "%": (ops.remainder, "Integer"),
    "+": (lambda left, right: bounded(left + right), "Integer"),
    "-": (lambda left, right: bounded(left - right), "Integer"),
    "<": (lambda left, right: Result(left < right), "Boolean"),
    "<=": (lambda left, right: Result(left <= right), "Boolean"),
    ">": (lambda left, right: Result(left > right), "Boolean"),
    ">=": (lambda left, right: Result(left >= right), "Boolean"),
}
_LOGIC = ("AND", "OR", "XOR")


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression; free of state. `missing_functions` are calls that no function answers: such a call is an
    error each time it is evaluated, so whoever takes expressions from people can refuse them."""

    text: str
    missing_functions: tuple[str, ...]
    _evaluate: ops.Evaluate

    def evaluate(self, attributes: Mapping[str, Value]) -> Result:
        """The value for an event with these attributes, and the errors met. Raises nothing."""
        return self._evaluate(attributes)


def compile_expression(text: str) -> Expression:
    """Raises ParseError for what is no CESQL, is longer than LENGTH_MAX or PATTERN_MAX, or nested deeper than
    DEPTH_MAX."""
    if len(text) > LENGTH_MAX:
        raise ParseError(f"the expression has {len(text)} characters, at most {LENGTH_MAX} are taken", LENGTH_MAX)
    parser = _Parser(list(tokens(text)))
    part = parser.whole()
    return Expression(text, tuple(parser.missing_functions), part.evaluate)


@dataclass(frozen=True, slots=True)
class _Part:
    evaluate: ops.Evaluate
    depth: int = 1


class _Parser:
    def __init__(self, stream: list[Token]) -> None:
        self._tokens = stream
        self._at = 0
        self._nesting = 0
        self.missing_functions: list[str] = []

    def whole(self) -> _Part:
        part = self._expression()
        if self._next.kind != "end":
            raise self._unexpected("an operator or the end")
        return part

    def _expression(self) -> _Part:
        """A chain of AND, OR, XOR."""
        self._enter()
        operands, operators = [self._binary(0)], []
        while self._next.kind == "keyword" and self._next.text in _LOGIC:
            operators.append(cast(ops.LogicOperator, self._take().text))
            operands.append(self._binary(0))
        self._nesting -= 1
        if not operators:
            return operands[0]
        return self._part(ops.logic([operand.evaluate for operand in operands], operators), *operands)

    def _binary(self, rank_min: int) -> _Part:
        left = self._unary()
        while True:
            left_or_none = self._like_or_in(left) if rank_min <= _LIKE_RANK else None
            if left_or_none is not None:
                left = left_or_none
                continue
            sign = self._next
            rank = _RANKS.get(sign.text) if sign.kind == "sign" else None
            if rank is None or rank < rank_min:
                return left
            self._take()
            right = self._binary(rank + 1)
            left = self._part(_operation(sign.text, left.evaluate, right.evaluate), left, right)

    def _like_or_in(self, left: _Part) -> _Part | None:
        """What follows `left`: [NOT] LIKE 'pattern' or [NOT] IN (members); None if neither does."""
        negated = self._is_keyword("NOT") and self._is_keyword("LIKE", "IN", ahead=1)
        if not negated and not self._is_keyword("LIKE", "IN"):
            return None
        if negated:
            self._take()
        if self._take().text == "LIKE":
            position = self._next.position
            pattern = self._expect("string", wanted="a pattern in quotes after LIKE").text
            if len(pattern) > PATTERN_MAX:
                raise ParseError(
                    f"the pattern has {len(pattern)} characters, at most {PATTERN_MAX} are taken", position
                )
            return self._part(ops.like(left.evaluate, pattern, negated=negated), left)
        self._expect("sign", "(", wanted="'(' after IN")
        members = self._list_to_parenthesis()
        evaluates = [member.evaluate for member in members]
        return self._part(ops.membership(left.evaluate, evaluates, negated=negated), left, *members)

    def _unary(self) -> _Part:
        token = self._next
        if self._is_keyword("NOT"):
            operand = self._operand()
            return self._part(ops.negation(operand.evaluate), operand)
        if token.kind == "sign" and token.text in "+-" and self._ahead(1).kind == "integer":
            self._take()
            return self._integer(token.text)
        if token.kind == "sign" and token.text == "-":
            operand = self._operand()
            return self._part(ops.minus(operand.evaluate), operand)
        return self._primary()

    def _operand(self) -> _Part:
        """What the unary operator at hand is applied to."""
        self._take()
        self._enter()
        operand = self._unary()
        self._nesting -= 1
        return operand

    def _primary(self) -> _Part:
        token = self._next
        if token.kind == "integer":
            return self._integer("")
        if token.kind == "sign" and token.text == "(":
            self._take()
            part = self._expression()
            self._expect("sign", ")", wanted="')'")
            return part
        if token.kind == "string" or self._is_keyword("TRUE", "FALSE"):
            self._take()
            return _Part(ops.literal(token.text if token.kind == "string" else token.text == "TRUE"))
        if self._is_keyword("EXISTS"):
            self._take()
            return _Part(ops.exists(self._name("an attribute name after EXISTS")))
        if token.kind == "word" and self._ahead(1).text == "(" and self._ahead(1).kind == "sign":
            return self._call()
        return _Part(ops.attribute(self._name("a value")))

    def _integer(self, sign: str) -> _Part:
        token = self._take()
        digits = token.text.lstrip("0") or "0"
        if len(digits) > 10 or not INT_MIN <= int(sign + digits) <= INT_MAX:
            raise ParseError(f"{sign}{token.text[:40]} is no 32-bit integer", token.position)
        return _Part(ops.literal(int(sign + digits)))

    def _name(self, wanted: str) -> str:
        """The attribute name, in any case; digits alone are an integer everywhere else."""
        token = self._next
        if token.kind not in ("word", "integer") or "_" in token.text:
            raise self._unexpected(wanted)
        return self._take().text.lower()

    def _call(self) -> _Part:
        name = self._take()
        if any(character.isdigit() for character in name.text):
            raise ParseError(f"{name.text[:40]!r} is no function name", name.position)
        self._take()
        closed = self._next.kind == "sign" and self._next.text == ")"
        arguments = [] if closed else self._list_to_parenthesis()
        if closed:
            self._take()
        function = functions.find(name.text, len(arguments))
        if function is None:
            self.missing_functions.append(f"{name.text.upper()} of {len(arguments)} arguments")
            return self._part(ops.missing_function(name.text.upper(), len(arguments)), *arguments)
        return self._part(ops.call(function, [argument.evaluate for argument in arguments]), *arguments)

    def _list_to_parenthesis(self) -> list[_Part]:
        parts = [self._expression()]
        while self._next.kind == "sign" and self._next.text == ",":
            self._take()
            parts.append(self._expression())
        self._expect("sign", ")", wanted="',' or ')'")
        return parts

    def _part(self, evaluate: ops.Evaluate, *children: _Part) -> _Part:
        depth = 1 + max((child.depth for child in children), default=0)
        if depth > DEPTH_MAX:
            raise self._too_deep()
        return _Part(evaluate, depth)

    def _enter(self) -> None:
        self._nesting += 1
        if self._nesting > DEPTH_MAX:
            raise self._too_deep()

    def _too_deep(self) -> ParseError:
        return ParseError(f"more than {DEPTH_MAX} operators inside one another", self._next.position)

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _ahead(self, count: int) -> Token:
        return self._tokens[min(self._at + count, len(self._tokens) - 1)]

    def _is_keyword(self, *words: str, ahead: int = 0) -> bool:
        token = self._ahead(ahead)
        return token.kind == "keyword" and token.text in words

    def _take(self) -> Token:
        token = self._next
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _expect(self, kind: str, text: str | None = None, *, wanted: str) -> Token:
        if self._next.kind != kind or (text is not None and self._next.text != text):
            raise self._unexpected(wanted)
        return self._take()

    def _unexpected(self, wanted: str) -> ParseError:
        return ParseError(f"expected {wanted}, found {self._next}", self._next.position)


def _operation(sign: str, left: ops.Evaluate, right: ops.Evaluate) -> ops.Evaluate:
    if sign in ("=", "!=", "<>"):
        return ops.equality(left, right, negated=sign != "=")
    operate, returns = _ON_INTEGERS[sign]
    return ops.integers(left, right, operate, returns)
