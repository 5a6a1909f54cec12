"""Takes lanes off replicas that drain: what a lane holds there goes to another replica, between two of its steps.

    drains -> the service names another replica -> a step ends -> that one fetches keys and values -> the lane goes on

Until another replica is ready the lane goes on where it is. It stays there to its end where the service has only
replicas of another plan (a rolling update). When the move fails, what the next replica lacks is computed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from functions.contract.errors import PlanMismatch, StageError
from functions.contract.handover import Adopt
from orchestrator import chain_metrics as metrics
from orchestrator.running import Lane, Move
from orchestrator.stage_client import StageClient, StageUnreachable
from orchestrator.stage_pool import StagePool, replica_url

log = structlog.get_logger()


class Handover:
    """`settle` ties a lane to a replica (HOST:PORT) that has its caches, `start` runs a task beside the lanes."""

    def __init__(
        self,
        pool: StagePool,
        settle: Callable[[Lane, StageClient, str | None], None],
        start: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._pool = pool
        self._settle = settle
        self._start = start

    def lane_may_go(self, lane: Lane) -> bool:
        """To be asked before each step of a lane: whether it may set out. If not, `lane.news` tells when to ask again.

        A lane moves when none of its steps is on its way, so that none begins at one replica and ends at another."""
        may_go = True
        for stage, url in enumerate(lane.route):
            move = lane.moves.get(stage)
            if move is not None and move.under_way:
                may_go = False
            elif url is None or url not in self._pool.draining:
                lane.moves.pop(stage, None)
            elif url not in self._pool.gone:
                may_go &= self._moves_on(lane, stage, url)
            elif lane.window:
                may_go = False
            else:
                lane.route[stage] = None  # nobody is left to be asked for anything
        return may_go

    def avoids(self, lane: Lane) -> bool:
        """Whether a lane has to leave a replica: it had better take no new sequences."""
        return any(url in self._pool.draining for url in lane.route)

    def _moves_on(self, lane: Lane, stage: int, url: str) -> bool:
        """The next thing to do to get the lane away; whether it may go on meanwhile."""
        move = lane.moves.get(stage)
        if move is None or move.old != url:
            move = lane.moves[stage] = Move(url)
            self._start(self._find(lane, self._pool.clients[stage], move))
        if move.new is None:
            return True
        if not lane.window:
            move.under_way = True
            self._start(self._carry(lane, self._pool.clients[stage], move, move.new))
        return False

    async def _find(self, lane: Lane, stage: StageClient, move: Move) -> None:
        """Has the service name, and if need be start, another replica of our plan."""
        settings = self._pool.settings
        while lane.jobs and lane.moves.get(stage.index) is move:
            try:
                info = await self._pool.ask_service(stage, settings.wake_timeout_s)
                url = replica_url(info.replica)
                if url != move.old and url not in self._pool.draining:
                    self._pool.learn(info)
                    move.new = info.replica
                    lane.news.set()
                    return
            except PlanMismatch as error:
                metrics.HANDOVERS.labels(stage.index, "stays").inc()
                log.info("lane_stays", lane=lane.name, stage=stage.index, replica=move.old, reason=str(error))
                return
            except (StageUnreachable, StageError) as error:
                log.info("no_other_replica", lane=lane.name, stage=stage.index, error=str(error))
            await asyncio.sleep(settings.probe_every_s)

    async def _carry(self, lane: Lane, stage: StageClient, move: Move, new: str) -> None:
        """Nothing of the lane is on its way, and nothing sets out until this has ended."""
        cached = {i: job.sequence.cached for i, job in lane.jobs.items() if not job.sequence.cancelled}
        wanted = [sequence for sequence, position in cached.items() if position]
        outcome = "failed"
        try:
            positions = await self._adopt(lane, stage, move, new, wanted) if wanted else {}
            whole = all(positions.get(sequence, 0) >= cached[sequence] for sequence in wanted)
            outcome = "whole" if whole else "partly"
            self._arrived(lane, stage, new, wanted)
        except (StageUnreachable, StageError) as error:
            log.warning("handover_failed", lane=lane.name, stage=stage.index, old=move.old, new=new, error=str(error))
            lane.route[stage.index] = None  # the next step asks the service, and sends what is lacking
        finally:
            metrics.HANDOVERS.labels(stage.index, outcome).inc()
            lane.moves.pop(stage.index, None)
            lane.news.set()

    async def _adopt(
        self, lane: Lane, stage: StageClient, move: Move, new: str, sequences: list[int]
    ) -> dict[int, int]:
        with metrics.HANDOVER_SECONDS.time():
            adopt = Adopt(move.old, lane.key, tuple(sequences))
            adopted = await stage.adopt(adopt, replica_url(new), self._pool.settings.step_timeout_s)
        log.info(
            "lane_moved", lane=lane.name, stage=stage.index, old=move.old, new=new, sequences=len(sequences),
            fetched_bytes=adopted.fetched_bytes,
        )  # fmt: skip
        return dict(adopted.positions)

    def _arrived(self, lane: Lane, stage: StageClient, new: str, sequences: list[int]) -> None:
        """What has left the lane meanwhile was released where it was before."""
        left = [sequence for sequence in sequences if sequence not in lane.jobs]
        if lane.jobs:
            self._settle(lane, stage, new)
        if left:
            self._pool.spawn(self._pool.release_at(stage, replica_url(new), left))
