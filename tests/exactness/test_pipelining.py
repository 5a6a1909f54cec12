"""Chunks of one prompt in several stages at once: the same text, in company, after a loss, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from functions.contract.errors import StageFailure
from functions.contract.events import Event
from functions.contract.frames import Buffer
from functions.contract.messages import Step
from orchestrator.chain import ChainSettings
from orchestrator.generation import GenerationError, GenerationRequest
from orchestrator.stage_client import StageClient

NEW_TOKENS = 16
LONG_TOKENS = 100
CUTS = {1: ["0:4"], 2: ["0:2", "2:4"], 3: ["0:1", "1:3", "3:4"], 4: ["0:1", "1:2", "2:3", "3:4"]}
CHUNKS = ChainSettings(step_tokens_max=6, lanes_max=1, backoff_s=0.01)  # one lane, so that only its chunks can overlap
TIMEOUT_S = 60  # only reached by what would hang for ever


class Traffic:
    """What lanes have sent to stages. `before` is called with the stage and the step's data as each is sent."""

    def __init__(self) -> None:
        self.most = 0  # steps on their way at once
        self.steps: Counter[int] = Counter()  # by stage
        self.before: Callable[[int, Buffer], Any] = lambda stage, body: None
        self._inside: Counter[tuple[int, str]] = Counter()

    async def step(
        self, send: Any, stage: StageClient, body: Buffer, lane: str, url: str | None, limit_s: float
    ) -> Event:
        self.before(stage.index, body)
        self.steps[stage.index] += 1
        self._inside[stage.index, lane] += 1
        assert self._inside[stage.index, lane] == 1, "a step enters a stage when the one before it has left"
        self.most = max(self.most, self._inside.total())
        try:
            return await send(stage, body, lane, url, limit_s)  # type: ignore[no-any-return]  # `send` is the method that was there
        finally:
            self._inside[stage.index, lane] -= 1


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    traffic, send = Traffic(), StageClient.step

    async def step(stage: StageClient, *arguments: Any) -> Event:
        return await traffic.step(send, stage, *arguments)

    monkeypatch.setattr(StageClient, "step", step)
    return traffic


