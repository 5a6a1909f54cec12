"""Who dies with whom, and who inherits orphans: prctl(2) and proc(5). Standard library only, as agents start with it.

Linux only. Elsewhere the calls do nothing and no children are found: helper processes of a replica may outlive it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


def die_with_parent(number: signal.Signals) -> None:
    """Asks for signal `number` when the thread that started this process ends; kept across exec, not across fork.

    The parent may be gone already: compare os.getppid() afterwards."""
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans(adopt: bool = True) -> None:
    """Descendants whose parents end become children of this process, not of init; kept across exec, not across fork."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def children_of(parent: int) -> list[int]:
    """Pids of the children of `parent`, zombies among them."""
    if sys.platform != "linux":
        return []
    return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _parent_of(pid) == parent]


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            after_name = file.read().rpartition(b")")[2]  # the name in parentheses may hold anything
    except OSError:
        return 0
    return int(after_name.split()[1])


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc.prctl(option, value, 0, 0, 0)
