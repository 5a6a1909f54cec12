"""A platform as `stagecraft local start` runs it, and the commands that ask it, run in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class LocalPlatform:
    process: subprocess.Popen[str]
    facts: dict[str, Any]
    runtime: Path

    def end(self) -> tuple[int, str]:
        """Exit code and standard error, after Ctrl-C."""
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGINT)
        text = self.process.stderr.read()
        return self.process.wait(), text


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def runtime() -> Iterator[Path]:
    """A runtime folder for these tests, short enough for sockets and so that nobody else's platforms are found."""
    with tempfile.TemporaryDirectory(prefix="sc-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def start_platform(runtime: Path) -> Callable[..., Any]:
    """A context manager: a platform called so, on a free port; killed at the end if it still runs."""

    @contextmanager
    def start(name: str, *options: str) -> Iterator[LocalPlatform]:
        argv = [sys.executable, "-P", "-m", "orchestrator.cli", "local", "start", "--name", name, "--json", *options]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "STAGECRAFT_RUNTIME_DIR": str(runtime)}
        pipe = subprocess.PIPE
        with subprocess.Popen([*argv, "--port", "0", "--no-fork"], stdout=pipe, stderr=pipe, text=True, env=env) as run:
            assert run.stdout is not None
            assert run.stderr is not None
            try:
                line = run.stdout.readline()
                assert line, run.stderr.read()
                yield LocalPlatform(run, json.loads(line), runtime)
            finally:
                run.kill()

    return start


@pytest.fixture(scope="session")
def platform(start_platform: Callable[..., Any]) -> Iterator[LocalPlatform]:
    with start_platform("tests") as running:
        yield running


@pytest.fixture
def stagecraft(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """stagecraft("status", "--json", input="...") -> its outcome; 150 columns."""
    from orchestrator.cli import app

    monkeypatch.setenv("STAGECRAFT_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("COLUMNS", "150")

    def run(*arguments: object, input: str | bytes | None = None) -> Outcome:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run