@pytest.fixture(scope="module")
def long_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Two, each of many chunks."""
    text = [token for prompt in prompts for token in prompt]
    return [text[:LONG_TOKENS], text[-LONG_TOKENS:][::-1]]


@pytest.mark.parametrize(
    ("architecture", "stages"), [*(("llama", stages) for stages in CUTS), ("gemma3_text", 3), ("falcon_h1", 2)]
)
async def test_prompts_in_chunks_beside_answers_give_the_tokens_of_generate(
    architecture: str,
    stages: int,
    start_stages: Any,
    open_chain: Any,
    answer: Any,
    prompts: Any,
    long_prompts: Any,
    whole_model: Any,
    traffic: Traffic,
) -> None:
    running = start_stages(architecture, CUTS[stages])
    chain = await open_chain(running, CHUNKS)
    assert await answer(chain, long_prompts[0], NEW_TOKENS) == whole_model(architecture, long_prompts[0], NEW_TOKENS)
    assert traffic.most == stages, "every stage is at another chunk"
    mixed = [*prompts[:4], *long_prompts, *prompts[4:]]
    expected = [whole_model(architecture, prompt, NEW_TOKENS) for prompt in mixed]
    in_many_lanes = await open_chain(running, replace(CHUNKS, lanes_max=0))
    for one in (chain, in_many_lanes):
        assert await asyncio.gather(*(answer(one, prompt, NEW_TOKENS) for prompt in mixed)) == expected


async def test_with_a_spread_of_one_nothing_overlaps(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, long_prompts: Any, whole_model: Any, traffic: Traffic
) -> None:
    chain = await open_chain(start_stages("llama", CUTS[2]), ChainSettings(spread=1, step_tokens_max=6))
    mixed = [*prompts, *long_prompts]
    together = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in mixed))
    assert together == [whole_model("llama", prompt, NEW_TOKENS) for prompt in mixed]
    assert traffic.most == 1


async def test_answers_go_on_beside_a_long_prompt(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, long_prompts: Any
) -> None:
    """One that decodes gets a token for every two steps of the prompt, as it would with two stages anyway."""
    chain = await open_chain(start_stages("llama", CUTS[2]), ChainSettings(step_tokens_max=3, lanes_max=1))
    tokens_before = 0
    prompt: asyncio.Task[list[int]] | None = None
    async for _ in chain.generate(GenerationRequest(tuple(prompts[3]), 60)):
        prompt = prompt or asyncio.create_task(answer(chain, long_prompts[0], 1))
        tokens_before += not prompt.done()
    assert prompt is not None
    await prompt
    assert tokens_before >= LONG_TOKENS / 3 / 2


@pytest.mark.parametrize(("architecture", "lost"), [("llama", 0), ("llama", 1), ("llama", 2), ("falcon_h1", 1)])
async def test_a_stage_lost_with_chunks_on_their_way_changes_no_token(
    architecture: str,
    lost: int,
    start_stages: Any,
    open_chain: Any,
    answer: Any,
    prompts: Any,
    long_prompts: Any,
    whole_model: Any,
    traffic: Traffic,
) -> None:
    stages = start_stages(architecture, CUTS[3])
    chain = await open_chain(stages, CHUNKS)
    mixed = [prompts[3], *long_prompts]

    def lose(stage: int, body: Buffer) -> None:
        if stage == lost and traffic.steps[stage] in (8, 16):
            traffic.steps[stage] += 1  # twice in all
            stages.kill(lost)
            stages.start(lost)

    traffic.before = lose
    async with asyncio.timeout(TIMEOUT_S):
        together = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in mixed))
    assert together == [whole_model(architecture, prompt, NEW_TOKENS) for prompt in mixed]
    assert traffic.most == 3


async def test_a_sequence_that_breaks_a_step_on_its_way_fails_alone(
    start_stages: Any,
    open_chain: Any,
    answer: Any,
    prompts: Any,
    long_prompts: Any,
    whole_model: Any,
    traffic: Traffic,
    until_empty: Any,
) -> None:
    """Its company goes on one at a time, without overlap, and gets its text."""
    stages = start_stages("llama", CUTS[2])
    chain = await open_chain(stages, ChainSettings(step_tokens_max=40, lanes_max=1))
    poison = [7, 7, 7, *long_prompts[1]]

    def break_step(stage: int, body: Buffer) -> None:
        step = Step.from_body(body)
        at = 0
        for piece in step.slices:
            if (
                stage == 1
                and piece.start >= 40
                and step.tokens[at : at + piece.length].tolist() == poison[piece.start : piece.end]
            ):
                raise StageFailure("the computation failed")
            at += piece.length

    traffic.before = break_step
    mixed = [prompts[3], poison, long_prompts[0], prompts[1]]
    async with asyncio.timeout(TIMEOUT_S):
        results = await asyncio.gather(*(answer(chain, p, NEW_TOKENS) for p in mixed), return_exceptions=True)
    error = results.pop(1)
    assert isinstance(error, GenerationError)
    assert error.status == 500
    assert results == [whole_model("llama", prompt, NEW_TOKENS) for prompt in mixed if prompt is not poison]
    for url in stages.urls:
        await until_empty(url)


@pytest.mark.parametrize("steps", [2, 9])
async def test_a_consumer_that_leaves_with_chunks_on_their_way_frees_kv_in_every_stage(
    steps: int,
    start_stages: Any,
    open_chain: Any,
    answer: Any,
    prompts: Any,
    long_prompts: Any,
    whole_model: Any,
    traffic: Traffic,
    until_empty: Any,
) -> None:
    stages = start_stages("llama", CUTS[3])
    chain = await open_chain(stages, CHUNKS)
    task: asyncio.Task[list[int]] = asyncio.create_task(answer(chain, long_prompts[0], NEW_TOKENS))

    def leave(stage: int, body: Buffer) -> None:
        if stage == 0 and traffic.steps[0] == steps:
            task.cancel()

    traffic.before = leave
    company = await answer(chain, prompts[3], 60)
    assert company == whole_model("llama", prompts[3], 60)
    assert task.cancelled()
    for url in stages.urls:
        await until_empty(url)
