"""Stages on the same cores take turns, and none of them keeps the others from working for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from functions import cores
from functions.contract.settings_error import SettingsError
from functions.cores import Cores
from functions.service import StageService
from functions.settings import StageSettings

HOLD = """
import sys, time
from functions.cores import Cores
with Cores(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path, root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock at tmp_path / 'cores'."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "cores")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_nobody_computes_while_another_process_does(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with Cores(str(tmp_path / "cores")):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.wait(0.3)
    os.kill(holder.pid, signal.SIGKILL)
    assert entered.wait(60), "the lock of a process that was killed is free"
    thread.join()


def test_one_that_hangs_is_waited_for_only_so_long(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    monkeypatch.setattr(cores, "_WAIT_MAX_S", 0.1)
    with Cores(str(tmp_path / "cores")):
        pass
    os.kill(holder.pid, signal.SIGCONT)


def test_turns_come_again(tmp_path: Path) -> None:
    one, other = Cores(str(tmp_path / "cores")), Cores(str(tmp_path / "cores"))
    for _ in range(3):
        with one:
            pass
        with other:
            pass


def test_without_a_path_there_is_nothing_to_wait_for() -> None:
    with Cores(""), Cores(""):
        pass


def test_a_path_that_cannot_be_opened_is_a_wrong_setting(tmp_path: Path) -> None:
    settings = StageSettings(model="x", blocks="0:1", cores_lock=str(tmp_path / "none" / "cores"))
    with pytest.raises(SettingsError, match="STAGE_CORES_LOCK names a file that cannot be opened"):
        StageService(settings)
