"""A stage's service: gives each event to one of its replicas, as Knative's activator does, and holds it while none is
ready."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from tests.faults.relay import Answer, Relay, Upstream
from tests.faults.wire import Message, page

HOLD_S_MAX = 60.0
_LOOK_EVERY_S = 0.02


class Addressed(Protocol):
    @property
    def port(self) -> int: ...

    @property
    def takes_new(self) -> bool: ...


class ServiceRouter(Relay):
    """`replicas` are asked in turn; those that are not ready, or about to end, are left out."""

    def __init__(self, replicas: Callable[[], Sequence[Addressed]]) -> None:
        super().__init__()
        self._replicas = replicas
        self._turn = itertools.count()

    async def answer(self, request: Message) -> Answer:
        for _ in range(round(HOLD_S_MAX / _LOOK_EVERY_S)):
            able = [replica for replica in self._replicas() if replica.takes_new]
            if able:
                upstream = Upstream(able[next(self._turn) % len(able)].port)
                try:
                    return await upstream.exchange(request, anew=True)
                except ConnectionRefusedError:
                    pass  # it has gone in this moment: nothing was sent, so another may take it
            await asyncio.sleep(_LOOK_EVERY_S)
        return page(503, "no replica became ready in time\n")
