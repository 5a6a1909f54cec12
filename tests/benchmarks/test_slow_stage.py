"""The stage that the figure `slow` slows down."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from benchmarks.slow_stage import pad_steps
from functions.contract import events
from functions.contract.events import Event
from functions.contract.messages import Opening, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.service import StageService
from functions.settings import StageSettings
from functions.stage import Stage

STEP_MS = 80


def test_a_step_takes_at_least_its_time(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "steps", Stage.steps)  # so that it is put back
    pad_steps(STEP_MS / 1e3)
    service = StageService(StageSettings(model=str(tiny_checkpoint), blocks="0:4", plan="p", threads=1, kv_lease_s=0))
    step = Step((Slice(1, 0, 2, True),), np.array([5, 6], dtype=np.int32), None, {1: Opening(SamplingParams(), 1)})
    body = bytearray(b"".join(step.to_body()))
    event = Event(events.STEP, "/tests", "1", events.TENSORS, body, {"plan": "p", "stage": "0"})
    reply = asyncio.run(service.answer(event, "127.0.0.1:1"))
    assert reply is not None
    assert int(reply.extensions["computeus"]) >= 1000 * STEP_MS
