"""How the program ends: by a signal at any moment, with an error, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 120  # against hangs

# the program, which gets a signal as soon as it imports a module
SIGNALLED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{number})

sys.meta_path.insert(0, Finder())
sys.argv = ["stagecraft", *{arguments!r}]
from orchestrator.cli import main
main()
"""


@pytest.fixture
def environment(runtime: Path, tmp_path: Path) -> dict[str, str]:
    """Temporary folders are made in tmp_path."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "STAGECRAFT_RUNTIME_DIR": str(runtime), "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-P", *argv]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=WAIT_S)


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ["version"]),  # first of all
        ("orchestrator.cli.up", ["version"]),
        ("uvloop", ["local", "start", "--port", "0"]),  # before the loop runs
    ],
)
def test_a_signal_at_any_moment_ends_it_without_a_word(
    environment: dict[str, str], tmp_path: Path, module: str, arguments: list[str], number: str, code: int
) -> None:
    done = run(environment, "-c", SIGNALLED.format(module=module, number=number, arguments=arguments))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert os.listdir(tmp_path) == []


def test_stages_that_cannot_start_are_an_error_each_and_the_logs_are_kept(
    environment: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    ports = ("--port", "0", "--grpc-port", "0")
    options = ("--stages", "2", "--device", "cuda:99", "--prompt", "To be", "--exit", *ports)
    done = run(environment, "-m", "orchestrator.cli", "up", str(tiny_checkpoint), *options)
    assert done.returncode == 1
    (folder,) = tmp_path.glob("stagecraft-*")
    *errors, kept = (line for line in done.stderr.splitlines() if "cannot start" in line or "kept" in line)
    assert errors
    assert all(line.startswith("error: ") for line in errors), done.stderr
    assert kept == f"the logs are kept in {folder}"
    assert list((folder / "logs").glob("*/*.log"))


async def test_all_that_fail_at_once_are_problems_of_their_own() -> None:
    from orchestrator.cli.up import UpError, _unless_failing

    class Settings:
        folder = Path("/logs")

    class Platform:
        settings = Settings

        @staticmethod
        def status() -> dict[str, Any]:
            failed = [{"service": name, "revision": name, "state": "Failed", "message": "no GPU"} for name in "ab"]
            return {"revisions": failed}

    platform: Any = Platform
    with pytest.raises(UpError) as caught:
        await _unless_failing(platform, asyncio.Event().wait())
    assert [text.split(":")[0] for text in caught.value.problems] == ["a cannot start", "b cannot start"]
