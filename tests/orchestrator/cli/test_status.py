"""`stagecraft status` and `stagecraft top`: the table of a status, and the commands on a platform that runs."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from knative.control import control_api
from orchestrator.cli.objects_view import duration
from orchestrator.cli.status_view import sparkline, status_view
from orchestrator.cli.top import HISTORY, Histories

ROOT = Path(__file__).resolve().parents[3]


def revision(name: str = "demo-00001", **changed: Any) -> dict[str, Any]:
    """A revision with nothing remarkable but what is `changed`."""
    plain = {
        "namespace": "default",
        "service": "demo",
        "revision": name,
        "generation": 1,
        "state": "Active",
        "desired": 3,
        "ready": 2,
        "starting": 1,
        "draining": 0,
        "failed": 0,
        "stable": 1.2345,
        "panic": 4.0,
        "target": 2.0,
        "metric": "concurrency",
        "panic_mode": False,
        "mode": "proxy",
        "excess_burst_capacity": -5.0,
        "waiting": 7,
        "in_flight": 4,
        "min_scale": 0,
        "max_scale": 0,
        "message": "",
        "pods": [],
    }
    return plain | changed


def status(*revisions: dict[str, Any]) -> dict[str, Any]:
    platform = {"name": "home", "pid": 1, "url": "http://127.0.0.1:8080", "folder": "/", "started_at": ""}
    return {"platform": platform, "revisions": list(revisions)}


def shown(seen: dict[str, Any], histories: Histories | None = None, width: int = 160) -> list[str]:
    out = StringIO()
    console = Console(file=out, width=width, highlight=False)
    console.print(status_view(seen, None if histories is None else histories.series()))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_revision_is_one_row() -> None:
    title, headings, row = shown(status(revision()))
    assert title == "platform home  at http://127.0.0.1:8080"
    assert headings.split("  ")[0] == "revision"
    assert row.split() == ["demo-00001", "Active", "2/3", "1", "0", "0", "1.23", "4", "2", "7", "4", "proxy"]


@pytest.mark.parametrize(
    ("changed", "cell"),
    [
        ({"stable": None}, "-"),
        ({"panic_mode": True}, "4!"),
        ({"metric": "rps", "target": 150.0}, "150/s"),
        ({"stable": 12345.6}, "12346"),
        ({"mode": "serve"}, "serve"),
    ],
)
def test_a_cell_says(changed: dict[str, Any], cell: str) -> None:
    assert cell in shown(status(revision(**changed)))[2].split()


def test_a_namespace_is_shown_when_there_are_several() -> None:
    assert shown(status(revision()))[2].startswith("demo-00001 ")
    lines = shown(status(revision(), revision(namespace="other")))
    assert [line.split()[0] for line in lines[2:4]] == ["default/demo-00001", "other/demo-00001"]


@pytest.mark.parametrize("width", range(40, 200, 4))
@pytest.mark.parametrize("with_graphs", [False, True])
def test_no_width_cuts_a_number_or_what_tells_names_apart(width: int, with_graphs: bool) -> None:
    stages = busy("qwen2-5-0-5b-instruct-stage-0"), busy("qwen2-5-0-5b-instruct-stage-1")
    histories = Histories() if with_graphs else None
    if histories is not None:
        histories.add(status(*stages))
    _, headings, *rows = shown(status(*stages), histories, width)
    for number, row in enumerate(rows):
        assert len(row) <= width
        name, *cells = row.split()
        assert re.search(rf"stage-{number}(-00001)?$|…(.*-)?{number}$", name)
        assert {"10/123", "1234", "5678"} <= set(cells), row
        assert not any("…" in cell for cell in cells)
    assert headings.split()[:1] == ["revision"]
    assert "…" not in headings


@pytest.mark.parametrize(
    ("width", "with_graphs", "headings"),
    [
        (120, False, "revision state ready starting draining failed stable panic target waiting in flight mode"),
        (80, False, "revision state ready + - ! stable panic target waiting in flight mode"),
        (120, True, "revision state ready + - ! stable panic target waiting in flight mode load replicas"),
        (100, True, "revision state ready + - ! stable panic target waiting in flight mode load replicas"),
        (80, True, "revision state ready + - ! stable panic target waiting in flight load"),
    ],
)
def test_a_narrower_table_has_fewer_columns(width: int, with_graphs: bool, headings: str) -> None:
    seen = status(revision("demo-stage-0-00001", service="demo-stage-0", draining=2, failed=1))
    histories = Histories() if with_graphs else None
    if histories is not None:
        histories.add(seen)
    lines = shown(seen, histories, width)
    assert " ".join(lines[1].split()) == headings
    if "+ - !" in headings:
        assert "+1 -2 !1" in lines[2]


def test_a_short_name_is_the_services_where_it_has_one_revision() -> None:
    seen = status(
        revision("a-00001", service="a"),
        revision("b-00001", service="b"),
        revision("b-00002", service="b"),
        revision("c-first", service="c"),
    )
    assert [line.split()[0] for line in shown(seen, width=80)[2:]] == ["a", "b-00001", "b-00002", "c-first"]


def busy(service: str) -> dict[str, Any]:
    """A revision with large numbers everywhere."""
    counts = {"ready": 10, "desired": 123, "starting": 100, "draining": 11, "waiting": 1234, "in_flight": 5678}
    averages = {"stable": 1234.5, "panic": 999.7, "target": 123.4, "panic_mode": True}
    return revision(f"{service}-00001", service=service, state="Activating", **counts, **averages)


def test_what_is_wrong_stands_below_once() -> None:
    pods = [
        {"name": "demo-00001-a", "phase": "backoff", "restarts": 2, "age_s": 65.0, "message": "same"},
        {"name": "demo-00001-b", "phase": "starting", "restarts": 0, "age_s": 1.5, "message": "probe: [refused]"},
    ]
    lines = shown(status(revision(message="same", pods=pods)))
    assert lines[3:] == ["", "demo-00001: same", "pod demo-00001-b (starting, 1s): probe: [refused]"]


def test_without_services_people_learn_how_to_get_one() -> None:
    assert "stagecraft local apply -f FILE" in shown(status())[1]


def test_top_draws_the_last_looks() -> None:
    histories = Histories()
    for load in range(30):
        histories.add(status(revision(waiting=load, in_flight=0, ready=load // 10)))
    row = shown(status(revision()), histories)[2]
    bars = row[row.index("proxy") + len("proxy") :].split()
    assert [len(bar) for bar in bars] == [HISTORY, 20]  # replicas were none at first
    assert bars[0][-1] == bars[1][-1] == "█"


def test_top_forgets_a_revision_that_is_gone() -> None:
    histories = Histories()
    histories.add(status(revision("a"), revision("b")))
    histories.add(status(revision("b")))
    assert list(histories.series()) == ["default/b"]


@pytest.mark.parametrize(
    ("values", "bars"), [([], ""), ([0, 0], "  "), ([0, 1, 4, 8], " ▂▅█"), ([5], "█"), ([0.01, 100], "▁█")]
)
def test_a_sparkline_rises_to_its_largest_value(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"), (0.9, "0s"), (119, "119s"), (120, "2m"), (599, "9m59s"), (600, "10m"), (10799, "179m"),
        (10800, "3h"), (11000, "3h3m"), (8 * 3600, "8h"), (47.9 * 3600, "47h"), (49 * 3600, "2d1h"),
        (400 * 86400, "400d"),
    ],
)  # fmt: skip
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.usefixtures("platform")
def test_status_of_a_platform_that_runs(stagecraft: Callable[..., Any]) -> None:
    assert stagecraft("status").out.startswith("platform tests  at http://127.0.0.1:")
    seen = json.loads(stagecraft("status", "--json").out)
    assert seen["platform"]["name"] == "tests"


@pytest.mark.usefixtures("platform")
def test_top_prints_once_where_there_is_no_terminal(stagecraft: Callable[..., Any]) -> None:
    done = stagecraft("top")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("platform tests")


@pytest.mark.parametrize("command", [("status",), ("top",), ("local", "get", "ksvc")])
def test_without_a_platform_people_learn_how_to_start_one(
    stagecraft: Callable[..., Any], command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGECRAFT_RUNTIME_DIR", str(tmp_path / "none"))
    done = stagecraft(*command)
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "error: no platform runs on this machine; start one with `stagecraft local start` or `stagecraft up`\n"
    )


@pytest.mark.usefixtures("platform")
def test_top_gives_the_terminal_back_after_ctrl_c(runtime: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STAGECRAFT_RUNTIME_DIR": str(runtime), "TERM": "xterm"}
    argv = [sys.executable, "-m", "orchestrator.cli", "top", "--interval", "0.1"]
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True) as process:
        os.close(theirs)
        text = read_until(ours, b"platform")
        process.send_signal(2)
        text += read_until(ours, None)
        code = process.wait()
    os.close(ours)
    assert code == 0
    assert text.index(b"\x1b[?1049h") < text.index(b"tests") < text.index(b"\x1b[?1049l")
    assert b"Traceback" not in text


class Looks:
    """A platform that always looks the same."""

    url = "http://127.0.0.1:1"

    def __init__(self, seen: dict[str, Any]) -> None:
        self._seen = seen

    def status(self) -> dict[str, Any]:
        return self._seen


@pytest.mark.parametrize("command", ["status", "top"])
async def test_terminals_of_80_100_and_120_columns_show_all_numbers(tmp_path: Path, command: str) -> None:
    platform: Any = Looks(status(busy("demo"), busy("demo-stage-0"), busy("demo-stage-1")))
    os.chmod(tmp_path, 0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGECRAFT_RUNTIME_DIR", str(tmp_path))
        async with control_api(platform, "home", tmp_path):
            widths = (80, 100, 120)
            screens = await asyncio.gather(*(asyncio.to_thread(screen, command, width) for width in widths))
    for width, lines in zip(widths, screens, strict=True):
        rows = [line for line in lines if re.match(r"demo(-stage-.)?(-00001)? ", line)]
        assert len(rows) == 3, lines
        for row in rows:
            assert {"10/123", "1234", "1000!", "5678"} <= set(row.split()), row
            assert len(row) <= width
            assert "…" not in row


def screen(command: str, columns: int) -> list[str]:
    """The first picture of a command in a terminal that wide, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    argv = [sys.executable, "-m", "orchestrator.cli", command]
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True) as process:
        os.close(theirs)
        try:
            text = read_until(ours, b"demo-stage-1")
            text += read_until(ours, b"\n")  # the rest of its row
        finally:
            process.kill()
            os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    return [line.strip() for line in re.split(r"[\r\n]+", plain.split("platform home")[1])]  # top draws again


def read_until(fd: int, mark: bytes | None) -> bytes:
    """What comes up to `mark`, or to the end."""
    text = b""
    while mark is None or mark not in text:
        select.select([fd], [], [], 60)
        try:
            data = os.read(fd, 65536)
        except OSError:  # the other side has been closed
            break
        if not data:
            break
        text += data
    return text
