"""A process that generates for ever: `python -m tests.exactness.endless URLS PROMPTS`, both JSON.

It prints a line when all have begun.
"""

from __future__ import annotations

import asyncio
import json
import sys

from orchestrator.chain import Chain
from orchestrator.generation import GenerationRequest

TOKENS = 48  # of each answer, after which another is asked for


async def main(urls: list[str], prompts: list[list[int]]) -> None:
    chain = Chain("test-plan", urls)
    await chain.start()
    begun = 0

    async def one(prompt: list[int]) -> None:
        nonlocal begun
        first = True
        while True:
            async for _ in chain.generate(GenerationRequest(tuple(prompt), TOKENS)):
                begun += first
                if first and begun == len(prompts):
                    print("begun", flush=True)
                first = False

    await asyncio.gather(*(one(prompt) for prompt in prompts))


if __name__ == "__main__":
    asyncio.run(main(*map(json.loads, sys.argv[1:])))
