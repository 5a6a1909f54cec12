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
