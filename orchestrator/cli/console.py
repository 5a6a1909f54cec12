"""What all commands share: where they print, and how they end with an error."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

import typer
from rich.console import Console

# results go to standard output by `print`; everything that is meant for a person's eyes only goes here
err = Console(stderr=True, highlight=False, emoji=False)  # a:b:c is an image, and no picture of a b

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def fail(message: str, exit_code: int = 1) -> NoReturn:
    """Prints the message on standard error and ends the command. 2 is for wrong arguments, 1 for all else."""
    err.print("[bold red]error:[/]", end=" ")
    err.print(message, markup=False, soft_wrap=True)
    raise typer.Exit(exit_code)


def note(message: str) -> None:
    """A line on standard error."""
    err.print(message, markup=False, soft_wrap=True)


def write_text(text: str) -> None:
    """Text of a model on standard output, at once. On a terminal its control characters are made visible."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    sys.stdout.write(text)
    sys.stdout.flush()
