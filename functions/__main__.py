"""`python -m functions [--fd N]`: one stage; settings from STAGE_..., address from HOST and PORT (default 8080)."""

from __future__ import annotations

import argparse
import signal
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m functions", description=__doc__)
    parser.add_argument("--fd", type=int, help="listening socket that was inherited")
    fd = parser.parse_args().fd
    for number in (signal.SIGTERM, signal.SIGINT):
        # process 1 of a container gets no signal that it has no handler for, and importing torch takes seconds
        signal.signal(number, lambda *_: sys.exit(0))
    from functions.server import serve

    return serve(fd)


if __name__ == "__main__":
    sys.exit(main())
