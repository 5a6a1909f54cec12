"""The chain over real stages: who is let in, what is refused and why, how many sequences share a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationError, GenerationRequest, Token

NEW_TOKENS = 20
LONG = 80  # tokens of a generation that is still running whatever else the test does
HALVES = ["0:2", "2:4"]
KV_TOKENS = 112  # whole pages, and less than the 128 positions of the model
KV_BYTES_PER_TOKEN = 256  # 2 blocks, keys and values, 2 heads of 8 floats
KV_BYTES_MAX = str(KV_TOKENS * KV_BYTES_PER_TOKEN)
TIMEOUT_S = 60  # only reached by what would hang for ever


def request_of(prompt: Sequence[int], max_tokens: int) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), max_tokens)


async def refusal(chain: Chain, request: GenerationRequest) -> GenerationError:
    """The error that the request is answered with before any token."""
    with pytest.raises(GenerationError) as caught:
        await anext(aiter(chain.generate(request)))
    return caught.value


async def ids(tokens: AsyncIterator[Token]) -> list[int]:
    return [token.id async for token in tokens]


# -- stages that do not fit


async def test_a_request_before_the_start_is_asked_to_come_back() -> None:
    error = await refusal(Chain("plan", ["http://127.0.0.1:1"]), request_of([1], 1))
    assert (error.status, error.code) == (503, "not_ready")
    assert error.retry_after_s


async def test_stages_in_the_wrong_order_are_refused_at_the_start(start_stages: Any, open_chain: Any) -> None:
    stages = start_stages("llama", HALVES)
    await _refuse_start(open_chain(SimpleNamespace(urls=stages.urls[::-1])))


async def test_stages_of_another_plan_are_refused_at_the_start(start_stages: Any, open_chain: Any) -> None:
    await _refuse_start(open_chain(start_stages("llama", HALVES, STAGE_PLAN="another-plan")))


@pytest.mark.parametrize("spans", [["0:2", "3:4"], ["0:3", "2:4"], ["1:2", "2:4"]], ids=["gap", "overlap", "no start"])
async def test_blocks_that_do_not_follow_each_other_are_refused(
    spans: list[str], start_stages: Any, open_chain: Any
) -> None:
    await _refuse_start(open_chain(start_stages("llama", spans)))


async def test_a_chain_that_lacks_a_stage_is_refused(start_stages: Any, open_chain: Any) -> None:
    stages = start_stages("llama", HALVES)
    await _refuse_start(open_chain(SimpleNamespace(urls=stages.urls[:1])))


async def test_stages_of_different_dtypes_are_refused(start_stages: Any, open_chain: Any) -> None:
    exact, coarse = (start_stages("llama", HALVES, STAGE_DTYPE=dtype).urls for dtype in ("float32", "bfloat16"))
    await _refuse_start(open_chain(SimpleNamespace(urls=[exact[0], coarse[1]])))


async def _refuse_start(starting: Any) -> None:
    with pytest.raises(GenerationError) as caught:
        await starting
    assert (caught.value.status, caught.value.code) == (503, "plan_mismatch")


# -- requests that cannot be served


async def test_requests_that_cannot_be_served_are_refused_with_what_is_allowed(
    start_stages: Any, open_chain: Any, answer: Any
) -> None:
    chain = await open_chain(start_stages("llama", HALVES))
    refused = {
        "empty": request_of([], 5),
        "nothing wanted": request_of([1], 0),
        "past the vocabulary": request_of([1, 211], 5),
        "negative": request_of([-1], 5),
        "too long": request_of([1] * 100, 29),
        "prompt too long": request_of([1] * 128, 1),
    }
    errors = {name: await refusal(chain, request) for name, request in refused.items()}
    assert {error.status for error in errors.values()} == {400}
    assert (errors["empty"].code, errors["empty"].param) == ("empty_prompt", "prompt")
    assert errors["nothing wanted"].param == "max_tokens"
    assert "0..210" in str(errors["past the vocabulary"])
    assert "0..210" in str(errors["negative"])
    assert all(number in str(errors["too long"]) for number in ("100", "29", "129", "128"))
    assert (errors["too long"].code, errors["too long"].param) == ("context_length_exceeded", "max_tokens")
    assert (errors["prompt too long"].code, errors["prompt too long"].param) == ("context_length_exceeded", "prompt")
    assert len(await answer(chain, [1] * 100, 28)) == 28, "the longest that fits is served"


async def test_more_than_the_kv_memory_is_refused_and_what_just_fits_is_served(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    chain = await open_chain(start_stages("llama", HALVES, STAGE_KV_BYTES_MAX=KV_BYTES_MAX))
    fits = KV_TOKENS - len(prompts[7])
    error = await refusal(chain, request_of(prompts[7], fits + 1))
    assert (error.status, error.code, error.param) == (400, "kv_memory_exceeded", "max_tokens")
    assert await answer(chain, prompts[7], fits) == whole_model("llama", prompts[7], fits)


async def test_a_full_waiting_line_is_refused_with_a_time_to_come_back(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    settings = ChainSettings(waiting_max=1, lane_width=1, lanes_max=1)
    chain = await open_chain(start_stages("llama", HALVES), settings)
    running = chain.generate(request_of(prompts[0], LONG))
    await anext(running)
    waiting = asyncio.create_task(answer(chain, prompts[1], NEW_TOKENS))
    await asyncio.sleep(0)
    error = await refusal(chain, request_of(prompts[2], NEW_TOKENS))
    assert (error.status, error.code) == (429, "overloaded")
    assert error.retry_after_s
    assert not waiting.done()
    await running.aclose()
    assert await waiting == whole_model("llama", prompts[1], NEW_TOKENS)
    assert await answer(chain, prompts[2], NEW_TOKENS) == whole_model("llama", prompts[2], NEW_TOKENS)


async def test_a_waiting_request_that_is_given_up_makes_room_in_the_line(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    settings = ChainSettings(waiting_max=1, lane_width=1, lanes_max=1)
    chain = await open_chain(start_stages("llama", HALVES), settings)
    running = chain.generate(request_of(prompts[0], LONG))
    await anext(running)
    given_up = asyncio.create_task(answer(chain, prompts[1], NEW_TOKENS))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    next_in_line = asyncio.create_task(answer(chain, prompts[2], NEW_TOKENS))
    await running.aclose()
    assert len(await next_in_line) == NEW_TOKENS


# -- memory


async def test_requests_wait_for_kv_memory_and_all_of_it_comes_back(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """Two or three of the eight fit at a time. A request that needs everything goes in only if nothing has leaked."""
    expected = [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts]
    everything = request_of(prompts[7], KV_TOKENS - len(prompts[7]))
    chain = await open_chain(start_stages("llama", HALVES, STAGE_KV_BYTES_MAX=KV_BYTES_MAX))
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(4):
            assert await asyncio.gather(*(answer(chain, p, NEW_TOKENS) for p in prompts)) == expected
            await _leave_early(chain, prompts)
            assert len(await ids(chain.generate(everything))) == everything.max_tokens


async def _leave_early(chain: Chain, prompts: Sequence[Sequence[int]]) -> None:
    """Eight consumers that go away: some while their request runs, some while it waits."""

    async def leave(prompt: Sequence[int]) -> None:
        tokens = chain.generate(request_of(prompt, NEW_TOKENS))
        await anext(tokens)
        await tokens.aclose()

    tasks = [asyncio.create_task(leave(prompt)) for prompt in prompts]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)


async def test_no_more_sequences_than_the_lane_is_wide_are_on_their_way(
    start_stages: Any, open_chain: Any, prompts: Any
) -> None:
    chain = await open_chain(start_stages("llama", HALVES), ChainSettings(lanes_max=1, lane_width=2))
    active: set[int] = set()
    widths = []

    async def watch(index: int) -> None:
        async for token in chain.generate(request_of(prompts[index], NEW_TOKENS)):
            active.add(index)
            widths.append(len(active))
            if token.finish:
                active.discard(index)

    await asyncio.gather(*(watch(index) for index in range(len(prompts))))
    assert len(widths) == len(prompts) * NEW_TOKENS
    assert max(widths) == 2


# -- the end


async def test_closing_ends_running_and_waiting_requests_with_an_error(
    start_stages: Any, open_chain: Any, prompts: Any
) -> None:
    chain = await open_chain(start_stages("llama", HALVES), ChainSettings(lanes_max=1, lane_width=2))
    first = chain.generate(request_of(prompts[0], LONG))
    others = [asyncio.create_task(ids(chain.generate(request_of(prompt, LONG)))) for prompt in prompts[1:4]]
    await anext(first)
    async with asyncio.timeout(TIMEOUT_S):
        await chain.close()
        results = await asyncio.gather(ids(first), *others, return_exceptions=True)
    assert [getattr(result, "code", result) for result in results] == ["shutting_down"] * 4
    assert {result.status for result in results if isinstance(result, GenerationError)} == {503}
    assert not chain.ready
    assert (await refusal(chain, request_of(prompts[0], 1))).status == 503


# -- continuous batching


async def test_sequences_together_share_their_steps(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, steps_taken: Any
) -> None:
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages)
    await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts))
    lanes, steps_alone = 2, NEW_TOKENS  # a prompt and its first token are one step
    assert steps_taken(stages.urls[0]) <= lanes * (steps_alone + 2)
    assert steps_taken(stages.urls[0]) == steps_taken(stages.urls[1])


async def test_sequences_that_come_later_join_the_steps_of_those_under_way(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, steps_taken: Any, whole_model: Any
) -> None:
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages, ChainSettings(lanes_max=1))
    tasks = []

    async def lead() -> list[int]:
        tokens = []
        async for token in chain.generate(request_of(prompts[0], NEW_TOKENS)):
            tokens.append(token.id)
            if len(tokens) in (4, 8):  # others come while this one is in the middle
                some = prompts[1:4] if len(tokens) == 4 else prompts[4:8]
                tasks.extend(asyncio.create_task(answer(chain, prompt, NEW_TOKENS)) for prompt in some)
        return tokens

    answers = [await lead(), *await asyncio.gather(*tasks)]
    assert answers == [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts]
    last_join = 8 + 2  # a step may be on its way when they come
    assert steps_taken(stages.urls[0]) <= last_join + NEW_TOKENS
