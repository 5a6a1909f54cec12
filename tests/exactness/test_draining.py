"""Replicas that go or drain: lanes leave them, with what they hold where that can be, and the text stays the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY

from functions.contract import events
from functions.contract.sampling import SamplingParams
from orchestrator.chain import ChainSettings
from tests.exactness.fleet import (
    HALVES,
    LONG,
    TIMEOUT_S,
    Fleet,
    Replica,
    disturbed,
    page_of,
    sample,
    together,
    until,
    used,
)

# -- replicas that go


async def test_a_draining_replica_is_left_with_the_same_text_and_holds_nothing_afterwards(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet, ChainSettings(probe_every_s=0.01))
    left: list[Replica] = []

    async def drain() -> None:
        left.append(used(replicas))
        left[0].step_takes_s = 0.02  # so that the answer is not over before anybody can notice
        left[0].draining = True

    assert await disturbed(chain, prompts[0], drain) == whole_model("llama", prompts[0], LONG)
    other = next(replica for replica in replicas if replica is not left[0])
    assert left[0].lanes["0"] + other.lanes["0"] >= LONG
    assert other.lanes["0"] > 0
    for replica in replicas:
        await until(replica.holds_nothing)


async def test_a_vanished_replica_is_replaced_with_the_same_text(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet)

    async def vanish() -> None:
        gone = used(replicas)
        fleet.services[1].replicas.remove(gone)
        await gone.close()

    assert await disturbed(chain, prompts[2], vanish) == whole_model("llama", prompts[2], LONG)
    assert all(replica.lanes for replica in replicas)


async def test_a_replica_that_is_too_busy_sends_the_lane_back_to_the_service(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet)

    async def fill_up() -> None:
        full = used(replicas)
        fleet.services[1].replicas.remove(full)
        full.full = True

    assert await disturbed(chain, prompts[1], fill_up) == whole_model("llama", prompts[1], LONG)
    assert all(replica.lanes for replica in replicas)


# -- replicas that hand over what they hold


@dataclass
class Counts:
    """What stages have computed, by their own count."""

    tokens: float
    steps: float

    @classmethod
    def of(cls, replicas: Sequence[Replica]) -> Counts:
        pages = [page_of(replica.stage_url) for replica in replicas]
        return cls(
            sum(sample(page, "stagecraft_stage_tokens_total") for page in pages),
            sum(sample(page, f'stagecraft_stage_events_total{{answer="ok",type="{events.STEP}"}}') for page in pages),
        )


def handovers(stage: int, outcome: str) -> float:
    labels = {"stage": str(stage), "outcome": outcome}
    return REGISTRY.get_sample_value("stagecraft_handovers_total", labels) or 0.0


@pytest.mark.parametrize("drained", [(0,), (1,), (0, 1)])
async def test_a_draining_replica_hands_over_and_nothing_is_computed_again(
    drained: tuple[int, ...], fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [[await fleet.add(stage) for _ in range(2)] for stage in (0, 1)]
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    left: list[Replica] = []
    before = [handovers(stage, "whole") for stage in drained]

    async def drain() -> None:
        for stage in drained:
            left.append(used(replicas[stage]))
            left[-1].step_takes_s = 0.02  # so that the answers are not over before anybody can notice
            left[-1].draining = True

    asked = prompts[:4]
    assert await together(chain, asked, drain) == [whole_model("llama", prompt, LONG) for prompt in asked]
    assert [handovers(stage, "whole") for stage in drained] == [count + 1 for count in before]
    for stage in (0, 1):
        counts = Counts.of(replicas[stage])
        assert counts.tokens == sum(len(prompt) + LONG - 1 for prompt in asked), "each token once, wherever"
        assert counts.steps == sum(replica.lanes["0"] for replica in replicas[stage])
        for replica in replicas[stage]:
            await until(replica.holds_nothing)
    for stage, old in zip(drained, left, strict=True):
        new = next(replica for replica in replicas[stage] if replica is not old)
        assert new.lanes["0"] > 0
        assert (new.kinds[events.ADOPT], old.kinds[events.RELEASE]) == (1, 1)
        assert old.kinds[events.EXPORT] >= 1


async def test_sampled_answers_go_on_with_their_penalties_at_another_replica(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    params = SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.8, seed=11)
    expected = [await answer(chain, prompt, LONG, params) for prompt in prompts[:3]]
    for replica in replicas:
        await until(replica.holds_nothing)
        replica.lanes.clear()

    async def drain() -> None:
        old = used(replicas)
        old.step_takes_s = 0.02
        old.draining = True

    before = handovers(1, "whole")
    assert await together(chain, prompts[:3], drain, params) == expected
    assert handovers(1, "whole") == before + 1


async def test_a_lane_goes_on_where_it_is_until_another_replica_is_ready(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    await fleet.add(0)
    old, new = [await fleet.add(1) for _ in range(2)]
    fleet.services[1].replicas.remove(new)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    steps_until_it_came: list[int] = []

    async def drain() -> None:
        old.step_takes_s = 0.02
        old.draining = True

    async def start_another(kind: str) -> None:
        """As an activator holds what comes until there is a replica."""
        if old.draining and not steps_until_it_came:
            steps_until_it_came.append(old.lanes["0"])
            await until(lambda: old.lanes["0"] >= steps_until_it_came[0] + 5)
            fleet.services[1].replicas.append(new)

    fleet.services[1].before = start_another
    before = handovers(1, "whole")
    assert await together(chain, prompts[:2], drain) == [whole_model("llama", p, LONG) for p in prompts[:2]]
    assert steps_until_it_came
    assert handovers(1, "whole") == before + 1
    assert fleet.services[1].kinds[events.STEP] == 1, "only the lane's first; the wake has named the next replica"


async def test_a_lane_leaves_though_the_first_wake_is_never_answered(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service may have handed it to a replica that hangs, so it is asked again, long before the time is over that
    stages get to wake."""
    monkeypatch.setattr("orchestrator.stage_pool._WAKE_PATIENCE_S", 0.2)
    await fleet.add(0)
    old, new = [await fleet.add(1) for _ in range(2)]
    fleet.services[1].replicas.remove(new)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    wakes: list[int] = []
    over = asyncio.Event()

    async def drain() -> None:
        old.step_takes_s = 0.02
        old.draining = True
        fleet.services[1].replicas.append(new)

    async def lose_the_first_wake(kind: str) -> None:
        if old.draining and kind == events.WAKE:
            wakes.append(old.lanes["0"])
            if len(wakes) == 1:
                await over.wait()

    fleet.services[1].before = lose_the_first_wake
    before = handovers(1, "whole")
    answers = await together(chain, prompts[:2], drain)
    over.set()
    assert answers == [whole_model("llama", p, LONG) for p in prompts[:2]]
    assert handovers(1, "whole") == before + 1, "the lane ended where it was: nobody was asked a second time"


