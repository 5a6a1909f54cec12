"""Greedy tokens of a chain of real processes equal generate, for every number of stages and any company."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

REQUIRED = ("llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "gpt_oss", "gpt2", "opt")
CUTS = {
    1: ["0:4"],
    2: ["0:2", "2:4"],
    3: ["0:1", "1:3", "3:4"],
    4: ["0:1", "1:2", "2:3", "3:4"],
}
NEW_TOKENS = 20


@pytest.mark.parametrize("stages", CUTS)
@pytest.mark.parametrize("architecture", REQUIRED)
async def test_tokens_equal_generate_alone_and_together(
    architecture: str, stages: int, start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    expected = [whole_model(architecture, prompt, NEW_TOKENS) for prompt in prompts]
    chain = await open_chain(start_stages(architecture, CUTS[stages]))
    assert await answer(chain, prompts[1], NEW_TOKENS) == expected[1]
    together = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts))
    assert together == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "gpt_oss"])
async def test_without_the_compiled_kernel_the_tokens_are_the_same(
    architecture: str, start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """Soft-capped scores, sliding windows, sinks, and none of these, as on a machine without a C compiler."""
    expected = [whole_model(architecture, prompt, NEW_TOKENS) for prompt in prompts]
    chain = await open_chain(start_stages(architecture, CUTS[2], STAGECRAFT_NO_KERNELS="1"))
    assert await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts)) == expected


@pytest.mark.parametrize("stages", CUTS)
async def test_together_takes_fewer_steps_than_one_by_one(
    stages: int, start_stages: Any, open_chain: Any, answer: Any, prompts: Any, steps_taken: Any
) -> None:
    running = start_stages("llama", CUTS[stages])
    chain = await open_chain(running)
    one_by_one = [await answer(chain, prompt, NEW_TOKENS) for prompt in prompts]
    steps_one_by_one = steps_taken(running.urls[0])
    together = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts))
    steps_together = steps_taken(running.urls[0]) - steps_one_by_one
    assert together == one_by_one
    assert steps_one_by_one == len(prompts) * NEW_TOKENS
    # each lane goes once through the length of an answer, if its sequences share their steps
    assert steps_together <= stages * (NEW_TOKENS + 2) < steps_one_by_one
