"""The KV store and its pool against a plain model of them: budget, positions, pages, and what the pages hold."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from functions.contract.errors import KvExhausted
from functions.contract.messages import KV_PAGE_TOKENS, Opening, Slice
from functions.contract.sampling import SamplingParams
from functions.kv_cache import KvPool, KvStore, RowShape, Sequence

SHAPES = (RowShape(kv_heads=2, key_size=3, value_size=5), RowShape(kv_heads=1, key_size=4, value_size=4))
BYTES_PER_TOKEN = sum(shape.items for shape in SHAPES) * 4
PAGE_BYTES = KV_PAGE_TOKENS * BYTES_PER_TOKEN
PAGES_MAX = 38
OPENING = Opening(SamplingParams(), 1)
CPU = torch.device("cpu")


def store_of(pages_max: int = PAGES_MAX) -> KvStore:
    return KvStore(BYTES_PER_TOKEN, pages_max * PAGE_BYTES)


def pool_of(pages: int = PAGES_MAX) -> KvPool:
    return KvPool(SHAPES, pages, torch.float32, CPU)


def pages_of(tokens: int) -> int:
    return -(-tokens // KV_PAGE_TOKENS)


def rows_of(sequence: Sequence, start: int, end: int) -> list[int]:
    return [sequence.pages[at // KV_PAGE_TOKENS] * KV_PAGE_TOKENS + at % KV_PAGE_TOKENS for at in range(start, end)]


def write(pool: KvPool, sequence: Sequence, values: list[float]) -> None:
    """What a pass does: files one row per token in each block, then moves the position."""
    rows = rows_of(sequence, sequence.position, sequence.position + len(values))
    filed = torch.tensor(values).view(-1, 1, 1)
    for block in range(len(SHAPES)):
        pool.keys[block][rows] = filed + block
        pool.values[block][rows] = -filed - block
    sequence.tokens.extend(int(value) for value in values)
    sequence.position += len(values)


def add(store: KvStore, sequence: int, start: int, length: int) -> Sequence:
    (found,) = store.reserve([Slice(sequence, start, length)], {sequence: OPENING} if start == 0 else {})
    found.tokens.extend([1] * length)
    found.position += length
    return found


class StoreMachine(RuleBasedStateMachine):
    """Random steps; `model` maps a sequence to the values it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.store = store_of()
        self.pool = pool_of()
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
        slices = []
        for sequence, (length, back) in wanted.items():
            held = len(self.model.get(sequence, []))
            slices.append(Slice(sequence, held if back < 0.7 else int(held * (back - 0.7) / 0.3), length))
        needed = {s.sequence: max(self.longest.get(s.sequence, 0), s.end) for s in slices}
        fits = sum(map(pages_of, (self.longest | needed).values())) <= PAGES_MAX
        openings = {s.sequence: OPENING for s in slices if s.start == 0}
        before = self._state()
        try:
            sequences = self.store.reserve(slices, openings)
        except KvExhausted:
            assert not fits
            assert self._state() == before, "all or nothing"
            return
        assert fits
        self.longest |= needed
        for piece, sequence in zip(slices, sequences, strict=True):
            assert sequence.position == piece.start
            values = [float(self.counter + i) for i in range(piece.length)]
            self.counter += piece.length
            write(self.pool, sequence, values)
            self.model[piece.sequence] = self.model.get(piece.sequence, [])[: piece.start] + values

    def _state(self) -> object:
        found = {s: self.store.get(s) for s in range(1, 6)}
        return self.store.bytes_used, {
            s: (f.position, list(f.pages), list(f.tokens)) if f else None for s, f in found.items()
        }

    def _sequence(self, number: int) -> Sequence:
        sequence = self.store.get(number)
        assert sequence is not None
        return sequence

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
        self.pool.forget()

    @invariant()
    def budget_is_kept(self) -> None:
        assert 0 <= self.store.bytes_filled <= self.store.bytes_used <= self.store.bytes_max
        assert len(self.store) == len(self.model)

    @invariant()
    def positions_and_histories_are_right(self) -> None:
        for number in range(1, 6):
            assert self.store.position(number) == len(self.model.get(number, []))
        for number, values in self.model.items():
            assert self._sequence(number).tokens == [int(value) for value in values]

    @invariant()
    def no_page_is_shared_and_all_are_within_the_pool(self) -> None:
        pages = [page for number in self.model for page in self._sequence(number).pages]
        assert len(pages) == len(set(pages))
        assert set(pages) <= set(range(PAGES_MAX))
        assert self.store.bytes_used == len(pages) * PAGE_BYTES

    @invariant()
    def pages_hold_what_was_written(self) -> None:
        for number, values in self.model.items():
            rows, wanted = rows_of(self._sequence(number), 0, len(values)), torch.tensor(values).view(-1, 1, 1)
            for block in range(len(SHAPES)):
                keys, vals = self.pool.keys[block][rows], self.pool.values[block][rows]
                assert torch.equal(keys, (wanted + block).expand_as(keys))
                assert torch.equal(vals, (-wanted - block).expand_as(vals))

    @invariant()
    def less_than_a_page_is_set_aside_in_advance(self) -> None:
        """Beyond the most that a sequence has held."""
        for number, longest in self.longest.items():
            assert 0 <= self._sequence(number).capacity - longest < KV_PAGE_TOKENS


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStoreAgainstModel = StoreMachine.TestCase


