"""More than the chain can do at once: what waits, what is refused, what pauses, and that no text changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest

from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationError, GenerationRequest, Token
from orchestrator.pace import retry_after_s

HALVES = ["0:2", "2:4"]
NEW_TOKENS = 40
KV_BYTES_PER_TOKEN = 256  # 2 blocks, keys and values, 2 heads of 8 floats
ONE = ChainSettings(lanes_max=1, lane_width=1)


def tokens_of(chain: Chain, request: GenerationRequest) -> AsyncGenerator[Token, None]:
    return cast(AsyncGenerator[Token, None], chain.generate(request))


def request_of(prompt: Sequence[int], max_tokens: int = NEW_TOKENS, **more: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), max_tokens, **more)


async def test_sequences_of_chains_that_do_not_know_of_each_other_pause_and_go_on(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """Two orchestrators share the memory of one set of stages, which each takes for its own: 24 sequences of up to 100
    tokens, and room for 3. Stages are full again and again; nobody fails of it, and every text is the right one."""
    stages = start_stages("llama", HALVES, STAGE_KV_BYTES_MAX=str(304 * KV_BYTES_PER_TOKEN))
    settings = ChainSettings(backoff_s=0.01, attempts=10_000)
    chains = [await open_chain(stages, settings) for _ in range(2)]
    expected = [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts]
    jobs = [(chain, i) for _ in range(2) for i in range(6) for chain in chains]
    texts = await asyncio.gather(*(answer(chain, prompts[i], NEW_TOKENS) for chain, i in jobs))
    assert texts == [expected[i] for _, i in jobs]


async def test_a_reader_that_is_slow_pauses_its_own_sequence_alone(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, steps_taken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.running.UNREAD_TOKENS_MAX", 8)
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages, ChainSettings(lanes_max=1))
    undisturbed = await answer(chain, prompts[0], 100)
    slow = tokens_of(chain, request_of(prompts[0], 100))
    begun = [(await anext(slow)).id]
    beside = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts[1:]))
    assert beside == [await answer(chain, prompt, NEW_TOKENS) for prompt in prompts[1:]]
    (job,) = (job for lane in chain._lanes for job in lane.jobs.values())
    assert job.out.qsize() == 8, "it went on while nobody read it"
    assert begun + [token.id async for token in slow] == undisturbed


async def test_a_reader_that_never_reads_on_and_leaves_frees_its_lane(
    start_stages: Any, open_chain: Any, prompts: Any, until_empty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.running.UNREAD_TOKENS_MAX", 8)
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages, ChainSettings(lanes_max=1))
    slow = tokens_of(chain, request_of(prompts[0], 100))
    await anext(slow)
    (job,) = (job for lane in chain._lanes for job in lane.jobs.values())
    async with asyncio.timeout(60):
        while not job.paused or job.sequence.in_flight:  # noqa: ASYNC110 (nobody announces it)
            await asyncio.sleep(0.01)
    await slow.aclose()
    for url in stages.urls:
        await until_empty(url)
    assert not chain._lanes


@pytest.mark.parametrize("after", [1, 5])
async def test_at_most_the_step_on_its_way_is_computed_for_a_client_that_left(
    after: int, start_stages: Any, open_chain: Any, prompts: Any, until_empty: Any, tokens_computed: Any
) -> None:
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages)
    tokens = tokens_of(chain, request_of(prompts[0], 100))
    for _ in range(after):
        await anext(tokens)
    await tokens.aclose()
    for url in stages.urls:
        await until_empty(url)
        # each token that was made is computed in the next step; one more may have been made, and one be on its way
        assert tokens_computed(url) <= len(prompts[0]) + after + 1


async def test_nothing_is_computed_for_who_left_the_line(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, tokens_computed: Any
) -> None:
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages, ONE)
    running = asyncio.create_task(answer(chain, prompts[0], NEW_TOKENS))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(answer(chain, prompts[1], NEW_TOKENS))
    over = asyncio.create_task(_text(chain, request_of(prompts[2], NEW_TOKENS, deadline_s=time.monotonic() + 0.001)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(GenerationError) as caught:
        await over
    assert caught.value.status == 504
    await running
    for url in stages.urls:
        assert tokens_computed(url) == len(prompts[0]) + NEW_TOKENS - 1


async def test_a_deadline_stops_what_runs(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, until_empty: Any
) -> None:
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages)
    late = [_text(chain, request_of(prompts[0], 100, deadline_s=time.monotonic() + at_s)) for at_s in (-1, 0.02)]
    results = await asyncio.gather(*late, answer(chain, prompts[1], NEW_TOKENS), return_exceptions=True)
    assert [getattr(result, "status", None) for result in results] == [504, 504, None]
    for url in stages.urls:
        await until_empty(url)


async def test_who_is_refused_is_told_when_what_is_ahead_will_be_done(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    chain = await open_chain(start_stages("llama", HALVES), ChainSettings(lanes_max=1, lane_width=1, waiting_max=30))
    assert chain.ahead_s() is None
    while chain.ahead_s() is None:
        await answer(chain, prompts[0], 100)
    assert chain.ahead_s() == 0
    ahead = [asyncio.create_task(answer(chain, prompts[0], 100)) for _ in range(31)]
    await asyncio.sleep(0)
    ahead_s = chain.ahead_s()
    with pytest.raises(GenerationError) as refused:
        await answer(chain, prompts[0], 100)
    assert (refused.value.status, refused.value.code) == (429, "overloaded")
    speed = chain._pace.tokens_per_s
    assert speed is not None
    assert ahead_s == pytest.approx(31 * (len(prompts[0]) + 100) / speed)
    assert refused.value.retry_after_s == retry_after_s(ahead_s)
    ahead.pop().cancel()
    await asyncio.sleep(0)
    with pytest.raises(GenerationError) as refused:
        await _text(chain, request_of(prompts[0], 100, deadline_s=time.monotonic() + ahead_s / 3))
    assert (refused.value.status, refused.value.code) == (429, "deadline_too_soon")
    for task in ahead:
        task.cancel()
    await asyncio.gather(*ahead, return_exceptions=True)


async def test_the_tokens_that_wait_are_bounded(start_stages: Any, open_chain: Any, answer: Any, prompts: Any) -> None:
    settings = ChainSettings(lanes_max=1, lane_width=1, waiting_tokens_max=50)
    chain = await open_chain(start_stages("llama", HALVES), settings)
    tasks = [asyncio.create_task(answer(chain, prompts[7], NEW_TOKENS)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(GenerationError, match="60 tokens of prompts"):
        await answer(chain, prompts[7], NEW_TOKENS)
    assert len({tuple(text) for text in await asyncio.gather(*tasks)}) == 1


async def test_all_that_runs_and_waits_ends_with_an_error_at_the_end(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, until_empty: Any
) -> None:
    stages = start_stages("llama", HALVES)
    chain = await open_chain(stages, ONE)
    running = tokens_of(chain, request_of(prompts[0], 100))
    await anext(running)
    waiting = [asyncio.create_task(answer(chain, prompt, NEW_TOKENS)) for prompt in prompts]
    await asyncio.sleep(0)
    chain.stop()
    results = await asyncio.gather(_rest(running), *waiting, answer(chain, [1], 1), return_exceptions=True)
    assert [getattr(result, "code", result) for result in results] == ["shutting_down"] * (len(prompts) + 2)
    for url in stages.urls:
        await until_empty(url)


async def _text(chain: Chain, request: GenerationRequest) -> list[int]:
    return [token.id async for token in chain.generate(request)]


async def _rest(tokens: AsyncGenerator[Token, None]) -> list[int]:
    return [token.id async for token in tokens]
