"""The Triggers of a platform as a table: what waits, and what became of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

_COUNTS = ("waiting", "delivered", "retried", "busy", "dead_lettered", "lost")
_HEADINGS = {"dead_lettered": "dead"}
_STYLES = {"waiting": "yellow", "dead_lettered": "red", "lost": "bold red"}


def triggers_view(triggers: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """A table under an empty line, and why some are not ready; nothing without Triggers."""
    if not triggers:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("trigger", overflow="fold")
    for name in _COUNTS:
        table.add_column(_HEADINGS.get(name, name), justify="right", no_wrap=True)
    for trigger in triggers:
        table.add_row(_name(trigger), *(_count(trigger, name) for name in _COUNTS))
    problems = [Text(f"{_name(one)}: {one['message']}", "yellow") for one in triggers if one["message"]]
    return [Text(""), table, *problems]


def _name(trigger: Mapping[str, Any]) -> str:
    return f"{trigger['namespace']}/{trigger['name']}"


def _count(trigger: Mapping[str, Any], name: str) -> Text:
    number = trigger[name]
    return Text(str(number), _STYLES.get(name, "") if number else "dim")
