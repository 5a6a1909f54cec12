"""A stage may die and come back without its caches: what was begun ends with the same text."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from functions.contract.sampling import SamplingParams
from orchestrator.chain import ChainSettings
from orchestrator.generation import GenerationError, GenerationRequest

NEW_TOKENS = 40
PARAMS = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=5)


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("architecture", ["llama", "falcon_h1"])
async def test_a_killed_stage_that_returns_empty_changes_no_token(
    architecture: str, lost: int, start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    stages = start_stages(architecture, ["0:1", "1:3", "3:4"])
    chain = await open_chain(stages, ChainSettings(attempts=20))
    undisturbed = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS, PARAMS) for prompt in prompts))

    async def disturb() -> None:
        await asyncio.sleep(0.15)
        stages.kill(lost)
        stages.start(lost)

    disturbed = await asyncio.gather(disturb(), *(answer(chain, prompt, NEW_TOKENS, PARAMS) for prompt in prompts))
    assert disturbed[1:] == undisturbed


async def test_a_stage_that_stays_away_is_a_clear_error_and_nobody_hangs(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    stages = start_stages("llama", ["0:2", "2:4"])
    chain = await open_chain(stages, ChainSettings(attempts=3, backoff_s=0.01, step_timeout_s=1.0))
    stages.kill(1)
    results = await asyncio.gather(*(answer(chain, p, NEW_TOKENS) for p in prompts), return_exceptions=True)
    assert all(isinstance(r, GenerationError) and r.status == 503 for r in results)
    stages.start(1)
    assert len(await answer(chain, prompts[0], NEW_TOKENS)) == NEW_TOKENS


async def test_a_consumer_that_leaves_frees_kv_in_every_stage(start_stages: Any, open_chain: Any, prompts: Any) -> None:
    stages = start_stages("llama", ["0:2", "2:4"])
    chain = await open_chain(stages)
    request = GenerationRequest(tuple(prompts[0]), 100)
    for _ in range(3):
        tokens = chain.generate(request)
        await anext(tokens)
        await tokens.aclose()
    for url in stages.urls:
        await _until_empty(url)


async def _until_empty(url: str) -> None:
    """The stage's own metrics say when it holds no sequence."""
    async with httpx.AsyncClient() as client:
        for _ in range(400):
            if "stagecraft_stage_sequences 0.0" in (await client.get(f"{url}/metrics")).text:
                return
            await asyncio.sleep(0.05)
    pytest.fail(f"the stage at {url} still holds sequences")
