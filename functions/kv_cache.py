"""Keys and values of many sequences, in pages, within a budget of bytes.

Memory is handed out in pages of KV_PAGE_TOKENS tokens, so a sequence wastes less than a page and never moves when it
grows. `KvStore` keeps the books: which sequence has which pages, and up to which position they are filled. `KvPool`
holds the pages themselves, one run of rows for keys and one for values in each block:

    pool.keys[block]      row 0..7 | 8..15 | 16..23 | ...       a row is one token, [kv heads, size]
    sequence.pages          page 0 | page 1 | page 2 |          pages of a sequence, in the order of its tokens

A sequence's `position` is the number of tokens whose keys and values are in all blocks; going back (a repeated step, a
replay) is setting it to a smaller number, since whatever comes later overwrites.
"""

from __future__ import annotations

import heapq
import itertools
import mmap
import sys
from array import array
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from functions.contract.errors import KvExhausted
from functions.contract.messages import KV_PAGE_TOKENS, Opening, Slice

# MAP_NORESERVE of Linux: the budget is a bound, not memory that is there at once
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(slots=True)
class Sequence:
    """One sequence's state in a stage. `tokens` is its history, kept because penalties count it.

    A runner keeps keys and values in `pages` of its pool, or in the model's own `cache` of `cached` tokens."""

    id: int
    opening: Opening
    position: int = 0
    tokens: list[int] = field(default_factory=list)
    pages: array[int] = field(default_factory=lambda: array("i"))
    cache: Any = None
    cached: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that its pages have room for."""
        return len(self.pages) * KV_PAGE_TOKENS


class KvStore:
    """The sequences of a stage and their pages. `bytes_per_token` covers all blocks of the span."""

    def __init__(self, bytes_per_token: int, bytes_max: int) -> None:
        self.bytes_per_token = bytes_per_token
        self.bytes_max = bytes_max
        self.pages_max = bytes_max // self._page_bytes
        self._sequences: dict[int, Sequence] = {}
        self._pages_used = 0
        # the lowest pages first: those that were used before are in memory already
        self._returned: list[int] = []
        self._fresh = itertools.count()

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def bytes_used(self) -> int:
        """Bytes set aside, filled or not yet."""
        return self._pages_used * self._page_bytes

    @property
    def bytes_filled(self) -> int:
        """Bytes of those that hold keys and values."""
        return sum(s.position for s in self._sequences.values()) * self.bytes_per_token

    def get(self, sequence: int) -> Sequence | None:
        return self._sequences.get(sequence)

    def position(self, sequence: int) -> int:
        """Tokens cached; 0 for a sequence the stage does not know."""
        found = self._sequences.get(sequence)
        return found.position if found else 0

    def reserve(self, slices: Iterable[Slice], openings: dict[int, Opening]) -> list[Sequence]:
        """The sequences of the slices, opened or taken back to their start, with room for the new tokens.

        Raises KvExhausted before anything has changed. The caller has checked positions."""
        slices = list(slices)
        more = [self._pages_missing(piece) for piece in slices]
        if self._pages_used + sum(more) > self.pages_max:
            needed_bytes = self.bytes_used + sum(more) * self._page_bytes
            raise KvExhausted(
                f"the step needs {needed_bytes} bytes of KV cache with what is held, the budget is {self.bytes_max}; "
                "release sequences, or give the stage more (STAGE_KV_BYTES_MAX)"
            )
        return [self._ready(piece, openings, pages) for piece, pages in zip(slices, more, strict=True)]

    def release(self, sequences: Iterable[int]) -> list[int]:
        """Frees them and returns those that were known."""
        known = []
        for identity in sequences:
            sequence = self._sequences.pop(identity, None)
            if sequence is not None:
                known.append(identity)
                self._pages_used -= len(sequence.pages)
                for page in sequence.pages:
                    heapq.heappush(self._returned, page)
        if not self._sequences:
            self._returned, self._fresh = [], itertools.count()
        return known

    @property
    def _page_bytes(self) -> int:
        return self.bytes_per_token * KV_PAGE_TOKENS

    def _pages_missing(self, piece: Slice) -> int:
        found = self._sequences.get(piece.sequence)
        have = len(found.pages) if found else 0
        return max(0, -(-piece.end // KV_PAGE_TOKENS) - have)

    def _ready(self, piece: Slice, openings: dict[int, Opening], more: int) -> Sequence:
        sequence = self._sequences.get(piece.sequence)
        if sequence is None:
            sequence = self._sequences[piece.sequence] = Sequence(piece.sequence, openings[piece.sequence])
        if piece.start == 0:
            sequence.opening = openings[piece.sequence]
        sequence.position = piece.start
        del sequence.tokens[piece.start :]
        for _ in range(more):
            sequence.pages.append(heapq.heappop(self._returned) if self._returned else next(self._fresh))
        self._pages_used += more
        return sequence


def pool_rows(pages: array[int], start: int, end: int) -> npt.NDArray[np.int64]:
    """Rows of the pools that hold a sequence's tokens start .. end - 1."""
    at = np.arange(start, end)
    return np.asarray(pages, dtype=np.int64)[at // KV_PAGE_TOKENS] * KV_PAGE_TOKENS + at % KV_PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class RowShape:
    """What one token files in one block: keys [kv heads, key size], values [kv heads, value size]."""

    kv_heads: int
    key_size: int
    value_size: int

    @property
    def items(self) -> int:
        return self.kv_heads * (self.key_size + self.value_size)


class KvPool:
    """The pages of all blocks: `keys[block]` [rows, kv heads, key size], `values[block]` likewise.

    On a CPU the pages are mapped, not allocated: one that was never used takes no memory, and `forget` gives back what
    was used. On a GPU they are allocated at once."""

    def __init__(self, shapes: Items[RowShape], pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = tuple(shapes)
        rows = max(1, pages) * KV_PAGE_TOKENS
        sizes = [rows * s.kv_heads * size for s in self.shapes for size in (s.key_size, s.value_size)]
        self._map: mmap.mmap | None = None
        flat = torch.split(self._memory(sum(sizes), dtype, device), sizes)
        heads = [s.kv_heads for s in self.shapes]
        self.keys = [part.view(rows, count, -1) for part, count in zip(flat[::2], heads, strict=True)]
        self.values = [part.view(rows, count, -1) for part, count in zip(flat[1::2], heads, strict=True)]

    def read(self, rows: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Copies of rows, `keys.B` and `values.B` [rows, kv heads, size] for each block."""
        index = torch.from_numpy(rows).to(self.keys[0].device)
        return {
            f"{name}.{block}": pool[index]
            for name, pools in (("keys", self.keys), ("values", self.values))
            for block, pool in enumerate(pools)
        }

    def write(self, rows: npt.NDArray[np.int64], arrays: Mapping[str, torch.Tensor], at: int) -> None:
        """What `read` gave, from its row `at` on. The arrays have been checked."""
        index = torch.from_numpy(rows).to(self.keys[0].device)
        for name, pools in (("keys", self.keys), ("values", self.values)):
            for block, pool in enumerate(pools):
                pool[index] = arrays[f"{name}.{block}"][at : at + len(rows)].to(pool.device)

    def forget(self) -> None:
        """Gives all memory back; whatever is in the pages is gone."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _memory(self, items: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            return torch.empty(items, dtype=dtype, device=device)
        self._map = mmap.mmap(-1, items * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        return torch.frombuffer(self._map, dtype=dtype)
