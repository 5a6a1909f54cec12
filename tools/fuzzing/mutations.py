"""Good inputs made bad. Pure: everything comes from the `Random` that is handed in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62,
           2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**30)  # fmt: skip
# texts that mean something to some reader: formats, escapes, paths, templates, half characters
TEXTS = (
    "", " ", "\x00", "\n", "\r\n", "\t", "%", "%00", "%zz", "%ff%fe", "..", "../../etc/passwd", "/", "\\", '"', "'",
    "{}", "{{7*7}}", "${x}", "$(id)", "<x>", "null", "true", "on", "0x10", "1e999", "NaN", "-0", "1_000", "١٢",
    "é", "🙂", "\ufeff", "\u2028", "\ud800", "a" * 300, "a" * 70_000, "http://192.0.2.1/", "file:///etc/passwd",
    "application/json", "1.0", "0.3", "Infinity", "*", "&a", "*a", "<<", "!!python/object:os.system", "---", "...",
)  # fmt: skip
# JSON that no writer makes from values
_RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "1" * 5000, "0.1e-999", "01", "[" * 2000,
        "[" * 60 + "]" * 60, '{"a":' * 60 + "1" + "}" * 60, "[" * 100_000 + "]" * 100_000, '"\\ud800"', '"\\u0000"',
        "", "undefined", "'a'", "[1,]", '{"a":1,"a":2}')  # fmt: skip
INPUT_BYTES_MAX = 4 << 20  # more would only show how long Python takes to read it
_MARK = "@raw-%d@"
_MARKED = re.compile(r'"@raw-(\d+)@"')
_DIGITS = re.compile(rb"\d+")


def mutated(random: Random, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """Some changes of bytes, from a flipped bit to a doubled part; `words` are what else may be put in."""
    changed = bytearray(data)
    for _ in range(_few(random)):
        _change(random, changed, words)
    return bytes(changed)


def mutated_text(random: Random, text: str, words: Sequence[str] = ()) -> str:
    """The same for text, which stays valid UTF-8."""
    raw = mutated(random, text.encode(errors="surrogatepass"), [word.encode(errors="surrogatepass") for word in words])
    return raw.decode(errors="replace")


def mutated_json(random: Random, value: Any) -> bytes:
    """A JSON document like `value`, with some of its members changed, missing, doubled or of another type; now and
    then no JSON at all."""
    for _ in range(_few(random)):
        value = changed_value(random, value)
    data = dumped(value)
    return mutated(random, data) if random.random() < 0.1 else data


def dumped(value: Any) -> bytes:
    """`value` as JSON, with what `hostile` put into it; half characters stay escaped."""
    text = json.dumps(value, separators=(",", ":"))
    # a mark may have been changed itself, to any number
    return _MARKED.sub(lambda match: _RAW[int(match[1][-4:]) % len(_RAW)], text).encode()


def changed_value(random: Random, value: Any, depth: int = 0) -> Any:
    """A copy with one place changed."""
    if isinstance(value, dict) and value and (depth == 0 or random.random() < 0.85):
        return _changed_object(random, value, depth)
    if isinstance(value, list) and value and (depth == 0 or random.random() < 0.7):
        return _changed_array(random, value, depth)
    return hostile(random, value)


def hostile(random: Random, value: Any = None) -> Any:
    """A value to stand where `value` stood."""
    kind = random.randrange(10)
    if kind == 0:
        return random.choice(NUMBERS)
    if kind == 1:
        return random.choice(TEXTS)
    if kind == 2:
        return random.choice((None, True, False, [], {}, [[]], [{}], {"": None}))
    if kind == 3:
        return _MARK % random.randrange(len(_RAW))
    if kind == 4:
        return random.choice((0.5, -0.5, 1e-300, 1e300, -1e300, 1e308, 3.0, 1 / 3))
    if kind == 5:
        copies = random.choice((0, 1, 2, 20, 1000))
        return [value] * (copies if copies * len(dumped(value)) <= INPUT_BYTES_MAX else 2)
    if kind == 6:
        return {"a": value}
    if kind == 7:
        return str(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + random.choice((-1, 1, 1000, -(10**9), 10**9))
    if isinstance(value, str):
        return mutated_text(random, value, TEXTS[:40])
    return random.choice(NUMBERS)


def number(random: Random, near: int = 0) -> int:
    """A whole number that readers may not expect."""
    return near + random.choice((-1, 1, 2)) if random.random() < 0.3 else random.choice(NUMBERS)


def _changed_object(random: Random, value: dict[str, Any], depth: int) -> dict[str, Any]:
    name = random.choice(sorted(value))
    kind = random.randrange(8)
    if kind == 0:
        return {key: item for key, item in value.items() if key != name}
    if kind == 1:
        return {**value, random.choice((name + "x", name.upper(), *TEXTS[:30])): value[name]}
    if kind == 2:
        other = random.choice(sorted(value))
        return {**value, name: value[other], other: value[name]}
    return {**value, name: changed_value(random, value[name], depth + 1)}


def _changed_array(random: Random, value: list[Any], depth: int) -> list[Any]:
    at = random.randrange(len(value))
    kind = random.randrange(6)
    if kind == 0:
        return value[:at] + value[at + 1 :]
    if kind == 1:
        return value[:at] + [value[at]] * random.choice((2, 3, 50)) + value[at:]
    return [*value[:at], changed_value(random, value[at], depth + 1), *value[at + 1 :]]


def _few(random: Random) -> int:
    return 1 if random.random() < 0.6 else random.randint(2, 5)


def _change(random: Random, data: bytearray, words: Sequence[bytes]) -> None:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 1, 2, 4, 8, 64)))
    kind = random.randrange(10)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << random.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = random.choice((0, 0x7F, 0x80, 0xFF, random.randrange(256)))
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        data[at:at] = data[at:end] * random.choice((1, 2, 100))
    elif kind == 5:
        data[at:at] = bytes(random.randrange(256) for _ in range(random.choice((1, 4, 16))))
    elif kind == 6 and (numbers := list(_DIGITS.finditer(data))):
        match = random.choice(numbers)
        data[match.start() : match.end()] = str(number(random)).encode()
    elif kind == 7:
        width = random.choice((1, 2, 4, 8))
        data[at : at + width] = (random.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
    elif kind == 8 and words:
        data[at : random.choice((at, end))] = random.choice(words)
    else:
        other = random.randrange(len(data) + 1)
        data[at:end], data[other : other + end - at] = data[other : other + end - at], data[at:end]
