"""How the processes under test are set up: limits short enough that what hangs is found in a test's time."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from functions.settings import StageSettings
from orchestrator.settings import OrchestratorSettings
from tests.faults.checkpoint import spans
from tests.faults.fleet import Setup
from tests.faults.schedule import KINDS, Kind

LEASE_S = 8.0
_ORCHESTRATOR = {
    "step_timeout_s": "3",
    "hang_floor_s": "1",
    "wake_timeout_s": "60",
    "release_timeout_s": "3",
    "probe_every_s": "0.2",
    "grace_s": "3",
}
_STAGE = {"kv_lease_s": str(LEASE_S)}


def has_leases() -> bool:
    """Without them, sequences whose release was lost stay for ever."""
    return "kv_lease_s" in StageSettings.model_fields


def kinds() -> tuple[Kind, ...]:
    """Those that can be survived: without digests, flipped bits change texts, and without deadlines whatever is silent
    is waited for."""
    needed = {"corrupt": "functions.contract.seals", "stop": "orchestrator.deadlines", "drop": "orchestrator.deadlines"}
    return tuple(kind for kind in KINDS if kind not in needed or importlib.util.find_spec(needed[kind]) is not None)


def setup(model: Path, folder: Path, stages: int) -> Setup:
    """`folder` is for logs."""
    return Setup(
        model,
        folder,
        spans(stages),
        stage_settings=_known(_STAGE, "STAGE_", StageSettings.model_fields),
        orchestrator_settings=_known(_ORCHESTRATOR, "ORCHESTRATOR_", OrchestratorSettings.model_fields),
    )


def _known(settings: Mapping[str, str], prefix: str, fields: Mapping[str, object]) -> dict[str, str]:
    return {prefix + name.upper(): value for name, value in settings.items() if name in fields}
