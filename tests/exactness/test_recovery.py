"""A stage may die and come back without its caches: what was begun ends with the same text."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from functions.contract.sampling import SamplingParams
from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationError, GenerationRequest

NEW_TOKENS = 24
PARAMS = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=5)
THIRDS = ["0:1", "1:3", "3:4"]


async def answers_disturbed(chain: Chain, prompts: Sequence[Sequence[int]], disturb: Callable[[], Any]) -> Any:
    """What each prompt is answered when `disturb` is called once, as some sequence has got its 5th token.

    Nothing else runs before `disturb` returns, so no sequence can have more than a few tokens by then."""
    progress = [0] * len(prompts)

    async def one(index: int) -> list[int]:
        tokens = []
        async for token in chain.generate(GenerationRequest(tuple(prompts[index]), NEW_TOKENS, PARAMS)):
            tokens.append(token.id)
            progress[index] = len(tokens)
            if len(tokens) == 5 and max(progress) == 5 and not disturbed:
                disturbed.extend(progress)
                disturb()
        return tokens

    disturbed: list[int] = []
    answers = await asyncio.gather(*(one(index) for index in range(len(prompts))))
    assert disturbed
    assert max(disturbed) == 5 < NEW_TOKENS
    return answers


class Pause:
    """A stage's process that is stopped for some time and then goes on. Meanwhile the chain waits no longer than
    `patience_s` for a step, and not for the whole test: on a busy machine any step may take that long."""

    def __init__(self, chain: Chain, process: int, seconds: float, patience_s: float) -> None:
        self._chain = chain
        self._patient = chain.settings
        self.impatient = replace(chain.settings, step_timeout_s=patience_s)
        self._process = process
        self._seconds = seconds
        self._end: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._chain.settings = self.impatient
        os.kill(self._process, signal.SIGSTOP)
        self._end = asyncio.create_task(self._go_on())

    async def ended(self) -> None:
        assert self._end is not None
        await self._end

    async def _go_on(self) -> None:
        try:
            await asyncio.sleep(self._seconds)
        finally:
            os.kill(self._process, signal.SIGCONT)
            self._chain.settings = self._patient


def computed_again(stage: int) -> float:
    """Tokens that this stage alone was sent again so far."""
    return REGISTRY.get_sample_value("stagecraft_refill_tokens_total", {"stage": str(stage)}) or 0.0


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("architecture", ["llama", "falcon_h1"])
async def test_a_killed_stage_that_returns_empty_changes_no_token(
    architecture: str, lost: int, start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    stages = start_stages(architecture, THIRDS)
    chain = await open_chain(stages)
    undisturbed = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS, PARAMS) for prompt in prompts))
    before = computed_again(lost)

    def disturb() -> None:
        stages.kill(lost)
        stages.start(lost)

    assert await answers_disturbed(chain, prompts, disturb) == undisturbed
    assert computed_again(lost) > before, "the stage was lost before it held anything, or after it had ended"


async def test_a_full_lane_survives_the_loss_of_a_stage_with_the_usual_settings(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    """All sequences of a lane have to be computed again, and they are more than there are attempts."""
    stages = start_stages("llama", ["0:2", "2:4"])
    chain = await open_chain(stages, ChainSettings(lanes_max=1))
    many = [*prompts, *(prompt[::-1] for prompt in prompts)]
    undisturbed = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS, PARAMS) for prompt in many))

    def disturb() -> None:
        stages.kill(1)
        stages.start(1)

    assert await answers_disturbed(chain, many, disturb) == undisturbed


async def test_two_stages_killed_at_once_change_no_token(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    stages = start_stages("llama", THIRDS)
    chain = await open_chain(stages)
    undisturbed = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS, PARAMS) for prompt in prompts))
    before = [computed_again(index) for index in (0, 2)]

    def disturb() -> None:
        for index in (0, 2):
            stages.kill(index)
        for index in (0, 2):
            stages.start(index)

    assert await answers_disturbed(chain, prompts, disturb) == undisturbed
    assert all(computed_again(index) > earlier for index, earlier in zip((0, 2), before, strict=True))


@pytest.mark.parametrize("stopped", [0, 1, 2])
async def test_a_stage_that_stands_still_for_a_moment_changes_no_token(
    stopped: int, start_stages: Any, open_chain: Any, answer: Any, prompts: Any, until_empty: Any
) -> None:
    """Steps time out and are sent again; when the stage goes on it finds the old ones too and answers them all."""
    stages = start_stages("llama", THIRDS)
    chain = await open_chain(stages, ChainSettings(attempts=100, backoff_s=0.01))
    undisturbed = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS, PARAMS) for prompt in prompts))
    pause = Pause(chain, stages.processes[stopped].pid, seconds=1.2, patience_s=0.3)
    chain.settings = pause.impatient  # for the step that is on its way when the stage stops
    assert await answers_disturbed(chain, prompts, pause.begin) == undisturbed
    await pause.ended()
    for url in stages.urls:
        await until_empty(url)


async def test_a_full_lane_that_cannot_go_back_survives_a_stage_that_stands_still(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    """It is asked for a step again that it has had, computed or not. Recurrent state has no way back, so what was
    computed has to be computed from the beginning, and the sequences are more than there are attempts."""
    stages = start_stages("falcon_h1", ["0:2", "2:4"])
    chain = await open_chain(stages, ChainSettings(lanes_max=1, backoff_s=0.01))
    many = [*prompts, *(prompt[::-1] for prompt in prompts)]
    undisturbed = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS, PARAMS) for prompt in many))
    pause = Pause(chain, stages.processes[1].pid, seconds=3.0, patience_s=2.0)
    assert await answers_disturbed(chain, many, pause.begin) == undisturbed
    await pause.ended()


async def test_a_stage_that_stays_away_is_a_clear_error_and_nobody_hangs(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    stages = start_stages("llama", ["0:2", "2:4"])
    chain = await open_chain(stages)
    # the port stays open: to the chain this is a service that holds events until there is a replica
    chain.settings = ChainSettings(attempts=3, backoff_s=0.01, step_timeout_s=1.0, wake_timeout_s=2.0)
    stages.kill(1)
    results = await asyncio.gather(*(answer(chain, p, NEW_TOKENS) for p in prompts), return_exceptions=True)
    assert all(isinstance(r, GenerationError) and r.status == 503 for r in results)
    chain.settings = ChainSettings()  # it may take its time to load
    stages.start(1)
    assert len(await answer(chain, prompts[0], NEW_TOKENS)) == NEW_TOKENS


async def test_a_consumer_that_leaves_frees_kv_in_every_stage(
    start_stages: Any, open_chain: Any, prompts: Any, until_empty: Any
) -> None:
    stages = start_stages("llama", ["0:2", "2:4"])
    chain = await open_chain(stages)
    request = GenerationRequest(tuple(prompts[0]), 100)
    for _ in range(3):
        tokens = chain.generate(request)
        await anext(tokens)
        await tokens.aclose()
    for url in stages.urls:
        await until_empty(url)
