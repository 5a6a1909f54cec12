"""The command line, `stagecraft`. This module imports next to nothing: `main` has to be there from the start."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typer import Typer


def main() -> None:
    """Entry point of the `stagecraft` program. Signals end it without a traceback: 130, 143 or 129."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _leave)
    try:
        from orchestrator.cli.commands import app

        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # the reader of our output has gone (| head); nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _leave(number: int, _frame: object) -> None:
    """Ends the program like any error would, so that terminal and temporary files are put in order."""
    raise SystemExit(128 + number)


def __getattr__(name: str) -> Typer:
    """`app`, imported when somebody asks for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator.cli.commands import app

    return app
