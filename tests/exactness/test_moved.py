"""Keys and values of every kind of architecture go to another replica bit for bit, or stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from functions.contract.checkpoint import open_checkpoint
from functions.contract.handover import Export, Pieces
from functions.contract.messages import Opening, Samples, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from functions.runner import PackedRunner, load_runner
from functions.stage import Stage

KEY = "0123456789abcdef" * 2
TEXTS = {1: list(range(30)), 2: [5, 6, 7]}  # one past the windows of the small models

# architecture -> how its caches are kept: in pages, by Transformers' cache with only keys and values, or otherwise
KINDS = {
    "llama": "pages",
    "gemma3_text": "pages",
    "gpt_oss": "pages",
    "bloom": "whole",
    "mpt": "whole",
    "deepseek_v3": "whole",
    "llama4_text": "whole",
    "falcon_h1": "stays",
}


def step_of(positions: dict[int, int], texts: dict[int, list[int]]) -> Step:
    slices = tuple(Slice(sequence, position, len(texts[sequence])) for sequence, position in positions.items())
    tokens = np.array([token for sequence in positions for token in texts[sequence]], dtype=np.int32)
    opening = Opening(SamplingParams(logprobs=5, seed=1, temperature=0.8), 2, KEY)
    return Step(slices, tokens, None, {piece.sequence: opening for piece in slices if piece.start == 0})


def answers(stage: Stage, positions: dict[int, int], count: int) -> list[bytes]:
    """What the stage says to the next steps, as it goes over the wire."""
    said = []
    for number in range(count):
        at = {sequence: position + number for sequence, position in positions.items()}
        answer = stage.step(step_of(at, {sequence: [number + 3] for sequence in at}))
        assert isinstance(answer, Samples)
        said.append(b"".join(answer.to_body()))
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "kind"), KINDS.items())
def test_what_was_moved_goes_on_with_the_same_bits(
    checkpoint_of: Callable[[str], Path], architecture: str, kind: str, dtype: torch.dtype
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of(architecture)))
    old, new = (Stage(load_runner(checkpoint, BlockSpan(0, 4), dtype, torch.device("cpu")), 1 << 22) for _ in range(2))
    assert (kind == "pages") == isinstance(old.runner, PackedRunner)
    old.step(step_of({1: 0, 2: 0}, TEXTS))
    lengths = {sequence: len(text) for sequence, text in TEXTS.items()}
    answers(old, lengths, 2)
    positions = {sequence: length + 2 for sequence, length in lengths.items()}
    wanted = dict.fromkeys(TEXTS, 0)
    while wanted and (pieces := old.export(Export(KEY, wanted, 1 << 30))).pieces:
        new.install(Pieces.from_body(bytearray(b"".join(pieces.to_body()))))
        for piece in pieces.pieces:
            del wanted[piece.sequence]
    if kind == "stays":
        assert list(wanted) == list(TEXTS)
        return
    assert not wanted
    assert answers(new, positions, 4) == answers(old, positions, 4)
