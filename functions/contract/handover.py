"""What is said when keys and values move from one replica of a stage to another.

    orchestrator --adopt--> new replica --export--> old replica
                 <-adopted-             <-exported-   keys and values of some tokens, again and again

The orchestrator names the old replica and the key that it gave the sequences when they were opened; the old one answers
nobody who lacks that. Data of *exported* is a safetensors body:

    pieces    int64 [n, 4]: sequence, start, length, and the tokens that the old replica has of the sequence
    tokens    int32 [sum of lengths]
    the rest  as the stage keeps it: keys.B and values.B for each block B of the span

A piece that starts at 0 brings the sequence's opening. `docs/events.md` describes the same for other languages.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from functions.contract.errors import InvalidEvent
from functions.contract.frames import Buffer, Frame, Frames, pack, unpack
from functions.contract.messages import (
    KEY_PATTERN,
    POSITION_BOUND,
    SEQUENCE_ID_BOUND,
    Int32Array,
    Opening,
    read_openings,
    write_openings,
)

SEQUENCES_MAX = 4096  # of one event
_ARRAY = re.compile(r"(keys|values)\.(0|[1-9][0-9]{0,4})")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")


@dataclass(frozen=True, slots=True)
class Adopt:
    """Fetch these sequences from the replica at `source`, http://HOST:PORT/."""

    source: str
    key: str = field(repr=False)
    sequences: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_replica_url(self.source)
        _check_key(self.key)
        _check_sequences(self.sequences)

    def to_body(self) -> bytes:
        return json.dumps({"from": self.source, "key": self.key, "sequences": list(self.sequences)}).encode()

    @classmethod
    def from_body(cls, body: Buffer) -> Adopt:
        """Raises InvalidEvent."""
        data = _read(body, {"from": str, "key": str, "sequences": list}, "an adoption")
        return cls(data["from"], data["key"], tuple(data["sequences"]))


@dataclass(frozen=True, slots=True)
class Adopted:
    """How many tokens of each sequence are here now, and how many bytes of keys and values came for that."""

    positions: Mapping[int, int]
    fetched_bytes: int

    def to_body(self) -> bytes:
        positions = {str(sequence): position for sequence, position in self.positions.items()}
        return json.dumps({"positions": positions, "bytes": self.fetched_bytes}).encode()

    @classmethod
    def from_body(cls, body: Buffer) -> Adopted:
        """Raises ValueError, TypeError, KeyError and AttributeError."""
        data = json.loads(bytes(body))
        return cls({int(s): int(position) for s, position in data["positions"].items()}, int(data["bytes"]))


