"""Where a platform keeps what outlives it: the events that its brokers have accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Keep events that are accepted and not delivered here; by default in ~/.local/state/stagecraft/NAME.",
        show_default=False,
    ),
]


def data_folder(wanted: Path | None, platform: str) -> Path:
    """The folder `wanted`, else one of the platform's name where the user's programs keep their state (XDG)."""
    if wanted is not None:
        return wanted.absolute()
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "stagecraft" / platform
