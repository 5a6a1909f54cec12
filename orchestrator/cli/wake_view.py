"""What a person sees while services wake from zero: one row each, with its state and the seconds since the request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestrator.cli.console import err

_STYLES = {"at zero": "dim", "starting": "yellow", "ready": "green", "failed": "red"}
_LOOK_EVERY_S = 0.05


@dataclass(slots=True)
class _Row:
    label: str
    detail: str
    state: str = "at zero"
    since_start_s: float = 0.0


class WakeView:
    """Rows that follow `status` (see Platform.status) while `shown`. In a terminal they change in place, else each
    change is a line. `rows` maps a service to its label and a detail."""

    def __init__(self, rows: Mapping[str, tuple[str, str]], status: Callable[[], Mapping[str, Any]]) -> None:
        self._rows = {service: _Row(label, detail) for service, (label, detail) in rows.items()}
        self._status = status
        self._started_s = time.monotonic()
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Shows the rows as long as the block runs, or until `end`."""
        follower = asyncio.create_task(self._follow())
        if err.is_terminal:
            self._live = Live(get_renderable=self._table, console=err, refresh_per_second=10)
            self._live.start()
        try:
            yield
        finally:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower
            self.end()

    def end(self) -> None:
        """The rows stay as they are: other text follows them."""
        self._look()
        if self._live is not None:
            self._live.stop()
            self._live = None

    async def _follow(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(_LOOK_EVERY_S)

    def _look(self) -> None:
        for revision in self._status()["revisions"]:
            row = self._rows.get(revision["service"])
            if row is not None:
                self._move(row, _state(revision))

    def _move(self, row: _Row, state: str) -> None:
        if state == row.state or row.state == "ready":
            return
        row.state, row.since_start_s = state, self._now_s()
        if not err.is_terminal:
            err.print(f"{row.label} ({row.detail}) {state} at {row.since_start_s:.1f} s", markup=False, soft_wrap=True)

    def _now_s(self) -> float:
        return time.monotonic() - self._started_s

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for row in self._rows.values():
            done = row.state == "ready"
            mark = Text("✓", "green") if done else self._spinner.render(time.monotonic())
            seconds = row.since_start_s if done else self._now_s()
            table.add_row(mark, row.label, row.detail, Text(row.state, _STYLES[row.state]), f"{seconds:.1f} s")
        return table


def _state(revision: Mapping[str, Any]) -> str:
    if revision["ready"]:
        return "ready"
    if revision["failed"]:
        return "failed"
    return "starting" if revision["starting"] else "at zero"