@dataclass(frozen=True, slots=True)
class Export:
    """Asks for these sequences, from the position on that is given with each, in at most `bytes_max` bytes."""

    key: str = field(repr=False)
    starts: Mapping[int, int]
    bytes_max: int

    def __post_init__(self) -> None:
        _check_key(self.key)
        _check_sequences(tuple(self.starts))
        if not all(type(start) is int and 0 <= start < POSITION_BOUND for start in self.starts.values()):
            raise InvalidEvent("sequences must map ids to positions from 0 on")
        if type(self.bytes_max) is not int or self.bytes_max < 1:
            raise InvalidEvent(f"bytes_max must be a whole number > 0, got {self.bytes_max!r}")

    def to_body(self) -> bytes:
        starts = {str(sequence): start for sequence, start in self.starts.items()}
        return json.dumps({"key": self.key, "sequences": starts, "bytes_max": self.bytes_max}).encode()

    @classmethod
    def from_body(cls, body: Buffer) -> Export:
        """Raises InvalidEvent."""
        data = _read(body, {"key": str, "sequences": dict, "bytes_max": int}, "an export")
        if not all(re.fullmatch(r"[0-9]{1,16}", sequence) for sequence in data["sequences"]):
            raise InvalidEvent("sequences must map ids to positions from 0 on")
        return cls(data["key"], {int(s): start for s, start in data["sequences"].items()}, data["bytes_max"])


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` .. `end` - 1 of a sequence of which the old replica has `position`."""

    sequence: int
    start: int
    length: int
    position: int

    def __post_init__(self) -> None:
        if not 0 < self.sequence < SEQUENCE_ID_BOUND:
            raise InvalidEvent(f"a sequence id is in 1..2^53-1, got {self.sequence}")
        if self.start < 0 or self.length < 1 or not self.end <= self.position < POSITION_BOUND:
            raise InvalidEvent(
                f"sequence {self.sequence}: a piece needs start >= 0, length >= 1 and no more than the position, "
                f"got {self.start}, {self.length}, {self.position}"
            )

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Pieces:
    """Keys and values of some tokens of some sequences, `arrays` as the stage's runner packs them. None at all: the
    old replica has none of what was asked for."""

    pieces: tuple[Piece, ...]
    tokens: Int32Array
    openings: Mapping[int, Opening]
    arrays: Mapping[str, Frame]

    def __post_init__(self) -> None:
        total = sum(piece.length for piece in self.pieces)
        if len({piece.sequence for piece in self.pieces}) != len(self.pieces):
            raise InvalidEvent("each sequence may have one piece at the most")
        if self.tokens.shape != (total,):
            raise InvalidEvent(f"the pieces hold {total} tokens, tokens has shape {list(self.tokens.shape)}")
        if set(self.openings) != {piece.sequence for piece in self.pieces if piece.start == 0}:
            raise InvalidEvent("openings must be given for exactly the sequences whose piece starts at 0")

    @property
    def kv_bytes(self) -> int:
        return sum(len(frame.data) for frame in self.arrays.values())

    def to_body(self) -> list[Buffer]:
        """Safetensors bytes, in parts."""
        rows = np.array([(p.sequence, p.start, p.length, p.position) for p in self.pieces], dtype=np.int64)
        arrays = {"pieces": Frame.of(rows.reshape(-1, 4)), "tokens": Frame.of(self.tokens), **self.arrays}
        return pack(Frames(arrays, write_openings(self.openings)))

    @classmethod
    def from_body(cls, body: Buffer) -> Pieces:
        """Views into `body`. Raises InvalidEvent."""
        try:
            frames = unpack(body)
        except ValueError as error:
            raise InvalidEvent(f"the data is not a safetensors body: {error}") from None
        arrays = dict(frames.arrays)
        rows, tokens = (_take(arrays, name, dtype) for name, dtype in (("pieces", "I64"), ("tokens", "I32")))
        if len(rows.shape) != 2 or rows.shape[1] != 4:
            raise InvalidEvent(f"pieces must be int64 [n, 4], got {list(rows.shape)}")
        if strange := [name for name in arrays if not _ARRAY.fullmatch(name)]:
            raise InvalidEvent(f"arrays are keys.B and values.B of block B, got {strange[0][:80]!r}")
        pieces = tuple(Piece(*row) for row in rows.numpy().tolist())
        return cls(pieces, tokens.numpy(), read_openings(frames.metadata.get("openings")), arrays)


def _take(arrays: dict[str, Frame], name: str, dtype: str) -> Frame:
    frame = arrays.pop(name, None)
    if frame is None or frame.dtype != dtype:
        raise InvalidEvent(f"{name} must be there, and {dtype}")
    return frame


def _read(body: Buffer, members: Mapping[str, type], what: str) -> dict[str, Any]:
    """A JSON object with at least these members, of these types. Raises InvalidEvent."""
    try:
        data = json.loads(bytes(body))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not all(type(data.get(name)) is kind for name, kind in members.items()):
        raise InvalidEvent(f"the data of {what} is a JSON object with {', '.join(members)}")
    return data


def _check_key(key: str) -> None:
    if not KEY_PATTERN.fullmatch(key):
        raise InvalidEvent("a key is 32 hexadecimal digits")


def _check_sequences(sequences: tuple[int, ...]) -> None:
    if not sequences or len(sequences) > SEQUENCES_MAX:
        raise InvalidEvent(f"1 to {SEQUENCES_MAX} sequences may be named, got {len(sequences)}")
    if not all(type(item) is int and 0 < item < SEQUENCE_ID_BOUND for item in sequences):
        raise InvalidEvent("sequences must be sequence ids (whole numbers in 1..2^53-1)")


def _check_replica_url(url: str) -> None:
    """Raises InvalidEvent for what is no replica's http://HOST:PORT/, and for addresses that no replica has, such as
    that of a cloud's metadata service."""
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname or ""
    except ValueError:
        port, host = None, ""
    written = f"[{host}]" if ":" in host else host
    if port is None or not _HOST.fullmatch(written) or url.lower() != f"http://{written}:{port}/":
        raise InvalidEvent(f"a replica's URL is http://HOST:PORT/, got {url[:80]!r}")
    check_replica_address(host)


def check_replica_address(host: str) -> None:
    """Raises InvalidEvent for addresses that no replica has; names pass."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        raise InvalidEvent(f"{host} is no address that a replica may have")
