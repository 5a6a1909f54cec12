"""A large body is held as often as it must be: the event and its reply, once each."""

from __future__ import annotations

from benchmarks import copies
from benchmarks.peers import echo_peer

SIZE = 16 << 20
MOST = 2.15  # a few buffers of 1 MiB and less come on top of two


async def test_a_stage_holds_an_event_and_its_reply_once_each() -> None:
    assert 1.9 < await copies.at_stage(SIZE) < MOST


async def test_a_client_holds_an_event_and_its_reply_once_each() -> None:
    """Under asyncio's own loop, which copies what the kernel does not take at once."""
    async with echo_peer() as url:
        assert 1.9 < await copies.at_client(url, SIZE) < MOST
