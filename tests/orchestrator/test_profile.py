"""Measuring stages: the parts that need no process. The rest is run for real in cli/test_profile.py."""

from __future__ import annotations

import numpy as np
import pytest

from functions.contract.messages import Slice, Step
from orchestrator.profile import ProfileOptions, hidden_frame

VALUES = np.random.default_rng(1).standard_normal((3, 8), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_states_are_what_torch_reads_in_that_type(dtype: str) -> None:
    import torch

    frame = hidden_frame(VALUES, dtype)
    read = torch.frombuffer(bytearray(frame.data), dtype=getattr(torch, dtype)).view(frame.shape)
    bits = {"float32": 23, "bfloat16": 7, "float16": 10}[dtype]
    np.testing.assert_allclose(read.to(torch.float32).numpy(), VALUES, rtol=2.0**-bits)
    Step((Slice(1, 4, 3),), np.zeros(3, np.int32), frame)  # a step takes them


def test_the_default_lane_is_measured_and_not_extrapolated() -> None:
    from orchestrator.chain import ChainSettings

    assert ChainSettings().lane_width in ProfileOptions().widths
