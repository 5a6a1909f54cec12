"""Takes sequences over from another replica of the same stage: asks it for keys and values until it has no more.

What cannot be fetched is no error: the chain sends again what this replica lacks. Only http.client is used, which
follows no redirects and knows no proxies, in a thread of its own: this happens once in a replica's life.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

import numpy as np
import structlog

from functions.contract import events
from functions.contract.errors import CorruptEvent, InvalidEvent, from_json
from functions.contract.events import Event
from functions.contract.frames import HEADER_BYTES_MAX, Buffer
from functions.contract.handover import Adopt, Export, Pieces, check_replica_address
from functions.contract.seals import Seals

PIECES_BYTES_MAX = 64 << 20  # of keys and values in one answer: they are in memory twice while they are copied
_TIMEOUT_S = 10.0  # without a byte
_FRAME_BYTES_MAX = 2 * HEADER_BYTES_MAX  # what comes in an answer besides: its header, and four bytes a token

log = structlog.get_logger()


class FetchFailed(Exception):
    """The other replica gave no answer, or none that can be used."""


async def adopt(
    asked: Adopt,
    held: Callable[[int], int],
    install: Callable[[Pieces], Awaitable[None]],
    make_event: Callable[[bytes], Event],
    bytes_max: int,
    seals: Seals,
) -> None:
    """Fetches `asked.sequences` piece by piece.

    `held` says how many tokens of a sequence are here, `install` takes over a piece, and `make_event` makes the event
    that asks for one. Raises StageError and FetchFailed; what has been taken over until then stays."""
    starts = {sequence: held(sequence) for sequence in asked.sequences}
    while starts:
        event = make_event(Export(asked.key, starts, bytes_max).to_body())
        pieces = await fetch(asked.source, event, bytes_max + _FRAME_BYTES_MAX, seals)
        if not pieces.pieces:
            break
        await install(pieces)
        rest = _rest(starts, pieces)
        if rest == starts:
            raise FetchFailed(f"{asked.source} answered something else than it was asked for")
        starts = rest


def _rest(starts: Mapping[int, int], pieces: Pieces) -> dict[int, int]:
    """What is still to be asked for. Sequences before the last that came, and not among them, are unknown there."""
    rest = dict(starts)
    for piece in pieces.pieces:
        if rest.get(piece.sequence) == piece.start:
            if piece.end == piece.position:
                del rest[piece.sequence]
            else:
                rest[piece.sequence] = piece.end
    return rest


async def fetch(url: str, event: Event, bytes_max: int, seals: Seals) -> Pieces:
    """What the replica at `url` answers to an export. Raises StageError for its error events, and FetchFailed."""
    headers, data = events.to_http(event)
    await seals.seal_request(headers, (data,))
    try:
        told, body = await asyncio.to_thread(_exchange, url, headers, bytes(data), bytes_max)
        seals.check_reply_head(told, headers)
        await seals.check_body(told, body)
        reply = events.from_lower_case(told, body)
        if reply.type == events.ERROR:
            raise from_json(json.loads(bytes(body)))
        if reply.type != events.EXPORTED:
            raise FetchFailed(f"{url} answered {reply.type[:80]!r}")
        return Pieces.from_body(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchFailed(f"{url} gave no keys and values: {error or type(error).__name__}") from None
    except (InvalidEvent, CorruptEvent) as error:
        raise FetchFailed(f"{url} answered no event of ours, or a damaged one: {error}") from None


def _exchange(url: str, headers: dict[str, str], data: bytes, bytes_max: int) -> tuple[dict[str, str], Buffer]:
    """Headers, names in lower case, and body of the answer. Raises OSError, HTTPException, ValueError, InvalidEvent."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        connection.connect()
        check_replica_address(connection.sock.getpeername()[0])  # a name may stand for any address
        connection.request("POST", "/", body=data, headers=headers)
        response = connection.getresponse()
        told = {name.lower(): value for name, value in response.getheaders()}
        return told, _read(response, bytes_max)
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, bytes_max: int) -> Buffer:
    """The whole body, put where it stays. Raises ValueError and OSError."""
    size = response.length
    if size is None or size > bytes_max:
        raise ValueError(f"the answer has {'no length' if size is None else f'{size} bytes, {bytes_max} are allowed'}")
    body, at = np.empty(size, dtype=np.uint8).data, 0
    while at < size:
        count = response.readinto(body[at:])
        if not count:
            raise ValueError(f"the answer ends after {at} of {size} bytes")
        at += count
    return body
