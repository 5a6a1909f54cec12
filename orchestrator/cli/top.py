"""`stagecraft top`: the same as `stagecraft status`, alive."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.platform_client import PlatformOption, connected

if TYPE_CHECKING:
    from knative.client import Client

HISTORY = 24  # samples shown in a wide terminal


def top(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    platform: PlatformOption = None,
) -> None:
    """Watch the revisions of the platform scale, until Ctrl-C.

    Columns are those of `stagecraft status`; load (requests waiting and in flight) and replicas (ready ones) show the
    last while. A narrow terminal shows less of it, the state in short, and starting, draining and failed replicas as
    one column, such as +1 -2 !1.
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

    histories = Histories()
    try:
        with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
            while True:
                seen = client.status()
                histories.add(seen)
                live.update(status_view(seen, histories.series()), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return


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

    def series(self) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        """Load and ready replicas of each revision, the newest look last."""
        return {key: (list(load), list(self._replicas[key])) for key, load in self._load.items()}
