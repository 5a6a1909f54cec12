"""Which events a Trigger's filter passes, and what is said about wrong filters."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.errors import ValidationError
from knative.eventing.event import CloudEvent
from knative.eventing.filters import CESQL_CHARACTERS_MAX, ENTRIES_MAX, compile_filter
from knative.resources.field_errors import ERRORS_MAX

EVENT = CloudEvent.build(
    {
        "specversion": "1.0",
        "id": "1",
        "source": "/shop/orders",
        "type": "com.example.created",
        "subject": "a b",
        "time": "2018-04-05T17:31:00Z",
        "datacontenttype": "text/plain; charset=utf-8",
        "dataschema": "https://example.com/s",
        "number": 10,
        "flag": True,
        "text": "10",
        "empty": "",
    }
)


def passes(spec: str, event: CloudEvent = EVENT) -> bool:
    return compile_filter(yaml.safe_load(spec) or {}).passes(event)


@pytest.mark.parametrize(
    ("spec", "passed"),
    [
        ("", True),
        ("filter: {}", True),
        ("filter: {attributes: {}}", True),
        ("filters: []", True),
        ("filter: {attributes: {type: com.example.created, source: /shop/orders}}", True),
        ("filter: {attributes: {type: com.example.created, source: /other}}", False),
        ('filter: {attributes: {subject: ""}}', True),
        ('filter: {attributes: {missing: ""}}', False),
        ('filter: {attributes: {empty: ""}}', False),
        ('filter: {attributes: {text: "10"}}', True),
        ('filter: {attributes: {number: "10"}}', False),  # a number equals no string
        ('filter: {attributes: {number: ""}}', True),
        ('filters: [{exact: {number: "10", flag: "true"}}]', True),  # the text is compared
        ("filter: {attributes: {schemaurl: https://example.com/s, datamediatype: text/plain}}", True),
        ("filters: [{exact: {time: '2018-04-05T17:31:00Z', id: '1'}}]", True),
        ("filters: [{exact: {missing: x}}]", False),
        ("filters: [{prefix: {type: com.example., source: /shop}}]", True),
        ("filters: [{prefix: {type: com.example., source: shop}}]", False),
        ("filters: [{suffix: {type: .created}}]", True),
        ("filters: [{suffix: {missing: x}}]", False),
        ("filters: [{not: {exact: {missing: x}}}]", True),
        ("filters: [{prefix: {type: com}}, {suffix: {type: .deleted}}]", False),
        ("filters: [{any: [{exact: {id: '2'}}, {exact: {id: '1'}}]}]", True),
        ("filters: [{any: [{exact: {id: '2'}}, {exact: {id: '3'}}]}]", False),
        ("filters: [{all: [{exact: {id: '1'}}, {not: {exact: {id: '2'}}}]}]", True),
        ("filters: [{cesql: \"type LIKE 'com.%' AND number = 10 AND flag\"}]", True),
        ("filters: [{cesql: \"missing = 'x'\"}]", False),
        ('filters: [{cesql: "NOT EXISTS missing"}]', True),
        ('filters: [{cesql: "number"}]', False),  # no boolean
        ('filters: [{cesql: "text"}]', False),
        ('filters: [{cesql: "1 / 0 = 0"}]', False),  # true, with an error
        ('filters: [{not: {cesql: "1 / 0 = 0"}}]', True),
        ("{filter: {attributes: {type: other}}, filters: [{exact: {id: '1'}}]}", True),  # filters win
        ("{filter: {attributes: {type: other}}, filters: []}", False),
    ],
)
def test_what_passes(spec: str, passed: bool) -> None:
    assert passes(spec) is passed


@pytest.mark.parametrize(
    ("spec", "problems"),
    [
        (
            "filter: {attributes: {My-Attr: x, 1st: y}}",
            [
                'invalid key name "My-Attr": spec.filter.attributes[My-Attr]\n'
                "Attribute name must start with a letter and can only contain lowercase alphanumeric",
                'invalid key name "1st": spec.filter.attributes[1st]\n'
                "Attribute name must start with a letter and can only contain lowercase alphanumeric",
            ],
        ),
        ("filter: [x]", ["invalid value: ['x']: spec.filter\nexpected a mapping with attributes"]),
        ("filter: {type: x}", ['unknown field "spec.filter.type"']),
        (
            "filter: {attributes: {number: 10}}",
            ["invalid value: 10: spec.filter.attributes[number]\nexpected a string; put the value into quotes"],
        ),
        (
            "filters: [{exact: {id: x}, prefix: {id: y}}]",
            ["multiple dialects found, filters can have only one dialect set: spec.filters[0]"],
        ),
        (
            "filters: [{exact: {id: x}}, {any: [{suffix: {id: ''}}]}]",
            ["invalid value: : spec.filters[1].any[0].suffix[id]\nmust not be empty"],
        ),
        (
            "filters: [{cesql: 'id = '}]",
            ["invalid value: id = : spec.filters[0].cesql\nexpected a value, found the end at character 5"],
        ),
        (
            "filters: [{cesql: 'FOO(id)'}]",
            ["invalid value: FOO(id): spec.filters[0].cesql\nthere is no function FOO of 1 arguments"],
        ),
        (
            "filters: {exact: {id: x}}",
            ["invalid value: {'exact': {'id': 'x'}}: spec.filters\nexpected a list of filters"],
        ),
        (
            "filters: [{exact: 5}]",
            ["invalid value: 5: spec.filters[0].exact\nexpected attribute names with their values"],
        ),
        ("filters: [{cesql: 5}]", ["invalid value: 5: spec.filters[0].cesql\nexpected a CESQL expression as a string"]),
    ],
)  # fmt: skip
def test_wrong_filters_are_named_by_path(spec: str, problems: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        compile_filter(yaml.safe_load(spec))
    assert list(caught.value.problems) == problems


@pytest.mark.parametrize("entry", [{}, {"exact": {}}, {"all": []}, {"not": {}}, {"cesql": ""}])
def test_an_entry_without_a_dialect_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"expected exactly one, got neither: spec\.filters\[0\]"):
        compile_filter({"filters": [entry]})


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        compile_filter({"filter": {"attributes": {"A": "x"}}, "filters": [{"sql": "x"}, "text", {"exact": {"B": "y"}}]})
    assert len(caught.value.problems) == 5


def test_endless_nesting_is_refused() -> None:
    entry: dict[str, Any] = {"exact": {"id": "1"}}
    for _ in range(2000):
        entry = {"not": entry}
    with pytest.raises(ValidationError, match="nested deeper than 32"):
        compile_filter({"filters": [entry]})


@pytest.mark.parametrize(
    "filters",
    [
        [{}] * (ENTRIES_MAX + 1),
        [{"exact": {"type": "a"}}] * (ENTRIES_MAX + 1),
        [{"any": [{"exact": {"type": "a"}}] * (ENTRIES_MAX // 2)}] * 3,
        [{"not": {"all": [{"not": "a"}] * ENTRIES_MAX}}],
    ],
)
def test_many_filters_are_refused_before_any_is_read(filters: list[Any]) -> None:
    with pytest.raises(ValidationError, match=f"more than {ENTRIES_MAX} filters; use several Triggers: spec.filters"):
        compile_filter({"filters": filters})


def test_many_expressions_are_refused_before_any_is_read() -> None:
    expression = "(" * 8000  # reading it would find no end
    with pytest.raises(ValidationError, match="the CESQL expressions have 72000 characters together, at most 65536"):
        compile_filter({"filters": [{"any": [{"not": {"cesql": expression}}] * 9}]})


def test_as_many_filters_as_are_allowed_are_used() -> None:
    entry = {"exact": {"type": "com.example.created"}}
    assert compile_filter({"filters": [entry] * ENTRIES_MAX}).passes(EVENT)
    half = f"type = '{'x' * 2000}'"
    expressions = CESQL_CHARACTERS_MAX // len(half)
    assert not compile_filter({"filters": [{"any": [{"cesql": half}] * expressions}]}).passes(EVENT)


def test_a_mapping_of_many_wrong_names_is_told_in_short() -> None:
    with pytest.raises(ValidationError) as caught:
        compile_filter({"filters": [{"exact": {f"X{number}": "a" for number in range(100_000)}}]})
    assert len(caught.value.problems) == ERRORS_MAX


NAMES = st.sampled_from(["id", "type", "time", "ext", "schemaurl", "datamediatype"])
VALUES = st.sampled_from(["1", "t", "x", "é"])
TEXTS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=2)
CESQL = st.sampled_from(["ext", "ext = 1", "ext / id > 0", "LEFT(ext, id) LIKE 'x%'", "id IN (ext, 2)", "NOT ext"])
FILTERS = st.recursive(
    st.one_of(
        *(TEXTS.map(lambda texts, dialect=dialect: {dialect: texts}) for dialect in ("exact", "prefix", "suffix")),
        CESQL.map(lambda text: {"cesql": text}),
    ),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"all": parts})
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"any": parts})
        | inner.map(lambda part: {"not": part})
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(FILTERS, st.none() | st.booleans() | st.integers(-3, 3) | st.text("1x%é", max_size=4))
def test_filters_never_raise_and_not_turns_them_round(entry: dict[str, Any], extension: Any) -> None:
    base = CloudEvent({"specversion": "1.0", "id": "1", "source": "/s", "type": "t"})
    event = base.changed({"ext": extension})
    passed = compile_filter({"filters": [entry]}).passes(event)
    assert compile_filter({"filters": [{"not": entry}]}).passes(event) is not passed
