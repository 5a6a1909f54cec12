"""`stagecraft top`: the same as `stagecraft status`, alive."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.platform_client import PlatformOption, connected

if TYPE_CHECKING:
    from rich.console import RenderableType

    from knative.client import Client

HISTORY = 24  # samples shown


def top(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    platform: PlatformOption = None,
) -> None:
    """Watch the revisions of the platform scale, until Ctrl-C.

    Columns are those of `stagecraft status`; load (requests running and waiting) and replicas show the last while.
    Where standard output is no terminal, one table is printed.

    [bold]Examples[/]

    stagecraft top

    stagecraft top --interval 0.5 --platform local
    """
    with connected(platform) as client:
        if sys.stdout.isatty():
            _watch(client, interval)
            return
        seen = client.status()
    from orchestrator.cli.status import result_console
    from orchestrator.cli.status_view import status_view

    result_console().print(status_view(seen))


def _watch(client: Client, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from orchestrator.cli.status_view import status_view

    # the terminal has to be given back on these, too
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    histories = Histories()
    try:
        with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
            while True:
                seen = client.status()
                histories.add(seen)
                live.update(status_view(seen, histories.cells()), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


class Histories:
    """Load and ready replicas of each revision at the last looks."""

    def __init__(self) -> None:
        self._load: dict[str, deque[float]] = {}
        self._replicas: dict[str, deque[float]] = {}

    def add(self, status: Mapping[str, Any]) -> None:
        """Takes over a look; revisions that it lacks are forgotten."""
        from orchestrator.cli.status_view import revision_key

        seen = {revision_key(revision): revision for revision in status["revisions"]}
        for series in (self._load, self._replicas):
            for gone in series.keys() - seen.keys():
                del series[gone]
        for key, revision in seen.items():
            load = revision["in_flight"] + revision["waiting"]
            self._load.setdefault(key, deque(maxlen=HISTORY)).append(load)
            self._replicas.setdefault(key, deque(maxlen=HISTORY)).append(revision["ready"])

    def cells(self) -> dict[str, tuple[RenderableType, RenderableType]]:
        """Two sparklines for each revision, the newest value at the right."""
        from rich.text import Text

        from orchestrator.cli.status_view import sparkline

        return {
            key: (
                Text(sparkline(list(load)).rjust(HISTORY), "magenta"),
                Text(sparkline(list(self._replicas[key])).rjust(HISTORY), "green"),
            )
            for key, load in self._load.items()
        }
