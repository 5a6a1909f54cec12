"""Where a process finds its checkpoint: `demo` is the model that comes with Stagecraft, and a mount may appear late."""

from __future__ import annotations

import os
import time
from pathlib import Path

import structlog

from functions.contract.checkpoint import CheckpointError

DEMO = "demo"
# beside the packages, in a checkout as in the container images
DEMO_FOLDER = Path(__file__).resolve().parents[2] / "models" / DEMO

_LATE_WAIT_S = 300.0
_LOOK_EVERY_S = 0.25

_log = structlog.get_logger()


def checkpoint_location(model: str) -> str:
    """What `open_checkpoint` takes: `model` itself; for `demo` the folder of the demonstration model, unless the
    current directory has a folder of that name."""
    return str(DEMO_FOLDER) if model == DEMO and not os.path.isdir(model) else model


def default_wait_s() -> float:
    """How long to wait for a mount: not at all, or 5 minutes where KServe says that weights come late.

    It sets MODEL_INIT_MODE=async when a second container brings the weights (storageUri oci://): /mnt/models is then
    a symbolic link into that container's file system, and leads nowhere until it runs."""
    return _LATE_WAIT_S if os.environ.get("MODEL_INIT_MODE", "").lower() == "async" else 0.0


def wait_for_checkpoint(location: str, timeout_s: float) -> None:
    """Blocks until the folder holds config.json; returns at once for a URL, and for a `timeout_s` of 0.

    Raises CheckpointError when the time is over."""
    if timeout_s == 0 or "://" in location:
        return
    config = os.path.join(location, "config.json")
    trouble = _trouble(config)
    if trouble is None:
        return
    _log.info("waiting_for_checkpoint", location=location, timeout_s=timeout_s)
    until_s = time.monotonic() + timeout_s
    while trouble is not None:
        if time.monotonic() >= until_s:
            raise CheckpointError(
                f"{config} cannot be read after {timeout_s:g} s ({trouble}); look whether the container or volume that "
                "brings the weights is there, or give it more time with STAGE_MODEL_WAIT_S and "
                "ORCHESTRATOR_MODEL_WAIT_S"
            )
        time.sleep(_LOOK_EVERY_S)
        trouble = _trouble(config)


def _trouble(path: str) -> str | None:
    """Why the file cannot be found: no link target yet, or another user's process behind the link."""
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
