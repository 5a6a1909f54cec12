"""A task that looks after something beside the lanes, as long as there is something to look after."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod


class WhileNeeded(ABC):
    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """To be called when there is something to look after; the task ends by itself when there is nothing."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @abstractmethod
    async def _run(self) -> None:
        """Returns when there is nothing to look after."""
