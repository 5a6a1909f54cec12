"""What the container may use: memory and processors by its control group, where the system shows the whole node's.

Version 2 (one hierarchy) is read first, then version 1; both appear under /sys/fs/cgroup, and inside a container its
root is the container's own group. Files: https://docs.kernel.org/admin-guide/cgroup-v2.html,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html, https://docs.kernel.org/scheduler/sched-bwc.html
"""

from __future__ import annotations

import math
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def memory_available_bytes(root: Path = CGROUP_ROOT) -> int | None:
    """What is left below the memory limit; None without a limit.

    Cached files that nobody has used lately count as free, as they do for the kubelet: the kernel drops them first, and
    reading a checkpoint leaves gigabytes of them."""
    unified = _memory_left(root, "memory.max", "memory.current", "inactive_file")
    if unified is not None:
        return unified
    return _memory_left(root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cpu_limit(root: Path = CGROUP_ROOT) -> int | None:
    """How many processors the quota amounts to, rounded up; None without a quota."""
    quota, _, period = _read(root / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_read(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if not (quota.isdecimal() and period.isdecimal()):  # "max" and -1: no quota
        return None
    return max(1, math.ceil(int(quota) / int(period))) if int(period) else None


def _memory_left(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    limit_text, usage_text = _read(folder / limit), _read(folder / usage)
    if not (limit_text.isdecimal() and usage_text.isdecimal()):  # "max": no limit
        return None
    counts = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    in_use = int(usage_text) - int(counts.get(cached, "0"))
    # version 1 has no word for "no limit", only a number above any memory; a caller takes the smaller of two anyway
    return max(0, int(limit_text) - max(0, in_use))


def _read(path: Path) -> str:
    """The file's text; "" where there is none or it may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
