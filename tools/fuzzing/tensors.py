"""Safetensors bodies made bad with knowledge of what they are: headers that lie, arrays that do not fit one another,
numbers that no model computes. Pure."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from random import Random
from typing import Any

from functions.contract.frames import ITEM_BYTES, Frame, Frames, pack, unpack
from tools.fuzzing.mutations import NUMBERS, changed_value, dumped, hostile, mutated, mutated_json

_WORDS = [name.encode() for name in (*ITEM_BYTES, "slices", "tokens", "hidden", "lengths", "__metadata__", "openings")]
_FLOATS = [struct.pack("<f", value) for value in (float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 0.0)]


def mutated_tensors(random: Random, body: bytes) -> bytes:
    """`body` is a good one."""
    kind = random.randrange(8)
    if kind == 0:
        return mutated(random, body, _WORDS)
    if kind == 1:
        return _with_header(random, body)
    if kind == 2:
        return _with_length(random, body)
    if kind == 3:
        return _with_metadata(random, body)
    if kind == 4:
        return _reshaped(random, body)
    return _with_numbers(random, body)


def _with_header(random: Random, body: bytes) -> bytes:
    """A header that says something else of the same data."""
    header, data = _split(body)
    for _ in range(random.choice((1, 1, 2, 4))):
        name = random.choice(sorted(header))
        entry = header[name]
        if not isinstance(entry, dict) or "dtype" not in entry or random.random() < 0.2:
            header = changed_value(random, header)
            if not isinstance(header, dict) or not header:
                break
            continue
        part = random.choice(("dtype", "shape", "data_offsets"))
        if part == "dtype":
            entry = {**entry, "dtype": random.choice((*ITEM_BYTES, "F4", "", 3))}
        else:
            before = entry.get(part)  # gone, if it was renamed a moment ago
            numbers = list(before if isinstance(before, list) else ()) or [0]
            numbers[random.randrange(len(numbers))] = random.choice(
                (*NUMBERS, len(data), len(data) + 1, 0.5, "1", None)
            )
            entry = {**entry, part: numbers if random.random() < 0.8 else numbers * random.choice((0, 2, 9))}
        header = {**header, name: entry}
    return _joined(header, data)


def _with_length(random: Random, body: bytes) -> bytes:
    """A length of the header that lies, or a body that is cut or too long."""
    (length,) = struct.unpack_from("<Q", body)
    kind = random.randrange(3)
    if kind == 0:
        return struct.pack("<Q", random.choice((*NUMBERS, length + 1, length - 1, len(body))) % (1 << 64)) + body[8:]
    if kind == 1:
        return body[: random.randrange(len(body))]
    return body + bytes(random.choice((1, 8, 4096)))


def _with_metadata(random: Random, body: bytes) -> bytes:
    header, data = _split(body)
    metadata: dict[str, Any] = dict(header.get("__metadata__") or {})
    name = random.choice((*metadata, "openings", "ask", "x"))
    if metadata.get(name, "").startswith("{") and random.random() < 0.8:
        metadata[name] = mutated_json(random, json.loads(metadata[name])).decode(errors="replace")
    else:
        metadata[name] = hostile(random, "{}")
    return _joined({**header, "__metadata__": metadata}, data)


def _reshaped(random: Random, body: bytes) -> bytes:
    """Whole arrays that do not fit the others: gone, longer, shorter, of another shape, under another name."""
    frames = unpack(body)
    arrays = dict(frames.arrays)
    name = random.choice(sorted(arrays))
    frame = arrays[name]
    kind = random.randrange(6)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[random.choice(("hidden", "tokens", "slices", "lengths", "", "x" * 300))] = frame
    elif kind == 2:
        times = random.choice((0, 2, 3, 64))
        shape = (frame.shape[0] * times, *frame.shape[1:]) if frame.shape else ()
        arrays[name] = replace(frame, shape=shape, data=bytes(frame.data) * times) if shape else frame
    elif kind == 3 and frame.shape and frame.shape[0] > 1:
        rows = random.randrange(frame.shape[0])
        size = len(frame.data) // frame.shape[0]
        arrays[name] = replace(frame, shape=(rows, *frame.shape[1:]), data=bytes(frame.data)[: rows * size])
    elif kind == 4:
        items = len(frame.data) // ITEM_BYTES[frame.dtype]
        shapes = [(items,), (1, items), (items, 1), (items, 1, 1, 1, 1, 1, 1, 1), (0, 1 << 40)]
        arrays[name] = replace(frame, shape=random.choice(shapes))
        if arrays[name].shape[0] == 0:
            arrays[name] = replace(arrays[name], data=b"")
    else:
        narrower = {"I64": "F64", "I32": "F32", "F32": "I32", "F64": "I64"}
        arrays[name] = Frame(narrower.get(frame.dtype, frame.dtype), frame.shape, frame.data)
    return b"".join(pack(Frames(arrays, frames.metadata)))


def _with_numbers(random: Random, body: bytes) -> bytes:
    """A body in good form with a few other numbers in it."""
    header, data = _split(body)
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        name = random.choice([name for name in sorted(header) if name != "__metadata__"])
        start, end = header[name]["data_offsets"]
        size = ITEM_BYTES[header[name]["dtype"]]
        if end - start < size:
            continue
        at = start + size * random.randrange((end - start) // size)
        if header[name]["dtype"] == "F32":
            changed[at : at + 4] = random.choice(_FLOATS)
        else:
            here = int.from_bytes(changed[at : at + size], "little", signed=True)
            near = [here - 1, here + 1, -here, 2 * here]
            changed[at : at + size] = (random.choice([*near, *NUMBERS]) % (1 << 8 * size)).to_bytes(size, "little")
    return _joined(header, bytes(changed))


def _split(body: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", body)
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def _joined(header: Any, data: bytes) -> bytes:
    text = dumped(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data
