"""The stage's process in a container: signals while it still imports, and no place for temporary files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW_TORCH = """import pathlib, time
pathlib.Path({marker!r}).touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_torch_is_imported_ends_the_stage(tmp_path: Path, root: Path, number: signal.Signals) -> None:
    """As process 1 of a container it would otherwise get none, and hold its GPU until it is killed."""
    marker = tmp_path / "importing"
    (tmp_path / "torch.py").write_text(SLOW_TORCH.format(marker=str(marker)))
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    process = subprocess.Popen([sys.executable, "-m", "functions"], cwd=root, env=env, stderr=subprocess.PIPE)
    try:
        while not marker.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, b"")


def test_no_place_for_temporary_files_is_told(root: Path) -> None:
    code = (
        "import os, sys, tempfile; tempfile._candidate_tempdir_list = lambda: ['/no/such/folder']\n"
        "from functions.server import serve; sys.exit(serve())"
    )
    env = {**os.environ, "STAGE_MODEL": "demo", "STAGE_BLOCKS": "0:1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No usable temporary directory found")
    assert "emptyDir at /tmp" in done.stderr
    assert "Traceback" not in done.stderr
