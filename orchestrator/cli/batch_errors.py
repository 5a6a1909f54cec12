"""How commands of batches end when a journal, the broker or the results service cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.cli.console import fail


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the command with 1 and a message."""
    from orchestrator.batches.broker_client import ServiceError
    from orchestrator.batches.journal import JournalError

    try:
        yield
    except (JournalError, ServiceError) as error:
        fail(str(error))
