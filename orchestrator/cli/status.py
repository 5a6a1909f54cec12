"""`stagecraft status`: what runs on this machine's platform, once."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.platform_client import PlatformOption, connected

if TYPE_CHECKING:
    from rich.console import Console


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object instead.")] = False,
    platform: PlatformOption = None,
) -> None:
    """Show the revisions of the platform: replicas, load, and what the autoscaler makes of it.

    ready is ready/desired replicas; stable and panic are the averages over the two windows (concurrency, or requests
    per second), ! marks panic mode; target is what one replica should have; waiting are requests held at the
    activator, in flight those inside the replicas; mode is proxy while requests pass the activator, serve when they do
    not. A narrow terminal shows starting, draining and failed replicas as one column, such as +1 -2 !1.

    [bold]Examples[/]

    stagecraft status

    stagecraft status --json --platform local
    """
    with connected(platform) as client:
        seen = client.status()
    if as_json:
        print(json.dumps(seen))
        return
    from orchestrator.cli.status_view import status_view

    result_console().print(status_view(seen))


def result_console() -> Console:
    """For tables on standard output; in a pipe wide enough that nothing is cut off."""
    from rich.console import Console

    from orchestrator.cli.status_view import WIDTH_WITHOUT_TERMINAL

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL if wide else None)
