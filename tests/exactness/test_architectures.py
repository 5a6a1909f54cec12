"""More architectures, packed and not: a chain of two stages equals generate for three prompts at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

NEW_TOKENS = 12
OTHERS = (
    "mistral", "qwen2", "qwen3_moe", "granite", "cohere2", "gpt_neox", "olmo2", "lfm2", "starcoder2", "exaone4",
    "bloom", "falcon", "gptj", "mpt", "diffllama", "llama4_text", "falcon_h1", "deepseek_v3",
)  # fmt: skip


@pytest.mark.parametrize("architecture", OTHERS)
async def test_two_stages_equal_generate(
    architecture: str, start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    some = prompts[:3]
    expected = [whole_model(architecture, prompt, NEW_TOKENS) for prompt in some]
    chain = await open_chain(start_stages(architecture, ["0:1", "1:4"]))
    assert await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in some)) == expected
