"""Tells replicas that what lanes hold there is still wanted, long before its lease is over.

A lane may wait for minutes for one stage while the others hold its sequences and get no step. Who holds nothing is told
nothing, so that stages can go to zero; and only replicas are told, never a service, which would wake one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import structlog

from functions.contract.errors import StageError
from orchestrator.stage_client import StageClient, StageUnreachable
from orchestrator.while_needed import WhileNeeded

log = structlog.get_logger()

_PER_LEASE = 3  # one that is lost, or comes late, costs nothing

Held = Mapping[tuple[int, str], Sequence[int]]  # (stage, URL of a replica) -> sequences there


class Renewals(WhileNeeded):
    """`lease_s` is the shortest of the stages', 0 where they have none."""

    def __init__(
        self, clients: Sequence[StageClient], held: Callable[[], Held], lease_s: Callable[[], float], timeout_s: float
    ) -> None:
        super().__init__()
        self._clients = clients
        self._held = held
        self._lease_s = lease_s
        self._timeout_s = timeout_s

    async def _run(self) -> None:
        while every_s := self._lease_s() / _PER_LEASE:
            await asyncio.sleep(every_s)
            held = self._held()
            if not held:
                return
            timeout_s = min(self._timeout_s, every_s)
            await asyncio.gather(*(self._renew(*place, list(ids), timeout_s) for place, ids in held.items()))

    async def _renew(self, stage: int, url: str, sequences: list[int], timeout_s: float) -> None:
        """What is unknown there is found out by the next step, which sends it again; as is a replica that is gone."""
        try:
            unknown = await self._clients[stage].renew(sequences, url, timeout_s)
        except (StageUnreachable, StageError) as error:
            log.info("renewal_failed", stage=stage, replica=url, sequences=len(sequences), error=str(error))
            return
        if unknown:
            log.info("sequences_unknown", stage=stage, replica=url, sequences=len(unknown))
