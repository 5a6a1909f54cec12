"""Keys and values of many sequences, within a budget of bytes.

Each sequence owns, per block, one buffer for keys and one for values, [kv heads, capacity, head size], that grows by an
eighth at a time: little is wasted and copying stays rare. A sequence's `position` is the number of tokens whose keys
and values are in all blocks; going back (a repeated step, a replay) is setting it to a smaller number, since whatever
comes later overwrites.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from functions.contract.errors import KvExhausted
from functions.contract.messages import Opening, Slice

_GROWTH_MIN = 16


@dataclass(slots=True)
class Sequence:
    """One sequence's state in a stage. `tokens` is its history, kept because penalties count it.

    A runner keeps either `keys` and `values` (one buffer per block) or the model's own `cache` of `cached` tokens."""

    id: int
    opening: Opening
    position: int = 0
    tokens: list[int] = field(default_factory=list)
    capacity: int = 0
    keys: list[torch.Tensor | None] = field(default_factory=list)
    values: list[torch.Tensor | None] = field(default_factory=list)
    cache: Any = None
    cached: int = 0


class KvStore:
    """The sequences of a stage. `bytes_per_token` covers all blocks of the span."""

    def __init__(self, blocks: int, bytes_per_token: int, bytes_max: int) -> None:
        self.bytes_per_token = bytes_per_token
        self.bytes_max = bytes_max
        self._blocks = blocks
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def bytes_used(self) -> int:
        """Bytes set aside, used or not yet."""
        return sum(s.capacity for s in self._sequences.values()) * self.bytes_per_token

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
        wanted = {s.sequence: self._grown(self._capacity(s.sequence), s.end) for s in slices}
        more = sum(wanted[s.sequence] - self._capacity(s.sequence) for s in slices)
        needed_bytes = self.bytes_used + more * self.bytes_per_token
        if needed_bytes > self.bytes_max:
            raise KvExhausted(
                f"the step needs {needed_bytes} bytes of KV cache with what is held, the budget is {self.bytes_max}; "
                "release sequences, or give the stage more (STAGE_KV_BYTES_MAX)"
            )
        return [self._ready(s, openings, wanted[s.sequence]) for s in slices]

    def release(self, sequences: Iterable[int]) -> list[int]:
        """Frees them and returns those that were known."""
        return [s for s in sequences if self._sequences.pop(s, None) is not None]

    def _capacity(self, sequence: int) -> int:
        found = self._sequences.get(sequence)
        return found.capacity if found else 0

    def _grown(self, capacity: int, needed: int) -> int:
        if needed <= capacity:
            return capacity
        return max(needed, capacity + max(_GROWTH_MIN, capacity // 8) if capacity else 0)

    def _ready(self, piece: Slice, openings: dict[int, Opening], capacity: int) -> Sequence:
        sequence = self._sequences.get(piece.sequence)
        if sequence is None:
            nothing: list[torch.Tensor | None] = [None] * self._blocks
            sequence = Sequence(piece.sequence, openings[piece.sequence], keys=nothing, values=list(nothing))
            self._sequences[piece.sequence] = sequence
        if piece.start == 0:
            sequence.opening = openings[piece.sequence]
        sequence.position = piece.start
        del sequence.tokens[piece.start :]
        sequence.capacity = capacity
        return sequence


def file_rows(buffers: list[torch.Tensor | None], block: int, sequence: Sequence, rows: torch.Tensor) -> torch.Tensor:
    """Writes rows [heads, n, size] behind the sequence's position and returns everything so far [heads, all, size].

    `buffers` is the sequence's `keys` or `values`. The result is a view."""
    start, end = sequence.position, sequence.position + rows.shape[1]
    buffer = buffers[block]
    if buffer is None or buffer.shape[1] < end:
        grown = rows.new_empty((rows.shape[0], max(sequence.capacity, end), rows.shape[2]))
        if buffer is not None:
            grown[:, :start] = buffer[:, :start]
        buffers[block] = buffer = grown
    buffer[:, start:end] = rows
    return buffer[:, :end]
