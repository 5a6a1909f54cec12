"""A platform whose disk is too small for a batch: intake stops, deliveries go on, and the batch ends all the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

NEW_ROOM = ("unshare", "--user", "--map-root-user", "--mount")  # where a test may mount a disk of its own
DISK_BYTES = 100 << 20  # a broker wants 64 MiB free and keeps 16 MiB for itself
MOUNTED = 'mkdir -p "$1" && mount -t tmpfs -o size="$2" tmpfs "$1" && shift 2 && exec "$@"'
JOBS = 500
LINE_BYTES = 64 << 10


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NEW_ROOM, "true"], capture_output=True).returncode != 0,
    reason="no user namespaces here: no small disk can be mounted",
)
def test_a_batch_larger_than_the_disk_loses_nothing(
    batch_platform: Callable[..., Any], batch: Callable[..., Any], tmp_path: Path
) -> None:
    def with_disk(folder: Path) -> tuple[object, ...]:
        return (*NEW_ROOM, "sh", "-c", MOUNTED, "sh", folder / "data", DISK_BYTES)

    platform = batch_platform("platform", inside=with_disk)
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    padding = {"metadata": {"padding": "x" * LINE_BYTES}}
    with prompts.open("w") as file:
        for number in range(JOBS):
            file.write(json.dumps({"prompt": f"To be {number}", "max_tokens": 1, **padding}) + "\n")
    done = batch("submit", prompts, "-o", output, "--json")
    assert done.code == 0, done.err
    assert "the broker answers 507" in done.err
    results = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert sorted(one["custom_id"] for one in results) == [f"line-{number + 1:06}" for number in range(JOBS)]
    assert {one["response"]["status_code"] for one in results} == {200}
    counts = httpx.get(f"{platform.facts['results']}/batches/{done.json['batch']}").json()
    assert (counts["completed"], counts["dead_letters"]) == (JOBS, 0)
    assert platform.end() == 0
