"""What a person sees while the processes start: one row each, with its state and the seconds since the start."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestrator.cli.console import err

_STYLES = {"starting": "dim", "loading": "yellow", "ready": "green"}


@dataclass(slots=True)
class _Row:
    detail: str
    state: str = "starting"
    since_start_s: float = 0.0


class StartupView:
    """Rows that `observe` moves on. In a terminal they change in place, else each change is a line."""

    def __init__(self, details: Mapping[str, str]) -> None:
        self._rows = {name: _Row(detail) for name, detail in details.items()}
        self._started_s = time.monotonic()
        self._spinner = Spinner("dots")

    def observe(self, name: str, state: str) -> None:
        """Process `name` has reached `state`."""
        row = self._rows[name]
        row.state, row.since_start_s = state, self._now_s()
        if not err.is_terminal:
            err.print(f"{name} ({row.detail}) {state} at {row.since_start_s:.1f} s", markup=False, soft_wrap=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the rows as long as the block runs."""
        if not err.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=err, refresh_per_second=10):
            yield

    def _now_s(self) -> float:
        return time.monotonic() - self._started_s

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, row in self._rows.items():
            done = row.state == "ready"
            mark = Text("✓", "green") if done else self._spinner.render(time.monotonic())
            seconds = row.since_start_s if done else self._now_s()
            table.add_row(mark, name, row.detail, Text(row.state, _STYLES[row.state]), f"{seconds:.1f} s")
        return table
