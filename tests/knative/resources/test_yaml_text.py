"""YAML and JSON as plain values with lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.errors import ValidationError
from knative.resources.yaml_text import read_json, read_yaml


def values(text: str) -> list[object]:
    return [document.value for document in read_yaml(text, "f.yaml")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: on", {"a": True}),
        ("a: 'on'", {"a": "on"}),
        ("a: 0644", {"a": 420}),
        ("a: 0x1F", {"a": 31}),
        ("a: 1_000", {"a": 1000}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: 2024-01-02", {"a": "2024-01-02"}),
        ("a: ~", {"a": None}),
        ("a: -1.5", {"a": -1.5}),
        ("1: x", {"1": "x"}),
        ("b: &x {c: 1, d: 2}\na: {<<: *x, d: 3}", {"b": {"c": 1, "d": 2}, "a": {"c": 1, "d": 3}}),
        ("a: !!str 5", {"a": "5"}),
    ],
)
def test_scalars_are_read_as_kubectl_reads_them(text: str, value: object) -> None:
    assert values(text) == [value]


def test_empty_documents_are_left_out_and_lines_counted_over_the_file() -> None:
    first, second = read_yaml("# note\n---\na:\n  - b: 1\n---\n---\nc: 2\n", "f.yaml")
    assert (first.line, first.lines["a"], first.lines["a[0].b"]) == (3, 3, 4)
    assert (second.line, second.value) == (7, {"c": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", 'f.yaml:2: key "a" already set in map'),
        ("a: [1", "f.yaml:1: not YAML: "),
        ("a: b: c", "f.yaml:1: not YAML: "),
        ("a:\n\t- b", "f.yaml:2: not YAML: "),
        ("? [a]\n: b", "f.yaml:1: a key must be text"),
        ("a: !!python/object:os.system x", "f.yaml:1: the tag"),
        ("a: .inf", "f.yaml:1: not a number"),
        ("a: *nobody", "f.yaml:1: not YAML: "),
        ("a: &x [*x]", "f.yaml:1: "),
        ("a: \x00", "f.yaml"),
        ("<<: 5", "f.yaml:1: `<<` merges mappings only"),
        ("[" * 5000, "f.yaml: not YAML that can be read: nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_said_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        values(text)
    assert caught.value.problems[0].startswith(message)


def test_an_alias_bomb_is_refused() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ValidationError, match="grow without bound"):
        values("\n".join(rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n}', "f.json:2: not JSON: "),
        ('{"a": 1, "a": 2}', 'f.json: not JSON: key "a" already set in map'),
        ('{"a": NaN}', "f.json: not JSON: NaN is no JSON number"),
        ("[" * 100_000, "f.json: not JSON: nested too deeply"),
        ("[" * 300 + "]" * 300, "f.json: nested too deeply"),
        ('{"a": "\\ud800"}', "f.json: not valid Unicode"),
    ],
)
def test_json_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        read_json(text, "f.json")
    assert caught.value.problems[0].startswith(message)


@given(st.text(st.sampled_from("ab:- \n\t[]{},&*!|>'\"%@`#?<0.1~\\x\x85\ufeff"), max_size=60))
def test_any_text_is_yaml_or_a_validation_error(text: str) -> None:
    problems: tuple[str, ...] = ("f.yaml",)
    try:
        values(text)
    except ValidationError as error:
        problems = error.problems
    assert problems
    assert all(problem.startswith("f.yaml") for problem in problems)
