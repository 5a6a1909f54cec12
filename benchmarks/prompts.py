"""Prompts of random token ids: what is measured does not depend on what they say."""

from __future__ import annotations

import random


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """The same ones each time."""
    source = random.Random(0)
    return [[source.randrange(vocabulary) for _ in range(length)] for _ in range(count)]
