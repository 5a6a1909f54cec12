"""Batches beside interactive requests, over real stages: who goes first, what stays free, and that no text changes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationError, GenerationRequest, Priority

NEW_TOKENS = 12
LONG = 80  # tokens of a generation that is still running whatever else the test does
HALVES = ["0:2", "2:4"]
KV_TOKENS = 200
KV_BYTES_MAX = str(KV_TOKENS * 256)  # 2 blocks, keys and values, 2 heads of 8 floats
ONE = ChainSettings(lanes_max=1, lane_width=1)


def request_of(prompt: Sequence[int], priority: Priority, max_tokens: int = NEW_TOKENS) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), max_tokens, priority=priority)


class Crowd:
    """Requests under way. `begun` and `ended` hold their names in the order of their first and last tokens."""

    def __init__(self, chain: Chain) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.texts: dict[str, list[int]] = {}
        self._chain = chain
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, name: str, request: GenerationRequest) -> asyncio.Task[None]:
        """Returns once it is in line, or in a lane."""
        task = asyncio.create_task(self._run(name, request))
        self._tasks.append(task)
        await asyncio.sleep(0)
        return task

    async def _run(self, name: str, request: GenerationRequest) -> None:
        self.texts[name] = []
        async for token in self._chain.generate(request):
            if not self.texts[name]:
                self.begun.append(name)
            self.texts[name].append(token.id)
        self.ended.append(name)

    async def finish(self) -> None:
        await asyncio.gather(*self._tasks)


async def test_who_waits_for_an_answer_goes_before_batches(
    start_stages: Any, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    crowd = Crowd(await open_chain(start_stages("llama", HALVES), ONE))
    asked: list[tuple[str, Priority]] = [("b0", "batch"), ("b1", "batch"), ("i0", "interactive"), ("b2", "batch")]
    asked.append(("i1", "interactive"))
    for (name, priority), prompt in zip(asked, prompts, strict=False):
        await crowd.add(name, request_of(prompt, priority))
    await crowd.finish()
    assert crowd.begun == ["b0", "i0", "i1", "b1", "b2"], "what runs is not interrupted"
    expected = [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts[: len(asked)]]
    assert [crowd.texts[name] for name, _ in asked] == expected


async def test_no_batch_is_let_in_while_an_interactive_request_waits_for_memory(
    start_stages: Any, open_chain: Any, prompts: Any
) -> None:
    """88 tokens of 200 are taken, the large one waits for 120. A small batch sequence of 8 would fit beside what runs;
    it does not overtake the large interactive one."""
    # of two lanes either might be first
    one_lane = ChainSettings(spread=1)
    crowd = Crowd(await open_chain(start_stages("llama", HALVES, STAGE_KV_BYTES_MAX=KV_BYTES_MAX), one_lane))
    await crowd.add("running", request_of(prompts[0], "batch", LONG))
    await crowd.add("large", request_of(prompts[0], "interactive", 110))
    await crowd.add("small", request_of(prompts[3], "batch", 5))
    await crowd.finish()
    assert crowd.begun == ["running", "large", "small"]


async def test_batches_leave_memory_free_while_there_is_interactive_load(
    start_stages: Any, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    """In whole pages an interactive sequence of 85 tokens takes 88, a batch sequence of 20 takes 24. Beside it two of
    these fit into three quarters of 200; without it eight fit into all."""
    settings = ChainSettings(batch_alone_after_s=0)
    chain = await open_chain(start_stages("llama", HALVES, STAGE_KV_BYTES_MAX=KV_BYTES_MAX), settings)
    alone = Crowd(chain)
    for number in range(9):
        await alone.add(str(number), request_of([number + 1] * 8, "batch"))
    assert _running(chain) == 8
    await alone.finish()

    await _empty(chain)
    crowd = Crowd(chain)
    await crowd.add("interactive", request_of(prompts[0], "interactive", LONG))
    for number in range(3):
        await crowd.add(str(number), request_of([number + 1] * 8, "batch"))
    assert _running(chain) == 3
    await crowd.add("late", request_of(prompts[3], "interactive", 20))
    assert _running(chain) == 4, "what batches left free is there at once"
    await crowd.finish()
    assert crowd.texts["interactive"] == whole_model("llama", prompts[0], LONG)
    assert [crowd.texts[str(number)] for number in range(3)] == [alone.texts[str(number)] for number in range(3)]


async def test_batches_get_all_some_time_after_the_last_interactive_request(
    start_stages: Any, open_chain: Any, answer: Any
) -> None:
    """Each takes 24 tokens: six fit into three quarters of 200, eight into all."""
    stages = start_stages("llama", HALVES, STAGE_KV_BYTES_MAX=KV_BYTES_MAX)
    for after_s, expected in ((1000, 6), (0, 8)):
        chain = await open_chain(stages, ChainSettings(batch_alone_after_s=after_s))
        await answer(chain, [1], 1)
        await _empty(chain)
        crowd = Crowd(chain)
        for number in range(9):
            await crowd.add(str(number), request_of([number + 1] * 8, "batch"))
        assert _running(chain) == expected
        await crowd.finish()
        await _empty(chain)  # the next chain counts what the stages still hold


async def test_each_priority_has_a_waiting_line_of_its_own(start_stages: Any, open_chain: Any, prompts: Any) -> None:
    settings = ChainSettings(waiting_max=1, lane_width=1, lanes_max=1)
    crowd = Crowd(await open_chain(start_stages("llama", HALVES), settings))
    await crowd.add("running", request_of(prompts[0], "batch"))
    await crowd.add("waiting", request_of(prompts[1], "batch"))
    with pytest.raises(GenerationError, match="1 requests are waiting"):
        await (await crowd.add("refused", request_of(prompts[2], "batch")))
    crowd._tasks.pop()
    await crowd.add("interactive", request_of(prompts[2], "interactive"))
    await crowd.finish()
    assert crowd.ended == ["running", "interactive", "waiting"]


async def test_seats_stay_free_where_lanes_are_bounded(start_stages: Any, open_chain: Any, prompts: Any) -> None:
    settings = ChainSettings(lanes_max=1, lane_width=4)
    chain = await open_chain(start_stages("llama", HALVES), settings)
    crowd = Crowd(chain)
    await crowd.add("i0", request_of(prompts[0], "interactive", LONG))
    for number in range(4):
        await crowd.add(f"b{number}", request_of([number], "batch"))
    assert _running(chain) == 3
    await crowd.add("i1", request_of(prompts[1], "interactive"))
    assert _running(chain) == 4
    await crowd.finish()


async def test_a_batch_that_leaves_the_line_lets_others_in(start_stages: Any, open_chain: Any, prompts: Any) -> None:
    chain = await open_chain(start_stages("llama", HALVES, STAGE_KV_BYTES_MAX=KV_BYTES_MAX))
    crowd = Crowd(chain)
    await crowd.add("running", request_of(prompts[0], "interactive", LONG))
    large = await crowd.add("large", request_of(prompts[0], "batch", 100))
    small = await crowd.add("small", request_of([1], "batch", 4))
    large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    await small
    assert crowd.ended == ["small"]
    crowd._tasks.remove(large)
    await crowd.finish()


def _running(chain: Chain) -> int:
    return sum(len(lane.jobs) for lane in chain._lanes)


async def _empty(chain: Chain) -> None:
    """Waits until the stages have freed everything."""
    async with asyncio.timeout(60):
        while chain._lanes or chain._pool.releases:  # noqa: ASYNC110 (another task's doing)
            await asyncio.sleep(0.005)
