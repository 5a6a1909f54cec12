"""CESQL: the test kit of the specification, and what it leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.eventing.cesql.expression import DEPTH_MAX, LENGTH_MAX, PATTERN_MAX, compile_expression
from knative.eventing.cesql.functions import TEXT_MAX
from knative.eventing.cesql.lexer import ParseError
from knative.eventing.cesql.values import Value

KIT = Path(__file__).resolve().parents[4] / "shared" / "specs" / "cloudevents" / "cesql_tck"
needs_kit = pytest.mark.skipif(
    not KIT.is_dir(), reason="NO TEST KIT: ../shared/specs/cloudevents/cesql_tck is not there"
)

EVENT: dict[str, Value] = {"specversion": "1.0", "id": "id", "source": "/s", "type": "t"}


class Loader(yaml.SafeLoader):
    """Reads timestamps as the text they are."""


Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def cases() -> list[Any]:
    found = []
    for path in sorted(KIT.glob("*.yaml")) if KIT.is_dir() else []:
        for case in yaml.load(path.read_text(), Loader)["tests"]:
            found.append(pytest.param(case, id=f"{path.stem}: {case['name']}"))
    return found


def outcome(expression: str, attributes: dict[str, Value] | None = None) -> tuple[Value, list[str]]:
    result = compile_expression(expression).evaluate(EVENT if attributes is None else attributes)
    return result.value, [error.kind for error in result.errors]


@needs_kit
def test_the_kit_is_complete() -> None:
    assert len(cases()) == 275


@needs_kit
@pytest.mark.parametrize("case", cases())
def test_the_kit(case: dict[str, Any]) -> None:
    expression = case["expression"]  # YAML makes a boolean of TRUE and an integer of 1
    text = expression if isinstance(expression, str) else str(expression).lower()
    if case.get("error") == "parse":
        with pytest.raises(ParseError):
            compile_expression(text)
        return
    event = case.get("event") or {**EVENT, **case.get("eventOverrides", {})}
    value, errors = outcome(text, event)
    assert (value, type(value)) == (case["result"], type(case["result"]))
    assert errors == ([case["error"]] if "error" in case else [])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("FALSE AND TRUE OR TRUE", False),  # from the right: FALSE AND (TRUE OR TRUE)
        ("TRUE OR TRUE AND FALSE", True),
        ("TRUE XOR TRUE OR FALSE", False),
        ("TRUE XOR FALSE XOR TRUE", False),
        ("TRUE XOR FALSE AND FALSE", True),
        ("NOT FALSE = FALSE", False),  # (NOT FALSE) = FALSE
        ("1 + 2 * 3 = 7", True),
        ("10 - 3 - 2", 5),
        ("4 -1", 3),
        ("2*-3", -6),
        ("+5", 5),
        ("-7 / 2", -3),
        ("-7 % 2", -1),
        ("7 % -2", 1),
        ("'a' NOT IN ('b')", True),
        ("id not like 'x%'", True),
        ("-2147483648", -2147483648),
        ("ID", "id"),
        ("1 IN ('x', 1)", False),
    ],
)
def test_grouping_and_numbers(expression: str, value: Value) -> None:
    assert outcome(expression)[0] == value


@pytest.mark.parametrize(
    ("expression", "value", "error"),
    [
        ("2147483647 + 1", 2147483647, "math"),
        ("-2147483648 - 1", -2147483648, "math"),
        ("65536 * 65536", 2147483647, "math"),
        ("-(-2147483648)", 2147483647, "math"),
        ("-2147483648 / -1", 2147483647, "math"),
        ("INT('2147483648')", 0, "cast"),
        ("INT(' 1')", 0, "cast"),
        ("'x' + 1", 0, "cast"),
        ("'x' < 1", False, "cast"),
        ("'x' = 1", False, "cast"),
        ("1 IN ('x', 1)", False, "cast"),
        ("LENGTH(missing)", 0, "missingAttribute"),
        ("CONCAT('a', missing)", "", "missingAttribute"),
        ("missing OR TRUE", False, "missingAttribute"),
        ("TRUE XOR missing", False, "missingAttribute"),
        ("NO_SUCH(1)", False, "missingFunction"),
        ("SUBSTRING('abc', 1, -1)", "", "functionEvaluation"),
    ],
)
def test_errors_come_with_values(expression: str, value: Value, error: str) -> None:
    assert outcome(expression) == (value, [error])


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("'abab' LIKE '%ab'", True),
        ("'aba' LIKE 'ab%ba'", False),
        ("'a.c' LIKE 'a.c'", True),
        ("'abc' LIKE 'a.c'", False),
        ("'' LIKE '%'", True),
        ("'' LIKE '_'", False),
        ("'a\nb' LIKE 'a_b'", True),
        ("'xaybzc' LIKE '%a_b%c'", True),
        ("'a' LIKE '%a%a%'", False),
        (r"'a\\b' LIKE 'a\\b'", True),
    ],
)
def test_like(text: str, matches: bool) -> None:
    assert outcome(text) == (matches, [])


def test_no_pattern_makes_like_explode() -> None:
    pattern = "%a" * 1000 + "%b"
    assert outcome(f"subject LIKE '{pattern}'", {"subject": "a" * 50_000}) == (False, [])


@pytest.mark.parametrize(
    ("expression", "message", "position"),
    [
        ("", "expected a value, found the end", 0),
        ("id = ", "expected a value, found the end", 5),
        ("id = 'abc", "no closing quote", 5),
        ("id == 'a'", "expected a value, found sign '='", 4),
        ("id LIKE type", "expected a pattern in quotes after LIKE", 8),
        ("id IN ()", "expected a value", 7),
        ("id id", "expected an operator or the end", 3),
        ("'it''s'", "expected an operator or the end, found string 's'", 4),
        ("(id", r"expected '\)', found the end", 3),
        ("EXISTS 'x'", "expected an attribute name after EXISTS", 7),
        ("a_b = 1", "expected a value, found word 'a_b'", 0),
        ("F1(2)", "is no function name", 0),
        ("2147483648", "is no 32-bit integer", 0),
        ("id ? 1", "unexpected character", 3),
        ("a NOT b", "expected an operator or the end, found keyword 'NOT'", 2),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(expression: str, message: str, position: int) -> None:
    with pytest.raises(ParseError, match=message) as caught:
        compile_expression(expression)
    assert caught.value.position == position


@pytest.mark.parametrize(
    "expression",
    [
        "(" * 4000 + "1" + ")" * 4000,
        "NOT " * 2000 + "TRUE",
        "-" * 4000 + "x",
        "1" + "+1" * 2000,
        "ABS(" * 2000 + "1" + ")" * 2000,
        "id IN (" * 1000 + "1" + ")" * 1000,
        "(1=" * 2000 + "1" + ")" * 2000,
        "1" * (LENGTH_MAX + 1),
        "id LIKE '" + "_" * (PATTERN_MAX + 1) + "'",
    ],
)
def test_hostile_nesting_and_length_are_refused(expression: str) -> None:
    with pytest.raises(ParseError):
        compile_expression(expression)


def test_what_is_just_allowed_is_evaluated() -> None:
    assert outcome("(" * (DEPTH_MAX - 1) + "TRUE" + ")" * (DEPTH_MAX - 1)) == (True, [])
    assert outcome("1" + "+1" * (DEPTH_MAX - 1)) == (DEPTH_MAX, [])
    assert outcome(" OR ".join(["id = 'x'"] * 600)) == (False, [])


def test_a_short_expression_makes_no_endless_text() -> None:
    within = outcome("LENGTH(CONCAT(" + "x," * 15 + "x))", {"x": "a" * (TEXT_MAX // 16)})
    assert within == (TEXT_MAX, [])
    beyond = outcome("CONCAT(" + "x," * 4000 + "x)", {"x": "a" * 1_000_000})
    assert beyond == ("", ["functionEvaluation"])
    assert outcome("CONCAT_WS(x, 'a', 'b', 'c')", {"x": "a" * TEXT_MAX}) == ("", ["functionEvaluation"])


def test_unknown_functions_are_known_before_evaluation() -> None:
    assert compile_expression("FOO(1) OR left('a')").missing_functions == ("FOO of 1 arguments", "LEFT of 1 arguments")


WORDS = st.sampled_from(
    ["id", "missing", "1", "0", "-1", "2147483647", "'a'", '"5"', "TRUE", "false", "AND", "OR", "XOR", "NOT", "LIKE",
     "'a%'", "IN", "(", ")", ",", "+", "-", "*", "/", "%", "=", "!=", "<=", "LENGTH(", "SUBSTRING(", "INT(", "BOOL(",
     "LEFT(", "EXISTS", "CONCAT_WS("]
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(WORDS, max_size=12).map(" ".join) | st.text(max_size=20))
def test_any_text_is_an_expression_or_a_parse_error(text: str) -> None:
    try:
        expression = compile_expression(text)
    except ParseError:
        return
    result = expression.evaluate({**EVENT, "id": "5"})
    assert isinstance(result.value, str | int)
    if isinstance(result.value, int):
        assert -(2**31) <= result.value < 2**31
