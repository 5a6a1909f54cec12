"""The revisions of a platform as a table: what the autoscaler sees and wants, and what there is.

A number is never cut: a narrower terminal gets fewer and shorter columns, the widest of `_LAYOUTS` that fits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator.cli.objects_view import duration
from orchestrator.cli.triggers_view import triggers_view

WIDTH_WITHOUT_TERMINAL = 160  # characters
NAME_WIDTH_MIN = 8
_STYLES = {"Active": "green", "Activating": "yellow", "Inactive": "dim", "Failed": "bold red"}
_SHORT_STATES = {"Activating": "Waking", "Inactive": "Zero"}
_GENERATED = re.compile(r"-[0-9]{5,}")  # what a revision has behind the name of its service
_BARS = "▁▂▃▄▅▆▇█"

Status = Mapping[str, Any]
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Load and ready replicas of the revision of a key, the newest last."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is shown; `load` and `replicas` are the widths of the graphs, `gap` the blanks between columns."""

    full: bool = False  # else states and names in short, and one column for starting, draining and failed
    gap: int = 1
    load: int = 0
    replicas: int = 0
    without: frozenset[str] = frozenset()


def _less(*headings: str) -> frozenset[str]:
    return frozenset(headings)


_LAYOUTS = (
    _Layout(full=True, gap=2, load=24, replicas=24),
    _Layout(gap=2, load=20, replicas=20),
    _Layout(load=16, replicas=16),
    _Layout(load=10, replicas=10),
    _Layout(load=7, without=_less("mode")),
    _Layout(load=8, without=_less("mode", "target")),
    _Layout(without=_less("mode", "target", "panic")),
    _Layout(without=_less("mode", "target", "panic", "stable", "+ - !", "state")),
)


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    justify: Literal["left", "right"]
    cells: list[Text]

    @property
    def width(self) -> int:
        return max(len(self.heading), *(cell.cell_len for cell in self.cells))


def status_view(status: Status, histories: Series | None = None) -> RenderableType:
    """The table with what is wrong below it; with `histories` each revision has two graphs."""
    revisions, triggers = status["revisions"], status.get("triggers", ())
    if not revisions and not triggers:
        return Group(_title(status), Text("no services yet; apply one with `stagecraft local apply -f FILE`", "dim"))
    shown: list[RenderableType] = [_Revisions(revisions, histories), *_messages(revisions)] if revisions else []
    return Group(_title(status), *shown, *triggers_view(triggers))


def revision_key(revision: Status) -> str:
    return f"{revision['namespace']}/{revision['revision']}"


def sparkline(values: Sequence[float], *, top: float = 0.0) -> str:
    """One bar a value, from nothing to the largest of them, or `top` if that is larger. Nothing is a blank."""
    largest = max([top, *values])
    return "".join(_BARS[min(7, int(8 * value / largest))] if value > 0 else " " for value in values)


class _Revisions:
    """The table, laid out for the console that prints it."""

    def __init__(self, revisions: Sequence[Status], histories: Series | None) -> None:
        self._revisions = revisions
        self._histories = histories

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        for layout in _LAYOUTS:
            columns = self._columns(layout)
            excess = sum(column.width + layout.gap for column in columns) - layout.gap - options.max_width
            if excess <= 0:
                break
        else:
            columns[0] = _shortened(columns[0], excess)
        table = Table(box=None, padding=(0, layout.gap, 0, 0), pad_edge=False)
        for column in columns:
            table.add_column(column.heading, justify=column.justify, no_wrap=True, min_width=column.width)
        for row in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*row)
        yield table

    def _columns(self, layout: _Layout) -> list[_Column]:
        names = _names(self._revisions, short=not layout.full)
        columns = [_Column("revision", "left", [Text(name) for name in names])]
        cells = [_cells(revision, layout) for revision in self._revisions]
        for heading in cells[0]:
            left = heading in ("state", "mode", "+ - !")
            columns.append(_Column(heading, "left" if left else "right", [row[heading] for row in cells]))
        return columns + self._graphs(layout)

    def _graphs(self, layout: _Layout) -> list[_Column]:
        if self._histories is None:
            return []
        found = [self._histories.get(revision_key(revision), ((), ())) for revision in self._revisions]
        graphs = (("load", layout.load, "magenta", 0), ("replicas", layout.replicas, "green", 1))
        return [
            _Column(heading, "left", [Text(sparkline(series[at][-width:]).rjust(width), style) for series in found])
            for heading, width, style, at in graphs
            if width
        ]


def _names(revisions: Sequence[Status], *, short: bool) -> list[str]:
    """Of the revisions; in short the name of the service, where that has only one."""
    namespaces = len({revision["namespace"] for revision in revisions}) > 1
    services = [(revision["namespace"], revision["service"]) for revision in revisions]
    names = []
    for revision, service in zip(revisions, services, strict=True):
        name = revision["revision"]
        alone = services.count(service) == 1 and _GENERATED.fullmatch(name.removeprefix(service[1]))
        name = service[1] if short and alone else name
        names.append(f"{service[0]}/{name}" if namespaces else name)
    return names


def _shortened(column: _Column, excess: int) -> _Column:
    """Names without their middles: what tells stages apart is at the end."""
    width = max(NAME_WIDTH_MIN, column.width - excess)
    return _Column(column.heading, column.justify, [Text(_without_middle(cell.plain, width)) for cell in column.cells])


def _without_middle(name: str, width: int) -> str:
    tail = width // 2
    return name if len(name) <= width else f"{name[: width - tail - 1]}…{name[-tail:]}"


def _title(status: Status) -> Text:
    platform = status["platform"]
    return Text.assemble(("platform ", "dim"), platform["name"], ("  at ", "dim"), platform["url"])


def _cells(revision: Status, layout: _Layout) -> dict[str, Text]:
    """By heading, all but the name."""
    unit = "/s" if revision["metric"] == "rps" else ""
    panic = "bold red" if revision["panic_mode"] else ""
    state = str(revision["state"])
    cells = {
        "state": Text(state if layout.full else _SHORT_STATES.get(state, state), _STYLES.get(state, "")),
        "ready": Text(f"{revision['ready']}/{revision['desired']}"),
        **(_not_ready(revision) if layout.full else {"+ - !": _changes(revision)}),
        "stable": Text(_average(revision["stable"], unit)),
        "panic": Text(_average(revision["panic"], unit) + ("!" if revision["panic_mode"] else ""), panic),
        "target": Text(_average(revision["target"], unit)),
        "waiting": _count(revision["waiting"], "yellow"),
        "in flight": _count(revision["in_flight"], ""),
        "mode": Text(revision["mode"]),
    }
    return {heading: cell for heading, cell in cells.items() if heading not in layout.without}


def _not_ready(revision: Status) -> dict[str, Text]:
    styles = {"starting": "yellow", "draining": "cyan", "failed": "bold red"}
    return {name: _count(revision[name], style) for name, style in styles.items()}


def _changes(revision: Status) -> Text:
    """Starting, draining and failed replicas: +1 -2 !1."""
    signs = (("+", "starting", "yellow"), ("-", "draining", "cyan"), ("!", "failed", "bold red"))
    found = [Text(f"{sign}{revision[name]}", style) for sign, name, style in signs if revision[name]]
    return Text(" ").join(found)


def _count(number: int, style: str) -> Text:
    return Text(str(number), style if number else "dim")


def _average(value: float | None, unit: str) -> str:
    # three digits, and none of the exponents that :g takes for larger ones
    return "-" if value is None else f"{value:.3g}{unit}" if abs(value) < 999.5 else f"{value:.0f}{unit}"


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
