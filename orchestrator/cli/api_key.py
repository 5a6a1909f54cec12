"""The API key that commands send: out of a file, as what stands on a command line is seen by every user in `ps`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.console import fail

ApiKeyFileOption = Annotated[
    Path | None,
    typer.Option(
        envvar="STAGECRAFT_API_KEY_FILE",
        help="File with the API key that the server asks for: the first line that is no comment.",
        show_default=False,
    ),
]


def read_api_key(path: Path | None, option: str = "--api-key-file") -> str | None:
    """None without a file. Ends the command with 2 for a file that holds no key."""
    from functions.contract.watched_file import FileError, WatchedFile
    from orchestrator.api_keys import first_api_key

    try:
        return None if path is None else WatchedFile(path, first_api_key).value
    except FileError as error:
        fail(f"{option}: {error}", 2)
