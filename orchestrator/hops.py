"""A step's way through the stages: one event to each, in their order.

A lane's first event to a stage goes to the stage's service, which chooses a replica (and starts one where there is
none); the reply names it, and from then on the lane goes there, where its caches are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from functions.contract.errors import InvalidEvent, KvExhausted, NotReady
from functions.contract.frames import Buffer
from functions.contract.messages import Sampled, Samples
from orchestrator import chain_metrics as metrics
from orchestrator.running import Lane
from orchestrator.stage_client import StageClient, StageUnreachable
from orchestrator.stage_pool import StagePool, replica_url
from orchestrator.window import Flight

log = structlog.get_logger()


class Hops:
    def __init__(self, pool: StagePool) -> None:
        self._pool = pool

    async def through(self, lane: Lane, flight: Flight) -> Sequence[Sampled] | None:
        """One step through all stages; None if it was stopped. The bytes between stages are relayed unopened."""
        body: Buffer = b"".join(flight.step.to_body())
        with metrics.STEP_SECONDS.time():
            for stage in self._pool.clients:
                async with lane.doors[stage.index]:
                    if lane.window.stops(flight):
                        return None
                    body = await self._hop(lane, stage, body)
                    flight.passed += 1
                lane.news.set()
        try:
            return Samples.from_body(body).items
        except InvalidEvent as error:  # not ours but the last stage's
            raise StageUnreachable(f"the last stage answered no samples: {error}") from None

    async def _hop(self, lane: Lane, stage: StageClient, body: Buffer) -> Buffer:
        settings = self._pool.settings
        await self._pool.woken(stage)
        url, timeout_s = lane.route[stage.index], settings.step_timeout_s
        if url is None:  # there may be no replica, and the service holds the event until there is
            timeout_s = max(timeout_s, settings.wake_timeout_s - (_now_s() - lane.progress_s))
        lane.asked[stage.index] = True
        try:
            with metrics.HOP_SECONDS.labels(stage.index).time():
                reply = await stage.step(body, lane.name, url, timeout_s)
        except (StageUnreachable, NotReady):
            lane.route[stage.index] = None  # the next try asks the service for a replica
            raise
        except KvExhausted:
            if url is not None:
                self._pool.kv.full(stage.index, url)
            raise
        metrics.HOP_BYTES.labels(stage.index).inc(len(body))
        replica = reply.extensions.get("replica")
        if replica and stage.url.startswith("http://"):  # behind TLS a replica has no address that a client could use
            self._settle(lane, stage, replica_url(replica))
        return reply.data

    def _settle(self, lane: Lane, stage: StageClient, replica: str) -> None:
        """The lane's caches are at this replica now; what it left behind at another is freed."""
        left = lane.home[stage.index]
        lane.route[stage.index] = lane.home[stage.index] = replica
        if left == replica:
            return
        self._pool.kv.move(stage.index, left, replica, lane.kv_tokens)
        self._pool.taken(stage, replica)
        if left is not None:
            log.info("replica_changed", lane=lane.name, stage=stage.index, old=left, new=replica)
            self._pool.kv.forget(stage.index, left)
            self._pool.spawn(self._pool.release_at(stage, left, list(lane.jobs)))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
