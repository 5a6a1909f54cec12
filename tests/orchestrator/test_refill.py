"""Refills cover every gap once, in bounded steps, with the rows and tokens that belong there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.frames import Frame
from functions.contract.messages import Step
from orchestrator.generation import GenerationRequest
from orchestrator.lanes import Sequence
from orchestrator.refill import Gap, refill_steps


def gap(identity: int, start: int, end: int, *, first_stage: bool = False) -> Gap:
    sequence = Sequence(identity, GenerationRequest(tuple(1000 * identity + at for at in range(end + 1)), 5))
    rows = np.array([[identity, at] for at in range(start, end)], dtype=np.float32)
    return Gap(sequence, start, end, None if first_stage else Frame.of(rows))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=5),
    st.integers(1, 50),
    st.booleans(),
)
def test_steps_fill_the_gaps_in_their_order(places: list[tuple[int, int]], tokens_max: int, first_stage: bool) -> None:
    gaps = [gap(i + 1, start, start + n, first_stage=first_stage) for i, (start, n) in enumerate(places)]
    at = {each.sequence.id: each.start for each in gaps}
    for step in refill_steps(gaps, tokens_max):
        assert Step.from_body(b"".join(step.to_body())) is not None  # a stage would take it
        assert len(step.tokens) <= tokens_max
        assert (step.hidden is None) == first_stage
        rows = iter(step.hidden.numpy().tolist() if step.hidden is not None else ())
        tokens = iter(step.tokens.tolist())
        for piece in step.slices:
            assert not piece.sample
            assert piece.start == at[piece.sequence]
            at[piece.sequence] = piece.end
            for position in range(piece.start, piece.end):
                assert next(tokens) == 1000 * piece.sequence + position
                assert first_stage or next(rows) == [piece.sequence, position]
    assert at == {each.sequence.id: each.end for each in gaps}


def test_several_sequences_share_a_step() -> None:
    steps = list(refill_steps([gap(1, 0, 3), gap(2, 4, 6), gap(3, 0, 9)], tokens_max=10))
    assert [[(p.sequence, p.start, p.length) for p in step.slices] for step in steps] == [
        [(1, 0, 3), (2, 4, 2), (3, 0, 5)],
        [(3, 5, 4)],
    ]


@pytest.mark.parametrize("tokens_max", [1, 100])
def test_no_gap_is_no_step(tokens_max: int) -> None:
    assert list(refill_steps([], tokens_max)) == []
