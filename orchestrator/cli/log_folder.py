"""Where a platform keeps its logs, and what becomes of the folder at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from orchestrator.cli.console import fail, note

LOG_BYTES_MIN = 64 << 10  # room there must be for logs
FAILED = 1  # the exit code after which people want to read them


@contextmanager
def log_folder(wanted: Path | None) -> Iterator[Path]:
    """The folder `wanted`, or a temporary one. That is removed when the block ends, but kept and named when it ends
    with the exit code 1. Ends the command with 1 when nothing can be written."""
    folder = _writable(wanted)
    failed = False
    try:
        yield folder
    except Exception as end:
        failed = not isinstance(end, typer.Exit) or end.exit_code == FAILED
        raise
    finally:
        if wanted is None and failed:
            note(f"the logs are kept in {folder}")
        elif wanted is None:
            shutil.rmtree(folder, ignore_errors=True)


def _writable(wanted: Path | None) -> Path:
    try:
        folder = wanted or Path(tempfile.mkdtemp(prefix="stagecraft-"))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?" * LOG_BYTES_MIN)
    except OSError as error:
        place = wanted or "the temporary folder"
        fail(f"cannot write logs to {place}: {error.strerror or error}; name another folder with --log-dir")
    return folder