async def test_a_lane_ends_on_its_old_plan_where_the_service_has_a_new_one(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    await fleet.add(0)
    old = await fleet.add(1)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))

    async def roll_out() -> None:
        new.append(await fleet.add(1, STAGE_PLAN="another-plan"))
        old.step_takes_s = 0.02
        old.draining = True

    new: list[Replica] = []
    before = handovers(1, "stays")
    assert await together(chain, prompts[:2], roll_out) == [whole_model("llama", p, LONG) for p in prompts[:2]]
    assert handovers(1, "stays") == before + 1
    assert (new[0].kinds[events.STEP], new[0].kinds[events.WAKE]) == (0, 1)
    await until(old.holds_nothing)


@pytest.mark.parametrize("refused", ["adopt", "export"])
async def test_a_handover_that_fails_is_a_replay(
    refused: str, fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    for replica in replicas:
        replica.refuses = f"dev.stagecraft.stage.{refused}.v1"
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))

    async def drain() -> None:
        old = used(replicas)
        old.step_takes_s = 0.02
        old.draining = True

    outcome = "failed" if refused == "adopt" else "partly"
    before = handovers(1, outcome)
    assert await together(chain, prompts[:3], drain) == [whole_model("llama", p, LONG) for p in prompts[:3]]
    assert handovers(1, outcome) == before + 1
    for replica in replicas:
        await until(replica.holds_nothing)


async def test_who_leaves_during_a_handover_leaves_nothing_behind(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    for replica in replicas:
        replica.on_export = asyncio.Event()
    leaving = asyncio.create_task(together(chain, prompts[1:2], _nothing))

    async def drain() -> None:
        old = used(replicas)
        old.step_takes_s = 0.02
        old.draining = True
        await until(lambda: old.kinds[events.EXPORT])
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert old.on_export is not None
        old.on_export.set()

    assert await together(chain, prompts[:1], drain) == [whole_model("llama", prompts[0], LONG)]
    for replica in replicas:
        await until(replica.holds_nothing)


@pytest.mark.parametrize("architecture", ["llama", "falcon_h1"])
async def test_a_stage_process_that_gets_sigterm_hands_over_and_ends(
    architecture: str, fleet: Fleet, start_stages: Any, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    """With no queue-proxy in front: the process itself says that it shuts down, and serves until it holds nothing.
    Recurrent state (falcon_h1) is computed again at the other replica."""
    fleet.architecture = architecture
    first, place = await fleet.add(0), {"STAGE_INDEX": "1", "STAGE_COUNT": "2"}
    first.step_takes_s = 0.02  # so that the answers are not over before anybody can notice
    pair = [start_stages(architecture, [HALVES[1]], **place) for _ in range(2)]
    doors = [SimpleNamespace(address=stages.urls[0].removeprefix("http://"), draining=False) for stages in pair]
    fleet.services[1].replicas = cast(list[Replica], doors)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    ended: list[Any] = []

    async def end() -> None:
        index = next(i for i, one in enumerate(pair) if sample(page_of(one.urls[0]), "stagecraft_stage_sequences"))
        doors[index].draining = True
        ended.append(pair[index].processes[0])
        ended[0].terminate()

    before = handovers(1, "whole")
    expected = [whole_model(architecture, prompt, LONG) for prompt in prompts[:3]]
    assert await together(chain, prompts[:3], end) == expected
    await asyncio.to_thread(ended[0].wait, TIMEOUT_S)
    assert ended[0].returncode == 0
    assert handovers(1, "whole") == before + (architecture == "llama")


async def _nothing() -> None:
    pass
