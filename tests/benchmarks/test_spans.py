"""How the benchmarks cut a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stages import even_spans


@given(st.data())
def test_even_spans_cover_all_blocks_once_and_evenly(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 200))
    stages = data.draw(st.integers(1, blocks))
    spans = even_spans(blocks, stages)
    assert [block for span in spans for block in range(span.start, span.end)] == list(range(blocks))
    assert len(spans) == stages
    assert max(map(len, spans)) - min(map(len, spans)) <= 1
