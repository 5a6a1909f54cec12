"""How the processes under test are set up: limits short enough that what hangs is found in a test's time."""

from __future__ import annotations

from pathlib import Path

from tests.faults.checkpoint import spans
from tests.faults.fleet import Setup

LEASE_S = 8.0
_ORCHESTRATOR = {
    "STEP_TIMEOUT_S": "3",
    "HANG_FLOOR_S": "1",
    "WAKE_TIMEOUT_S": "60",
    "RELEASE_TIMEOUT_S": "3",
    "PROBE_EVERY_S": "0.2",
    "GRACE_S": "3",
}
_STAGE = {"KV_LEASE_S": str(LEASE_S)}


def setup(model: Path, folder: Path, stages: int) -> Setup:
    """`folder` is for logs."""
    return Setup(
        model,
        folder,
        spans(stages),
        stage_settings={f"STAGE_{name}": value for name, value in _STAGE.items()},
        orchestrator_settings={f"ORCHESTRATOR_{name}": value for name, value in _ORCHESTRATOR.items()},
    )
