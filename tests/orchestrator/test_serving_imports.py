"""What a fork server preloads for the orchestrator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# with an argument that KServe would refuse if it saw it
FACTS = """
import os, sys
sys.argv = ["preload", "--not-a-flag-of-kserve"]
before = dict(os.environ)
import orchestrator.serving_imports
print("threads", len(os.listdir("/proc/self/task")))
print("argv", sys.argv[1:])
print("environment", os.environ == before)
print("loaded", sorted({"torch", "transformers", "kserve", "grpc", "orchestrator.chain"} & set(sys.modules)))
import grpc
print("files", sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in range(3, 64)
                      if os.path.lexists(f"/proc/self/fd/{fd}")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_importing_leaves_a_process_that_may_fork() -> None:
    done = subprocess.run([sys.executable, "-c", FACTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert facts["threads"] == "1"
    assert facts["argv"] == "['--not-a-flag-of-kserve']"
    assert facts["environment"] == "True"
    assert facts["loaded"] == "['grpc', 'kserve', 'orchestrator.chain']"
    assert facts["files"] == "[]", "no event loop, no sockets"
