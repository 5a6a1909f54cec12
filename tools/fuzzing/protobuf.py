"""Messages of Protocol Buffers made bad with knowledge of their form and none of their types: lengths that lie, numbers
for texts, fields that are gone, doubled, unknown or nested too deeply. Pure.

The form is that of https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from tools.fuzzing.mutations import NUMBERS, mutated, number

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_FIXED_BYTES = {_I64: 8, _I32: 4}
_VARINT_BYTES_MAX = 10
_NUMBERS_MAX = 1 << 29  # of fields
_FLOATS = [struct.pack("<f", value) for value in (float("nan"), float("inf"), float("-inf"), 3e38, -1e-45, 0.0)]
_NO_UTF8 = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"a\x80", b"\xf4\x90\x80\x80")  # the third is half a character
_NESTED_MAX = 300  # readers give up at 100


class _Unreadable(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Field:
    """`content` is what stands behind the tag, for texts and messages without their length."""

    number: int
    wire: int
    content: bytes


def mutated_message(random: Random, message: bytes, words: Sequence[bytes] = ()) -> bytes:
    """`message` is a good one; `words` are what may stand for texts."""
    if not message or random.random() < 0.15:
        return mutated(random, message, words)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        try:
            fields = _read(message)
        except _Unreadable:
            break
        message = _changed(random, fields, words) if fields else message
    return message


def _changed(random: Random, fields: Sequence[_Field], words: Sequence[bytes]) -> bytes:
    """The message with one of its fields changed, or one of a message within it."""
    at = random.randrange(len(fields))
    field, before, after = fields[at], _written(fields[:at]), _written(fields[at + 1 :])
    kind = random.randrange(12)
    if kind == 0:
        return before + after
    if kind == 1:
        return before + _written([field] * random.choice((2, 3, 200))) + after
    if kind == 2:
        strange = random.choice((0, 1, 2, 3, 7, 15, 16, field.number + 1, _NUMBERS_MAX - 1, _NUMBERS_MAX))
        return before + _written([replace(field, number=strange)]) + after
    if kind == 3:
        return before + _tag(field.number, random.randrange(8)) + field.content + after
    if kind == 4:
        lie = random.choice((*NUMBERS, len(field.content) + 1)) % (1 << 64)
        return before + _tag(field.number, _LEN) + _varint(lie) + field.content + after
    if kind == 5 and field.wire == _LEN:
        return before + _nested(random, field) + after
    return before + _written([replace(field, content=_content(random, field, words))]) + after


def _content(random: Random, field: _Field, words: Sequence[bytes]) -> bytes:
    if field.wire == _VARINT:
        return random.choice((_varint(number(random) % (1 << 64)), b"\xff" * 11, b"\x80" * 9 + b"\x00"))
    if field.wire in _FIXED_BYTES:
        return random.randbytes(_FIXED_BYTES[field.wire])
    if random.random() < 0.6:
        try:
            return _changed(random, _read(field.content), words)
        except (_Unreadable, ValueError):  # a text, or a message of nothing
            pass
    kind = random.randrange(5)
    if kind == 0 and words:
        return random.choice(words)
    if kind == 1:
        return b"".join(_varint(number(random) % (1 << 64)) for _ in range(random.choice((0, 1, 2, 100))))
    if kind == 2:
        return b"".join(random.choices(_FLOATS, k=random.choice((1, 2, 100))))
    if kind == 3:
        return field.content + random.choice(_NO_UTF8)
    return mutated(random, field.content, words)


def _nested(random: Random, field: _Field) -> bytes:
    """A message that holds itself, which holds itself, ..."""
    for _ in range(random.choice((1, 99, _NESTED_MAX))):
        field = replace(field, content=_written([field]))
    return _written([field])


def _read(message: bytes) -> list[_Field]:
    """Raises _Unreadable for what is no message, as most texts are none."""
    fields, at = [], 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        wire = tag & 7
        if wire == _LEN:
            size, at = _read_varint(message, at)
        elif wire == _VARINT:
            size = _read_varint(message, at)[1] - at
        else:
            size = _FIXED_BYTES.get(wire, 0)
        if not tag >> 3 or not 0 <= size <= len(message) - at or (wire not in (_VARINT, _LEN) and not size):
            raise _Unreadable
        fields.append(_Field(tag >> 3, wire, message[at : at + size]))
        at += size
    return fields


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number and where it ends."""
    value = 0
    for place, byte in enumerate(message[at : at + _VARINT_BYTES_MAX]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise _Unreadable


def _written(fields: Iterable[_Field]) -> bytes:
    parts = []
    for field in fields:
        length = _varint(len(field.content)) if field.wire == _LEN else b""
        parts += [_tag(field.number, field.wire), length, field.content]
    return b"".join(parts)


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
