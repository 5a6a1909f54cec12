"""What is shown while services wake."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli import wake_view
from orchestrator.cli.wake_view import WakeView

ROWS = {"s0": ("stage 0", "blocks 0:3"), "front": ("orchestrator", "endpoints")}


class Status:
    """States by service, as `Platform.status` tells them."""

    def __init__(self) -> None:
        self.states = {"s0": "", "front": "", "other": "failed"}

    def __call__(self) -> dict[str, Any]:
        return {"revisions": [self._one(service, state) for service, state in self.states.items()]}

    @staticmethod
    def _one(service: str, state: str) -> dict[str, Any]:
        return {"service": service, **{name: int(name == state) for name in ("ready", "starting", "failed")}}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., io.StringIO]:
    """What the view writes from now on, to a terminal or not."""

    def use(*, terminal: bool) -> io.StringIO:
        text = io.StringIO()
        monkeypatch.setattr(wake_view, "err", Console(file=text, force_terminal=terminal, width=100))
        return text

    return use


async def follow(view: WakeView, status: Status, changes: list[tuple[str, str]], text: io.StringIO) -> None:
    async with asyncio.timeout(30), view.shown():
        for service, state in changes:
            before = len(text.getvalue())
            status.states[service] = state
            while len(text.getvalue()) == before:  # noqa: ASYNC110 (it sets no event)
                await asyncio.sleep(0.01)


async def test_each_change_is_a_line_where_there_is_no_terminal(shown: Callable[..., io.StringIO]) -> None:
    text, status = shown(terminal=False), Status()
    changes = [("s0", "starting"), ("front", "starting"), ("front", "ready"), ("s0", "failed"), ("s0", "ready")]
    await follow(WakeView(ROWS, status), status, changes, text)
    lines = [line.rsplit(" at ", 1)[0] for line in text.getvalue().splitlines()]
    assert lines == [
        "stage 0 (blocks 0:3) starting",
        "orchestrator (endpoints) starting",
        "orchestrator (endpoints) ready",
        "stage 0 (blocks 0:3) failed",
        "stage 0 (blocks 0:3) ready",
    ]


async def test_rows_in_a_terminal_change_in_place_and_stay(shown: Callable[..., io.StringIO]) -> None:
    text, status = shown(terminal=True), Status()
    await follow(WakeView(ROWS, status), status, [("s0", "starting"), ("s0", "ready"), ("front", "ready")], text)
    last = text.getvalue().rsplit("✓", 2)[1:]
    assert ["stage 0" in last[0], "orchestrator" in last[1]] == [True, True]
    assert "\x1b[?25h" in text.getvalue()  # the cursor is back


async def test_ready_stays_ready(shown: Callable[..., io.StringIO]) -> None:
    text, status = shown(terminal=False), Status()
    view = WakeView(ROWS, status)
    await follow(view, status, [("s0", "ready")], text)
    status.states["s0"] = "starting"  # another replica
    view.end()
    assert len(text.getvalue().splitlines()) == 1