# -- the books


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (8, 1), (9, 2), (100, 13)])
def test_a_sequence_takes_whole_pages(tokens: int, pages: int) -> None:
    store = store_of()
    assert add(store, 1, 0, tokens).capacity == pages * KV_PAGE_TOKENS
    assert (store.bytes_used, store.bytes_filled) == (pages * PAGE_BYTES, tokens * BYTES_PER_TOKEN)


def test_a_page_is_added_when_the_last_one_is_full() -> None:
    store = store_of()
    held = [len(add(store, 1, at, 1).pages) for at in range(17)]
    assert held == [1] * 8 + [2] * 8 + [3]


def test_budget_is_used_to_the_last_page() -> None:
    store = KvStore(BYTES_PER_TOKEN, 4 * PAGE_BYTES - 1)  # three whole ones
    add(store, 1, 0, 10)
    add(store, 2, 0, 1)
    assert store.bytes_used == 3 * PAGE_BYTES
    needed = f"needs {4 * PAGE_BYTES} bytes .* budget is {4 * PAGE_BYTES - 1}"
    with pytest.raises(KvExhausted, match=needed) as caught:
        add(store, 3, 0, 1)
    assert "STAGE_KV_BYTES_MAX" in str(caught.value)
    add(store, 1, 10, 6)  # what is left of its page
    store.release([2])
    add(store, 3, 0, 8)


def test_exhausted_by_one_of_several_slices_changes_none() -> None:
    store = store_of(pages_max=7)
    add(store, 1, 0, 10)
    slices = [Slice(1, 4, 20), Slice(2, 0, 5), Slice(3, 0, 40)]
    with pytest.raises(KvExhausted):
        store.reserve(slices, {2: OPENING, 3: OPENING})
    assert (len(store), store.position(1), store.bytes_used) == (1, 10, 2 * PAGE_BYTES)
    found = store.get(1)
    assert found is not None
    assert (len(found.tokens), len(found.pages)) == (10, 2)


def test_pages_that_come_back_are_given_out_again_the_lowest_first() -> None:
    """So memory that was used before is used again, before any that was never touched."""
    store = store_of()
    for number in range(1, 5):
        add(store, number, 0, 16)
    store.release([3])
    store.release([1])
    assert list(add(store, 5, 0, 40).pages) == [0, 1, 4, 5, 8]


def test_an_empty_store_starts_at_its_first_page() -> None:
    store = store_of()
    add(store, 1, 0, 100)
    add(store, 2, 0, 100)
    store.release([2, 1])
    assert list(add(store, 3, 0, 20).pages) == [0, 1, 2]


def test_going_back_keeps_the_pages_and_forgets_the_tokens() -> None:
    store = store_of()
    pages = list(add(store, 1, 0, 30).pages)
    sequence = add(store, 1, 10, 1)
    assert (sequence.position, len(sequence.tokens), list(sequence.pages)) == (11, 11, pages)


def test_starting_again_takes_the_new_opening() -> None:
    store = store_of()
    add(store, 1, 0, 5)
    other = Opening(SamplingParams(seed=9), 3)
    (sequence,) = store.reserve([Slice(1, 0, 2)], {1: other})
    assert sequence.opening is other


# -- the memory


def test_each_block_has_rows_of_its_own_shape() -> None:
    pool = pool_of(pages=3)
    assert [list(keys.shape) for keys in pool.keys] == [[24, 2, 3], [24, 1, 4]]
    assert [list(values.shape) for values in pool.values] == [[24, 2, 5], [24, 1, 4]]
    for number, part in enumerate((*pool.keys, *pool.values)):
        part.fill_(number)
    for number, part in enumerate((*pool.keys, *pool.values)):
        assert (part == number).all(), "no two parts overlap"


def resident_bytes(pool: KvPool) -> int:
    """Memory of the process that lies in the mapping with the pool's first row, by the kernel's own account."""
    address, found = pool.keys[0].data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the pool's memory is not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given back when the system likes")
def test_memory_comes_with_use_and_goes_by_forgetting() -> None:
    shape, pages = RowShape(1, 512, 512), 16 << 10  # 512 MiB: a budget, of which little is used
    pool = KvPool([shape], pages, torch.float32, CPU)
    untouched = resident_bytes(pool)
    used = pool.keys[0][: 8 << 10]  # 16 MiB
    used.fill_(1)
    assert resident_bytes(pool) - untouched >= used.nbytes
    assert resident_bytes(pool) - untouched < 64 << 20
    pool.forget()
    assert resident_bytes(pool) - untouched < 8 << 20
    used.fill_(2)
    assert (used == 2).all(), "it can be used again"


def test_a_budget_of_less_than_a_page_has_room_for_nothing() -> None:
    store = KvStore(BYTES_PER_TOKEN, PAGE_BYTES - 1)
    assert store.pages_max == 0
    assert len(pool_of(store.pages_max).keys) == len(SHAPES), "the stage still starts, and says so at the first step"
    with pytest.raises(KvExhausted):
        add(store, 1, 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_type_of_number_can_be_filed(dtype: torch.dtype) -> None:
    pool = KvPool(SHAPES, 2, dtype, CPU)
    pool.keys[1][15] = 1.5
    assert pool.keys[1].dtype == dtype
    assert float(pool.keys[1].sum()) == 6.0, "what was never written is zero"
