"""Where a platform keeps what outlives it: the events that its brokers have accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.state_folder import state_folder

DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Keep events that are accepted and not delivered here; by default in ~/.local/state/stagecraft/NAME.",
        show_default=False,
    ),
]


def data_folder(wanted: Path | None, platform: str) -> Path:
    """The folder `wanted`, else one of the platform's name where the user's programs keep their state (XDG)."""
    return state_folder() / platform if wanted is None else wanted.absolute()
