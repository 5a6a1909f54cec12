"""`stagecraft status` and `stagecraft top`: the table of a status, and the commands on a platform that runs."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

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
    console.print(status_view(seen, None if histories is None else histories.cells()))
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
    assert list(histories.cells()) == ["default/b"]


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
