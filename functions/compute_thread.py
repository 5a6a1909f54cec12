"""The thread that computes, and the way there and back.

An executor of one thread would do, but what it does besides (two futures, a lock and a condition for each call) takes
more than the way itself: 26 against 11 microseconds of a hop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_Work = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[..., Any], tuple[object, ...]]


class ComputeThread:
    """Runs what it is given one after another. Its thread starts with the first, so that a process may fork before."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._under_way = 0

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do. To be asked in the event loop's thread, from which all work comes."""
        return self._under_way == 0

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """What `work` returns or raises. If the caller is cancelled, work that has not begun is left out."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
            atexit.register(self._end)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._under_way += 1
        self._work.put((loop, future, work, args))
        return await future

    def _finish(self, settle: Callable[[], None] | None) -> None:
        """In the event loop's thread, once a piece of work is done or left out."""
        self._under_way -= 1
        if settle is not None:
            settle()

    def _end(self) -> None:
        """The interpreter must not go while torch computes."""
        self._work.put(None)
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while (taken := self._work.get()) is not None:
            loop, future, work, args = taken
            settle = None if future.cancelled() else _outcome(future, work, args)
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(self._finish, settle)
            del settle
            del taken, future, work, args  # they may be large, and the next may be long in coming


def _outcome(future: asyncio.Future[Any], work: Callable[..., Any], args: tuple[object, ...]) -> Callable[[], None]:
    """Does the work; what is returned tells the result to whoever waits, in the event loop's thread."""
    try:
        result = work(*args)
    except BaseException as error:
        failure = error
        return lambda: None if future.done() else future.set_exception(failure)
    return lambda: None if future.done() else future.set_result(result)
