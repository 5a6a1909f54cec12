"""Leases of what stages hold: nothing that waits expires, and what nobody looks after does."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from functions.contract import events
from tests import warm
from tests.exactness.fleet import HALVES, LONG, Fleet, disturbed, page_of, sample, until


async def test_nothing_expires_while_a_lane_waits_for_another_stage(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """Stage 1 takes longer than the leases of what stage 0 holds meanwhile."""
    first, last = [await fleet.add(stage, STAGE_KV_LEASE_S="5") for stage in (0, 1)]
    chain = await open_chain(fleet)
    last.stopped = asyncio.Event()
    last.stopped.set()

    async def hold() -> None:
        assert last.stopped is not None
        last.stopped.clear()
        renewed = first.kinds[events.RENEW]
        asyncio.get_running_loop().create_task(go_on(renewed + 4))  # of which three are a lease

    async def go_on(renewals: int) -> None:
        await until(lambda: first.kinds[events.RENEW] >= renewals)
        assert last.stopped is not None
        last.stopped.set()

    assert await disturbed(chain, prompts[0], hold) == whole_model("llama", prompts[0], LONG)
    assert sample(page_of(first.stage_url), "stagecraft_stage_sequences_expired_total") == 0
    for replica in (first, last):
        await until(replica.holds_nothing)
    await until(lambda: chain._pool._renewals._task.done())  # nothing is held
    assert not any(service.kinds[events.RENEW] for service in fleet.services)


async def test_what_a_killed_orchestrator_held_is_freed_when_its_lease_is_over(
    start_stages: Any, root: Path, prompts: Any, until_empty: Any
) -> None:
    """Its clients are the same process, and go at the same moment."""
    stages = start_stages("llama", HALVES, STAGE_KV_LEASE_S="1")
    argv = [sys.executable, "-m", "tests.exactness.endless", json.dumps(stages.urls), json.dumps(prompts[:4])]
    with warm.Popen(argv, cwd=root, stdout=subprocess.PIPE, text=True) as orchestrator:
        assert await asyncio.to_thread(orchestrator.stdout.readline) == "begun\n"
        await until(lambda: sample(page_of(stages.urls[1]), "stagecraft_stage_sequences"))
        orchestrator.kill()
    for url in stages.urls:
        await until_empty(url)
    pages = [page_of(url) for url in stages.urls]
    assert sum(sample(page, "stagecraft_stage_sequences_expired_total") for page in pages) > 0
    assert [sample(page, "stagecraft_stage_kv_bytes") for page in pages] == [0, 0]
