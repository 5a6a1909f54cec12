"""What people see of a batch: its progress, its state, and lists."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.console import err, note

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from orchestrator.batches.job import Teller
    from orchestrator.batches.journal import State
    from orchestrator.batches.lines import BadLine

ID_CHARACTERS = len("batch-0123456789ab")
BAD_LINES_SHOWN = 20
LINE_EVERY_S = 10.0  # where standard error is no terminal
RATE_OVER_S = 30.0
SILENCE_S = 60.0  # without a result; then something may be amiss


class Speed:
    """Requests a second over the last while, out of counts at times."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, count: int) -> None:
        self._seen.append((now_s, count))
        while self._seen[-1][0] - self._seen[0][0] > RATE_OVER_S:
            self._seen.popleft()

    @property
    def per_s(self) -> float:
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def expected(state: State) -> int | None:
    """How many requests there will be; estimated from the bytes read until all are sent; None: nobody knows."""
    if state.all_sent or state.cancelling:
        return state.sent
    if not state.offset or state.input_bytes is None:
        return None
    return round(state.sent * state.input_bytes / state.offset)


def progress_line(state: State, per_s: float, *, wait: bool) -> str:
    """sent 1,200 of about 4,000, done 800, failed 3, 21.3/s, about 3 min left"""
    total, count = expected(state), state.finished if wait else state.sent
    of = "" if total is None or state.all_sent else f" of about {total:,}"
    parts = [f"sent {state.sent:,}{of}"]
    if wait:
        parts += [f"done {state.finished:,}", f"failed {state.failed:,}"]
    parts.append(f"{per_s:,.1f}/s")
    if total and per_s > 0:
        parts.append(f"about {duration_text((total - count) / per_s)} left")
    return ", ".join(parts)


def duration_text(seconds: float) -> str:
    """42 s, 7 min, 3 h, 2 d"""
    if seconds < 99.5:
        return f"{max(0.0, seconds):.0f} s"
    minutes = seconds / 60
    if minutes < 99.5:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.0f} h" if hours < 99.5 else f"{hours / 24:.0f} d"


@contextmanager
def watched(*, wait: bool) -> Iterator[Teller]:
    """Tells on standard error how it goes: a bar in a terminal, a line now and then elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn

    from orchestrator.batches.job import Teller

    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        watch = _Watch(bar, wait)
        yield Teller(note, watch.bad_line, watch.failed, watch.look)


class _Watch:
    def __init__(self, bar: Progress, wait: bool) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)
        self._wait = wait
        self._speed = Speed()
        self._next_line_s = time.monotonic() + LINE_EVERY_S
        self._bad = self._failed = 0
        self._last: tuple[float, int] | None = time.monotonic(), 0  # the last result; None: it was told

    def bad_line(self, line: BadLine) -> None:
        self._bad += 1
        if self._bad <= BAD_LINES_SHOWN:
            note(str(line))
        elif self._bad == BAD_LINES_SHOWN + 1:
            note("more lines are left out; the file of errors has all of them")

    def failed(self, line: BadLine) -> None:
        self._failed += 1
        if self._failed <= BAD_LINES_SHOWN:
            note(str(line))
        elif self._failed == BAD_LINES_SHOWN + 1:
            note("more requests fail; the results say why")

    def look(self, state: State) -> None:
        now_s = time.monotonic()
        count = state.finished if self._wait else state.sent
        self._speed.add(now_s, count)
        text = progress_line(state, self._speed.per_s, wait=self._wait)
        self._bar.update(self._task, completed=count, total=expected(state), description=text)
        if not err.is_terminal and now_s >= self._next_line_s:
            self._next_line_s = now_s + LINE_EVERY_S
            note(text)
        if self._wait and self._last is not None:
            self._mind_silence(state, now_s)

    def _mind_silence(self, state: State, now_s: float) -> None:
        assert self._last is not None
        if state.finished != self._last[1]:
            self._last = now_s, state.finished
        elif now_s - self._last[0] > SILENCE_S:
            self._last = None
            note(
                f"no result for {SILENCE_S:g} s: is there a Trigger for model {state.model} at the broker? "
                f"`stagecraft batch status {state.batch}` shows what the broker gave up"
            )


def facts(journal: Path, state: State) -> dict[str, Any]:
    """For programs."""
    from orchestrator.batches.journal import errors_path

    return {
        "batch": state.batch,
        "state": state.phase,
        "model": state.model,
        "sent": state.sent,
        "completed": state.completed,
        "failed": state.failed,
        "cancelled": state.cancelled,
        "bad_lines": state.bad,
        "input": state.input,
        "output": state.output,
        "errors": str(errors_path(journal)) if state.bad else None,
        "journal": str(journal),
        "broker": state.broker,
        "results": state.results,
        "created_s": state.created_s,
    }


def summary(state: State, *, waited: bool) -> str:
    """One line: what became of the batch."""
    parts = [f"{state.sent:,} sent"]
    if waited:
        parts += [f"{state.completed:,} completed", f"{state.failed:,} failed"]
        parts += [f"{state.cancelled:,} cancelled"] if state.cancelled else []
        parts += [f"results in {state.output}"] if state.output else []
    return f"batch {state.batch}: {', '.join(parts)}"


def state_lines(data: Mapping[str, Any]) -> list[str]:
    """`facts` for people, with what the results service says under `service` and `dead_letters`."""
    lines = [
        f"batch     {data['batch']}, {data['state']}",
        f"model     {data['model'] or '-'}",
        f"requests  {data['sent']:,} sent, {data['completed']:,} completed, {data['failed']:,} failed, "
        f"{data['cancelled']:,} cancelled; {data['bad_lines']:,} lines left out",
        f"input     {data['input']}",
        f"output    {data['output'] or '-'}",
    ]
    if data["errors"]:
        lines.append(f"errors    {data['errors']}")
    lines.append(f"broker    {data['broker']}")
    lines.append(f"results   {data['results'] or '-'}")
    return lines


def service_lines(service: Mapping[str, Any] | None, dead_letters: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the results service has of a batch."""
    if service is None:
        return ["service   nothing has come yet"]
    counts = [f"{service[name]:,} {name}" for name in ("completed", "failed", "cancelled")]
    lines = [f"service   {', '.join(counts)}; {service['dead_letters']:,} dead letters"]
    for one in dead_letters:
        lines.append(
            f"  {one['custom_id'] or one['id']}: {one['error_dest']} answered {one['error_code']} {one['error_data']}"
        )
    return lines


def batch_table(batches: Sequence[Mapping[str, Any]]) -> Table:
    """One row a batch."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("batch", no_wrap=True, min_width=ID_CHARACTERS)  # to be copied, so never cut
    for heading in ("state", "sent", "completed", "failed", "left out", "output"):
        table.add_column(heading)
    for one in batches:
        counts = (f"{one[name]:,}" for name in ("sent", "completed", "failed", "bad_lines"))
        table.add_row(one["batch"], one["state"], *counts, one["output"] or "-")
    return table
