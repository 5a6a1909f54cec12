"""The KV store against a plain model of it: budget, positions, and what the buffers hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from functions.contract.errors import KvExhausted
from functions.contract.messages import Opening, Slice
from functions.contract.sampling import SamplingParams
from functions.kv_cache import KvStore, Sequence, file_rows

BLOCKS, HEADS, SIZE = 2, 2, 3
BYTES_PER_TOKEN = 2 * BLOCKS * HEADS * SIZE * 4
TOKENS_MAX = 300
OPENING = Opening(SamplingParams(), 1)


def store_of(tokens_max: int = TOKENS_MAX) -> KvStore:
    return KvStore(BLOCKS, BYTES_PER_TOKEN, tokens_max * BYTES_PER_TOKEN)


def slice_of(sequence: int, start: int, length: int) -> tuple[Slice, dict[int, Opening]]:
    return Slice(sequence, start, length), ({sequence: OPENING} if start == 0 else {})


def write(sequence: Sequence, values: list[float]) -> None:
    """What a pass does: files one row per token in each block, then moves the position."""
    rows = torch.tensor(values).view(1, -1, 1).expand(HEADS, -1, SIZE)
    for block in range(BLOCKS):
        file_rows(sequence.keys, block, sequence, rows + block)
        file_rows(sequence.values, block, sequence, -rows - block)
    sequence.tokens.extend(int(value) for value in values)
    sequence.position += len(values)


def add(store: KvStore, sequence: int, start: int, length: int, fill: float = 1.0) -> Sequence:
    piece, openings = slice_of(sequence, start, length)
    (found,) = store.reserve([piece], openings)
    write(found, [fill] * length)
    return found


class StoreMachine(RuleBasedStateMachine):
    """Random steps; `model` maps a sequence to the values it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.store = store_of()
        self.model: dict[int, list[float]] = {}
        self.longest: dict[int, int] = {}
        self.counter = 0

    @rule(
        wanted=st.dictionaries(
            st.integers(1, 5), st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=3
        )
    )
    def step(self, wanted: dict[int, tuple[int, float]]) -> None:
        """Chunks that continue their sequences or go back in them."""
        chunks = []
        for sequence, (length, back) in wanted.items():
            held = len(self.model.get(sequence, []))
            chunks.append((sequence, held if back < 0.7 else int(held * (back - 0.7) / 0.3), length))
        self._try(chunks)

    def _try(self, chunks: list[tuple[int, int, int]]) -> None:
        slices = [Slice(*chunk) for chunk in chunks]
        openings = {s.sequence: OPENING for s in slices if s.start == 0}
        before = self._state()
        try:
            sequences = self.store.reserve(slices, openings)
        except KvExhausted:
            assert self._state() == before
            return
        for piece, sequence in zip(slices, sequences, strict=True):
            assert sequence.position == piece.start
            values = [float(self.counter + i) for i in range(piece.length)]
            self.counter += piece.length
            write(sequence, values)
            self.model[piece.sequence] = self.model.get(piece.sequence, [])[: piece.start] + values
            self.longest[piece.sequence] = max(self.longest.get(piece.sequence, 0), piece.end)

    def _state(self) -> object:
        found = {s: self.store.get(s) for s in range(1, 6)}
        return self.store.bytes_used, {
            s: (f.position, f.capacity, list(f.tokens)) if f else None for s, f in found.items()
        }

    @rule(sequences=st.lists(st.integers(1, 5), max_size=3))
    def release(self, sequences: list[int]) -> None:
        known = [s for s in dict.fromkeys(sequences) if s in self.model]
        assert self.store.release(sequences) == known
        for sequence in known:
            del self.model[sequence], self.longest[sequence]

    @precondition(lambda self: self.model)
    @rule()
    def release_all(self) -> None:
        self.store.release(list(self.model))
        self.model.clear()
        self.longest.clear()
        assert self.store.bytes_used == 0

    @invariant()
    def budget_is_kept(self) -> None:
        assert 0 <= self.store.bytes_filled <= self.store.bytes_used <= self.store.bytes_max
        assert len(self.store) == len(self.model)

    @invariant()
    def positions_and_histories_are_right(self) -> None:
        for number in range(1, 6):
            assert self.store.position(number) == len(self.model.get(number, []))
        for number, values in self.model.items():
            sequence = self.store.get(number)
            assert sequence is not None
            assert sequence.tokens == [int(value) for value in values]

    @invariant()
    def buffers_hold_what_was_written(self) -> None:
        for number, values in self.model.items():
            sequence = self.store.get(number)
            assert sequence is not None
            for block in range(BLOCKS):
                keys, vals = sequence.keys[block], sequence.values[block]
                assert keys is not None
                assert vals is not None
                rows = torch.tensor(values).view(1, -1, 1).expand(HEADS, -1, SIZE)
                assert torch.equal(keys[:, : len(values)], rows + block)
                assert torch.equal(vals[:, : len(values)], -rows - block)

    @invariant()
    def little_is_set_aside_in_advance(self) -> None:
        """At most an eighth, or 16 tokens, beyond the most that a sequence has held; buffers are what was counted."""
        for number, longest in self.longest.items():
            sequence = self.store.get(number)
            assert sequence is not None
            assert longest <= sequence.capacity <= longest + max(16, longest // 8)
            held = [b for b in (*sequence.keys, *sequence.values) if b is not None]
            assert sum(b.numel() * 4 for b in held) <= sequence.capacity * BYTES_PER_TOKEN


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStoreAgainstModel = StoreMachine.TestCase


def test_first_chunk_sets_aside_just_what_it_needs() -> None:
    store = store_of()
    add(store, 1, 0, 100)
    assert store.bytes_used == 100 * BYTES_PER_TOKEN


@pytest.mark.parametrize(("held", "grown"), [(1, 17), (100, 116), (200, 225)])
def test_growth_is_an_eighth_and_at_least_16_tokens(held: int, grown: int) -> None:
    store = store_of()
    add(store, 1, 0, held)
    assert add(store, 1, held, 1).capacity == grown


def test_budget_is_used_to_the_last_byte() -> None:
    store = store_of(tokens_max=10)
    add(store, 1, 0, 6)
    add(store, 2, 0, 4)
    assert store.bytes_used == store.bytes_max
    with pytest.raises(KvExhausted, match=f"budget is {10 * BYTES_PER_TOKEN}") as caught:
        add(store, 3, 0, 1)
    assert "STAGE_KV_BYTES_MAX" in str(caught.value)
    store.release([2])
    add(store, 3, 0, 4)


def test_exhausted_by_one_of_several_slices_changes_none() -> None:
    store = store_of(tokens_max=50)
    add(store, 1, 0, 10)
    slices = [Slice(1, 4, 1), Slice(2, 0, 5), Slice(3, 0, 46)]
    with pytest.raises(KvExhausted):
        store.reserve(slices, {2: OPENING, 3: OPENING})
    assert (len(store), store.position(1), store.bytes_used) == (1, 10, 10 * BYTES_PER_TOKEN)
    found = store.get(1)
    assert found is not None
    assert len(found.tokens) == 10


def test_going_back_keeps_the_memory_and_forgets_the_tokens() -> None:
    store = store_of()
    sequence = add(store, 1, 0, 30)
    add(store, 1, 10, 1, fill=2.0)
    assert (sequence.position, len(sequence.tokens), store.bytes_used) == (11, 11, 30 * BYTES_PER_TOKEN)


def test_starting_again_takes_the_new_opening() -> None:
    store = store_of()
    add(store, 1, 0, 5)
    other = Opening(SamplingParams(seed=9), 3)
    (sequence,) = store.reserve([Slice(1, 0, 2)], {1: other})
    assert sequence.opening is other


def test_growing_leaves_views_of_the_old_buffer_intact() -> None:
    store = store_of()
    sequence = add(store, 1, 0, 4, fill=1.0)
    old = sequence.keys[0]
    assert old is not None
    add(store, 1, 4, 1, fill=2.0)
    assert torch.equal(old, torch.ones(HEADS, 4, SIZE))
