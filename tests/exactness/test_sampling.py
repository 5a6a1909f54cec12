"""Sampled tokens depend on the seed alone: not on the number of stages, the company, or the way it was chunked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from functions.contract.sampling import SamplingParams
from orchestrator.chain import ChainSettings

REQUIRED = ("llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "gpt_oss", "gpt2", "opt")
CUTS = (["0:4"], ["0:3", "3:4"], ["0:1", "1:2", "2:4"], ["0:1", "1:2", "2:3", "3:4"])
PARAMS = {
    "plain": SamplingParams(temperature=1.0, seed=7),
    "filtered": SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02, seed=11),
    "penalised": SamplingParams(
        temperature=1.2, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, seed=2**53 - 1
    ),
    "biased": SamplingParams(temperature=0.7, logit_bias={3: 5.0, 4: -100.0}, logprobs=5, seed=0),
}
FILTERED_AND_PENALISED = SamplingParams(
    temperature=1.1, top_k=60, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, seed=13
)
NEW_TOKENS = 24
FEW_TOKENS = 10


async def test_same_seed_same_tokens_whatever_the_stages_and_the_company(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    seen = []
    for cut in CUTS:
        chain = await open_chain(start_stages("llama", cut))
        alone = [await answer(chain, prompts[2], NEW_TOKENS, params) for params in PARAMS.values()]
        crowd = [answer(chain, prompt, NEW_TOKENS, params) for prompt in prompts for params in PARAMS.values()]
        together = await asyncio.gather(*crowd)
        assert together[2 * len(PARAMS) : 3 * len(PARAMS)] == alone
        seen.append(together)
    assert seen == [seen[0]] * len(CUTS)


@pytest.mark.parametrize("architecture", REQUIRED)
async def test_every_required_architecture_draws_the_same_tokens_in_any_number_of_stages(
    architecture: str, start_stages: Any, open_chain: Any, answer: Any, prompts: Any
) -> None:
    seen = []
    for cut in CUTS:
        chain = await open_chain(start_stages(architecture, cut))
        alone = await answer(chain, prompts[2], FEW_TOKENS, FILTERED_AND_PENALISED)
        wanted = [(prompt, params) for prompt in prompts for params in (PARAMS["plain"], FILTERED_AND_PENALISED)]
        together = await asyncio.gather(*(answer(chain, prompt, FEW_TOKENS, params) for prompt, params in wanted))
        assert together[5] == alone
        assert len({tuple(tokens) for tokens in together}) > len(prompts), "what is compared must differ"
        seen.append(together)
        await chain.close()
    assert seen == [seen[0]] * len(CUTS)


async def test_another_seed_gives_other_tokens(start_stages: Any, open_chain: Any, answer: Any, prompts: Any) -> None:
    chain = await open_chain(start_stages("llama", ["0:2", "2:4"]))
    draws = [SamplingParams(temperature=1.0, seed=seed) for seed in range(5)]
    answers = [tuple(await answer(chain, prompts[0], NEW_TOKENS, params)) for params in draws]
    assert len(set(answers)) == len(answers)


async def test_chunked_prefill_changes_nothing(
    start_stages: Any, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    expected = [whole_model("gemma2", prompt, NEW_TOKENS) for prompt in prompts]
    chain = await open_chain(start_stages("gemma2", ["0:1", "1:4"]), ChainSettings(step_tokens_max=7, lanes_max=1))
    assert await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts)) == expected
