"""Named arrays in one run of bytes: the safetensors format, read without a copy and without torch.

The `safetensors` package reads and writes the same bytes (tests hold that). This module exists because the hot
path needs two things the package does not give: views into the received body instead of copies, and bfloat16
in a process without torch.

    | 8 bytes: N, little endian | N bytes: JSON header, padded with blanks | the arrays, one after another |
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_NUMPY = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
_DTYPE_NAMES = {np.dtype(code): name for name, code in _NUMPY.items()}
HEADER_BYTES_MAX = 1 << 20
_CACHED, _CACHED_BYTES_MAX = 256, 1 << 10  # headers that are remembered, and how long each may be

Buffer = bytes | bytearray | memoryview
_Entry = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, bytes
_Place = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, start, end


@dataclass(frozen=True, slots=True)
class Frame:
    """One array: `dtype` in safetensors' words, row-major little-endian `data`."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Frame:
        array = np.asarray(array, order="C")
        return cls(_DTYPE_NAMES[array.dtype], array.shape, array.reshape(-1).view(np.uint8).data)

    def numpy(self) -> npt.NDArray[Any]:
        """A read-only view of the bytes; not for BF16, which numpy lacks."""
        return np.frombuffer(self.data, dtype=_NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Frames:
    arrays: Mapping[str, Frame]
    metadata: Mapping[str, str] = field(default_factory=dict)


def pack(frames: Frames) -> list[Buffer]:
    """The bytes, as a list of parts: a sender that can write parts copies nothing; else `b"".join` them."""
    # widest items first keeps every array aligned to its item size, as the format asks
    ordered = sorted(frames.arrays.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0]))
    entries = tuple((name, frame.dtype, frame.shape, len(frame.data)) for name, frame in ordered)
    head = _write_head(entries) if not frames.metadata else _head_of(entries, frames.metadata)
    return [head, *(frame.data for _, frame in ordered)]


def _head_of(entries: Iterable[_Entry], metadata: Mapping[str, str]) -> bytes:
    """What stands before the arrays: the length of the header, and the header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@functools.lru_cache(maxsize=_CACHED)
def _write_head(entries: tuple[_Entry, ...]) -> bytes:
    """Step after step of a lane has arrays of the same shapes."""
    return _head_of(entries, {})


def unpack(body: Buffer) -> Frames:
    """Views into `body`. Raises ValueError with what is wrong for bytes that are truncated or forged."""
    view = memoryview(body)
    if len(view) < 8:
        raise ValueError(f"a safetensors body has at least 8 bytes, got {len(view)}")
    (header_bytes,) = struct.unpack_from("<Q", view)
    if header_bytes > min(HEADER_BYTES_MAX, len(view) - 8):
        raise ValueError(f"the header claims {header_bytes} bytes, the body has {len(view) - 8} after the length")
    read = _read_header_again if header_bytes <= _CACHED_BYTES_MAX else _read_header
    entries, metadata = read(bytes(view[8 : 8 + header_bytes]), len(view) - 8 - header_bytes)
    data = view[8 + header_bytes :]
    return Frames({name: Frame(dtype, shape, data[start:end]) for name, dtype, shape, start, end in entries}, metadata)


def _read_header(text: bytes, data_bytes: int) -> tuple[tuple[_Place, ...], Mapping[str, str]]:
    """Where the arrays are in `data_bytes` of data, all of which they take. Raises ValueError."""
    header = parse_header(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    places = []
    for name, entry in header.items():
        dtype, shape, start, end = check_entry(name, entry)
        if end > data_bytes:
            raise ValueError(f"{name} ends at byte {end}, the data has {data_bytes}")
        places.append((name, dtype, shape, start, end))
    _check_cover([(start, end) for *_, start, end in places], data_bytes)
    return tuple(places), MappingProxyType(metadata)


# for the same bytes the same: a lane's steps differ in their data only, as long as its sequences are the same
_read_header_again = functools.lru_cache(maxsize=_CACHED)(_read_header)


def parse_header(text: bytes) -> dict[str, Any]:
    """The JSON header as a dict. Raises ValueError."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the header must be a JSON object")
    return header


def check_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, end) of one array's header entry, offsets from the end of the header.

    Raises ValueError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: an entry has dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name}: unknown dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: shape and data_offsets must be lists of at most 8 whole numbers in 0..2^62-1")
    start, end = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != size:
        raise ValueError(f"{name}: {dtype}{shape} takes {size} bytes, its offsets span {end - start}")
    return dtype, tuple(shape), start, end


def _naturals(value: Any) -> bool:
    """Few enough and small enough for any reader."""
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
    )


def _check_cover(spans: Iterable[tuple[int, int]], size: int) -> None:
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise ValueError(f"the arrays leave a gap or overlap at byte {min(start, at)}")
        at = end
    if at != size:
        raise ValueError(f"the arrays end at byte {at}, the data has {size}")
