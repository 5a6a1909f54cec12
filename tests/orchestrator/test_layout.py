"""How stages share the cores of one machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.layout import Layout, shared_cores_layout

SOME = st.none() | st.integers(1, 64)


@pytest.mark.parametrize(
    ("stages", "cores", "expected"),
    [
        (2, 2, Layout(1, 2, in_turn=True)),
        (4, 2, Layout(1, 2, in_turn=True)),
        (2, 4, Layout(1, 4, in_turn=True)),
        (2, 8, Layout(1, 8, in_turn=True)),
        (2, 9, Layout(2, 4, in_turn=False)),
        (2, 32, Layout(2, 16, in_turn=False)),
        (1, 2, Layout(1, 2, in_turn=False)),
        (1, 32, Layout(1, 32, in_turn=False)),
        (2, 1, Layout(1, 1, in_turn=True)),
    ],
)
def test_few_cores_are_shared_and_many_are_divided(stages: int, cores: int, expected: Layout) -> None:
    assert shared_cores_layout(stages, cores) == expected


@pytest.mark.parametrize(
    ("stages", "cores", "given_", "expected"),
    [
        (2, 2, {"threads": 1}, Layout(2, 1, in_turn=False)),
        (4, 2, {"threads": 1}, Layout(2, 1, in_turn=False)),
        (2, 2, {"spread": 2}, Layout(2, 1, in_turn=False)),
        (2, 2, {"threads": 2, "spread": 2}, Layout(2, 2, in_turn=True)),
        (2, 32, {"spread": 1}, Layout(1, 32, in_turn=True)),
        (2, 32, {"threads": 4}, Layout(2, 4, in_turn=False)),
    ],
)
def test_what_is_given_is_kept(stages: int, cores: int, given_: dict[str, int], expected: Layout) -> None:
    assert shared_cores_layout(stages, cores, **given_) == expected


@given(st.integers(1, 8), st.integers(1, 64), SOME, SOME)
def test_stages_that_may_compute_at_once_have_no_more_threads_than_there_are_cores(
    stages: int, cores: int, threads: int | None, spread: int | None
) -> None:
    layout = shared_cores_layout(stages, cores, threads=threads, spread=spread)
    assert layout.threads >= 1
    assert layout.spread >= 1
    if threads is None and min(layout.spread, stages) <= cores:
        assert min(layout.spread, stages) * layout.threads <= cores
    if stages > 1 and not layout.in_turn:
        assert 2 * layout.threads <= cores
