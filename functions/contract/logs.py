"""The log of every process: one line an event, for machines as JSON."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

import structlog


class _Unfailing:
    """A stream whose troubles stay its own: a full disk must cost log lines, not requests."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def configure_logs(*, as_json: bool, to: TextIO | None = None) -> None:
    """JSON, or aligned columns, to a stream, by default stderr. Traces come without local variables, which would hold
    prompts."""
    processors: list[Any] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    if as_json:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        processors.append(structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    stream: Any = _Unfailing(to or sys.stderr)
    structlog.configure(processors=processors, logger_factory=structlog.PrintLoggerFactory(file=stream))
