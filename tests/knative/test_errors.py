"""Errors that people read."""

from __future__ import annotations

from knative.errors import PROBLEMS_TOLD_MAX, ValidationError


def test_a_manifest_full_of_problems_does_not_fill_the_screen() -> None:
    problems = [f"problem {number}" for number in range(10_000)]
    error = ValidationError(problems)
    assert str(error).splitlines() == [*problems[:PROBLEMS_TOLD_MAX], f"and {10_000 - PROBLEMS_TOLD_MAX} more problems"]
    assert error.problems == tuple(problems)


def test_half_characters_are_told_as_escapes() -> None:
    assert str(ValidationError(["a \ud800"])) == "a \\ud800"


def test_few_problems_are_all_told() -> None:
    assert str(ValidationError(["a", "b"])) == "a\nb"
