"""What `up` and `local start` say of the platform they run: why it cannot, and what Ctrl-C waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.cli.console import note

if TYPE_CHECKING:
    from knative.errors import KnativeError
    from knative.platform import Platform


@contextmanager
def stop_told(platform: Platform) -> Iterator[None]:
    """Says what is waited for when the block is cancelled, as by Ctrl-C, and requests are running."""
    try:
        yield
    except asyncio.CancelledError:
        from knative.platform import GRACE_S

        count = platform.in_flight
        if count:
            running = f"{count} requests are running and have" if count > 1 else "1 request is running and has"
            note(f"stopping: {running} {GRACE_S:g} s; Ctrl-C again ends now")
        raise


def tell_problems(problems: Sequence[str]) -> None:
    """An error each."""
    for problem in problems:
        note(f"error: {problem}")


def problems_of(error: KnativeError, port_options: str) -> Sequence[str]:
    """The problems of a manifest one by one; `port_options` heal an address that cannot be listened on."""
    from knative.errors import ValidationError

    if isinstance(error, ValidationError):
        return error.problems
    what, advice, _ = str(error).partition("; choose another address or port")
    return [f"{what}; choose another with {port_options}; port 0 takes any free one" if advice else what]
