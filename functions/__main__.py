"""`python -m functions [--fd N]`: one stage; settings from STAGE_..., address from HOST and PORT (default 8080)."""

from __future__ import annotations

import argparse
import sys

from functions.server import serve


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m functions", description=__doc__)
    parser.add_argument("--fd", type=int, help="listening socket that was inherited")
    return serve(parser.parse_args().fd)


if __name__ == "__main__":
    sys.exit(main())
