"""Becomes a command that dies with its parent: `python -I -S tether.py PARENT_PID PROGRAM ARGUMENT...`.

Run as a file, before anything else is imported, so that it costs a child about 15 ms. Linux only does it
(PR_SET_PDEATHSIG, kept across exec: prctl(2)); elsewhere the command runs untied, and a parent that is killed
with SIGKILL leaves it behind.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(argv: list[str]) -> None:
    """Never returns: replaces this process, or ends it when the parent is gone already."""
    parent, command = int(argv[1]), argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # the parent may have died before the line above took effect
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv)
