"""Where what outlives a command lies: events of platforms, batches, results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def state_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$XDG_STATE_HOME/stagecraft; a relative path there does not count (XDG Base Directory Specification)."""
    named = environment.get("XDG_STATE_HOME", "")
    return (Path(named) if named.startswith("/") else Path.home() / ".local" / "state") / "stagecraft"
