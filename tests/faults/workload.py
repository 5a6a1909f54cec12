"""What is asked for: requests drawn from a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

POOL = 48  # different requests at the most; their answers are computed beforehand, so they are used again


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, with how it is to be answered. `sampling` is empty for greedy."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str, *, stream: bool) -> dict[str, Any]:
        """For POST /openai/v1/completions."""
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
            **({"temperature": 0.0} | self.sampling),
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """One use of an ask. `number` counts them from 1; `key` is its idempotency key."""

    number: int
    ask: int  # index into the pool
    stream: bool
    key: str


def asks(seed: int, *, vocabulary: int, prompt_max: int, tokens_max: int, count: int = POOL) -> tuple[Ask, ...]:
    """Every other one greedy. Prompts of all lengths, some long enough for several chunks."""
    chance = random.Random(f"asks {seed}")
    made = []
    for index in range(count):
        length = chance.randint(1, prompt_max if chance.random() < 0.3 else min(40, prompt_max))
        prompt = tuple(chance.randrange(vocabulary) for _ in range(length))
        sampling = {} if index % 2 == 0 else _sampling(chance)
        made.append(Ask(prompt, chance.randint(max(1, tokens_max // 3), tokens_max), sampling))
    return tuple(made)


def generations(seed: int, count: int, pool: int) -> tuple[Generation, ...]:
    """Streamed and not, in equal parts by chance."""
    chance = random.Random(f"generations {seed}")
    return tuple(
        Generation(number, chance.randrange(pool), chance.random() < 0.6, f"soak-{seed}-{number}")
        for number in range(1, count + 1)
    )


def tokens_of(runs: Sequence[Generation], pool: Sequence[Ask]) -> int:
    """Tokens of all answers together."""
    return sum(pool[run.ask].max_tokens for run in runs)


def _sampling(chance: random.Random) -> dict[str, Any]:
    extras: tuple[dict[str, Any], ...] = (
        {},
        {"top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.02, "repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.2},
    )
    return {
        "temperature": round(chance.uniform(0.6, 1.4), 2),
        "seed": chance.getrandbits(32),
        **chance.choice(extras),
    }
