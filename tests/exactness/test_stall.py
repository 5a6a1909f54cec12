"""How long a client waits for its next token when a warm stage is killed and a second replica is ready.

Times are printed, not judged: a busy machine is no mistake. `pytest -m slow -s tests/exactness/test_stall.py`
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY

from orchestrator.generation import GenerationRequest

HALVES = ["0:4", "4:8"]
CONTEXT, NEW_TOKENS, ROUNDS = 512, 24, 5
DEMO = Path(__file__).parents[2] / "models" / "demo"


def refilled(stage: int) -> float:
    return REGISTRY.get_sample_value("stagecraft_refill_tokens_total", {"stage": str(stage)}) or 0.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lost", [0, 1])
async def test_stall_after_the_loss_of_a_warm_stage(
    lost: int, start_replicas: Any, open_chain: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tuple(np.random.default_rng(1).integers(0, 2048, CONTEXT - NEW_TOKENS // 2).tolist())
    stalls, texts = [], []
    for _ in range(ROUNDS):
        replicas = await start_replicas(DEMO, HALVES)
        chain = await open_chain(replicas)
        before = refilled(lost), refilled(1 - lost)
        at_s, tokens = [], []
        async for token in chain.generate(GenerationRequest(prompt, NEW_TOKENS)):
            at_s.append(time.perf_counter())
            tokens.append(token.id)
            if len(tokens) == NEW_TOKENS // 2:
                replicas.lose(lost)
        assert refilled(lost) - before[0] >= len(prompt)
        assert refilled(1 - lost) == before[1]
        await chain.close()
        for stages in replicas.sets:
            stages.close()
        stalls.append(max(after - then for then, after in pairwise(at_s)))
        texts.append(tokens)
    assert all(tokens == texts[0] for tokens in texts)
    p50, p95 = np.percentile(stalls, [50, 95])
    with capsys.disabled():
        print(f"\nstage {lost} killed, context {CONTEXT}: stall p50 {p50:.3f} s, p95 {p95:.3f} s, of {ROUNDS}")
