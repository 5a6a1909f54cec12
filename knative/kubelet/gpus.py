"""The machine's GPUs, each assigned to one pod at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

RESOURCE = "nvidia.com/gpu"


class Gpus:
    """`names` are what CUDA_VISIBLE_DEVICES takes: indices or UUIDs."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.total = len(names)
        self._free = list(names)
        self._waiting: list[tuple[int, asyncio.Future[tuple[str, ...]]]] = []

    def ask(self, count: int) -> asyncio.Future[tuple[str, ...]]:
        """Done once that many are free at once; never if the machine has fewer. Cancel it to give up waiting. First
        come, first served, unless the first needs more than there are free."""
        turn: asyncio.Future[tuple[str, ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._serve()
        return turn

    def shortage(self, count: int) -> str:
        """Why `count` cannot be had now, in a scheduler's words."""
        return f"waiting for a GPU: {len(self._free)}/{self.total} {RESOURCE} available, {count} asked for"

    def give_back(self, names: Sequence[str]) -> None:
        self._free.extend(names)
        self._serve()

    def _serve(self) -> None:
        self._waiting = [entry for entry in self._waiting if not entry[1].cancelled()]
        for count, turn in self._waiting:
            if count <= len(self._free):
                taken, self._free = self._free[:count], self._free[count:]
                turn.set_result(tuple(taken))
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]


def listed(text: str) -> tuple[str, ...]:
    """The devices of a CUDA_VISIBLE_DEVICES, which end at the first invalid one (-1 hides all)."""
    names: list[str] = []
    for name in map(str.strip, text.split(",")):
        if not name or name.startswith("-"):
            break
        names.append(name)
    return tuple(names)
