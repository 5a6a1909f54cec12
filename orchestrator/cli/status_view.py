"""The revisions of a platform as a table: what the autoscaler sees and wants, and what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.cli.objects_view import duration

WIDTH_WITHOUT_TERMINAL = 160  # characters
_STYLES = {"Active": "green", "Activating": "yellow", "Inactive": "dim", "Failed": "bold red"}
_HEADINGS = (
    ("revision", "left"),
    ("state", "left"),
    ("ready", "right"),
    ("starting", "right"),
    ("draining", "right"),
    ("failed", "right"),
    ("stable", "right"),
    ("panic", "right"),
    ("target", "right"),
    ("queued", "right"),
    ("in flight", "right"),
    ("mode", "left"),
)
_BARS = "▁▂▃▄▅▆▇█"

Status = Mapping[str, Any]


def status_view(status: Status, histories: Mapping[str, Sequence[RenderableType]] | None = None) -> RenderableType:
    """The table with what is wrong below it; `histories` adds two cells to the revision of that key."""
    revisions = status["revisions"]
    if not revisions:
        return Group(_title(status), Text("no services yet; apply one with `stagecraft local apply -f FILE`", "dim"))
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading, justify in _HEADINGS:
        table.add_column(heading, justify="left" if justify == "left" else "right", no_wrap=True)
    if histories is not None:
        table.add_column("load", no_wrap=True)
        table.add_column("replicas", no_wrap=True)
    namespaces = len({revision["namespace"] for revision in revisions}) > 1
    for revision in revisions:
        extra = () if histories is None else histories.get(revision_key(revision), ())
        table.add_row(*_cells(revision, namespaces), *extra)
    return Group(_title(status), table, *_messages(revisions))


def revision_key(revision: Status) -> str:
    return f"{revision['namespace']}/{revision['revision']}"


def sparkline(values: Sequence[float], *, top: float = 0.0) -> str:
    """One bar a value, from nothing to the largest of them, or `top` if that is larger. Nothing is a blank."""
    largest = max([top, *values])
    return "".join(_BARS[min(7, int(8 * value / largest))] if value > 0 else " " for value in values)


def _title(status: Status) -> Text:
    platform = status["platform"]
    return Text.assemble(("platform ", "dim"), platform["name"], ("  at ", "dim"), platform["url"])


def _cells(revision: Status, namespaces: bool) -> list[Text]:
    unit = "/s" if revision["metric"] == "rps" else ""
    panic = "bold red" if revision["panic_mode"] else ""
    return [
        Text(revision_key(revision) if namespaces else revision["revision"]),
        Text(revision["state"], _STYLES.get(revision["state"], "")),
        Text(f"{revision['ready']}/{revision['desired']}"),
        _count(revision["starting"], "yellow"),
        _count(revision["draining"], "cyan"),
        _count(revision["failed"], "bold red"),
        Text(_average(revision["stable"], unit)),
        Text(_average(revision["panic"], unit) + ("!" if revision["panic_mode"] else ""), panic),
        Text(_average(revision["target"], unit)),
        _count(revision["waiting"], "yellow"),
        _count(revision["in_flight"], ""),
        Text(revision["mode"]),
    ]


def _count(number: int, style: str) -> Text:
    return Text(str(number), style if number else "dim")


def _average(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g}{unit}" if abs(value) < 1000 else f"{value:.0f}{unit}"


def _messages(revisions: Sequence[Status]) -> list[Text]:
    """Why something is not as it should be, revisions and pods."""
    lines = [(revision["revision"], revision["message"]) for revision in revisions]
    lines += [
        (_pod(pod), pod["message"])
        for revision in revisions
        for pod in revision["pods"]
        if pod["message"] != revision["message"]
    ]
    shown = [Text(f"{name}: {message}", "yellow") for name, message in lines if message]
    return [Text(""), *shown] if shown else []


def _pod(pod: Status) -> str:
    count = pod["restarts"]
    restarts = f"{count} restart{'s'[: count != 1]}, " if count else ""
    return f"pod {pod['name']} ({pod['phase']}, {restarts}{duration(pod['age_s'])})"
