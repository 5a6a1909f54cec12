"""Prompts of random token ids: what is measured does not depend on what they say."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """The same ones each time."""
    return prompts_of([length] * count, vocabulary)


def prompts_of(lengths: Iterable[int], vocabulary: int) -> list[list[int]]:
    """The same ones each time."""
    source = random.Random(0)
    return [[source.randrange(vocabulary) for _ in range(length)] for length in lengths]


def spell(tokens: Sequence[int]) -> str:
    """Token ids as text for a model of `checkpoints.spelling`, where each token is a word: "t17 t4"."""
    return " ".join(f"t{token}" for token in tokens)


def read(text: str) -> list[int]:
    """The token ids that a text of `spell` stands for."""
    return [int(word.removeprefix("t")) for word in text.split()]
