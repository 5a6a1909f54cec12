"""The wire format of arrays: the same bytes as the safetensors package, read without a copy, hard to fool."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from functions.contract.frames import HEADER_BYTES_MAX, Frame, Frames, pack, unpack

Arrays = dict[str, npt.NDArray[Any]]

dtypes = st.sampled_from(["u1", "<i4", "<i8", "<f2", "<f4"])
shapes = arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())
named_arrays = st.dictionaries(names, arrays_of.arrays(dtypes, shapes), max_size=5)
metadata = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3)


def packed(arrays: Arrays, words: dict[str, str] | None = None) -> bytes:
    return b"".join(pack(Frames({name: Frame.of(array) for name, array in arrays.items()}, words or {})))


def raw(header: Any, data: bytes = b"") -> bytes:
    """A body with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Equal to the bit, so that NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(named_arrays, metadata)
def test_unpack_is_the_inverse_of_pack(arrays: Arrays, words: dict[str, str]) -> None:
    frames = unpack(packed(arrays, words))
    assert frames.metadata == words
    assert frames.arrays.keys() == arrays.keys()
    assert all(same(frames.arrays[name].numpy(), array) for name, array in arrays.items())


@given(named_arrays, metadata)
def test_safetensors_reads_what_we_pack(arrays: Arrays, words: dict[str, str]) -> None:
    read = safetensors.numpy.load(packed(arrays, words))
    assert read.keys() == arrays.keys()
    assert all(same(read[name], array) for name, array in arrays.items())


@given(named_arrays, metadata)
def test_we_read_what_safetensors_packs(arrays: Arrays, words: dict[str, str]) -> None:
    frames = unpack(safetensors.numpy.save({name: np.array(a) for name, a in arrays.items()}, words or None))
    assert frames.metadata == words
    assert all(same(frames.arrays[name].numpy(), array) for name, array in arrays.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_bytes_of_types_that_numpy_lacks_pass_through(dtype: torch.dtype) -> None:
    body = safetensors.torch.save({"x": torch.arange(6).reshape(2, 3).to(dtype)})
    frames = unpack(body)
    assert b"".join(pack(frames)) == body


def test_arrays_are_views_of_the_body() -> None:
    body = bytearray(packed({"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.ones(3, np.float32)}))
    whole = np.frombuffer(body, dtype=np.uint8)
    frames = unpack(body)
    assert all(np.shares_memory(frame.numpy(), whole) for frame in frames.arrays.values())


def test_packing_copies_no_array() -> None:
    array = np.arange(1000, dtype=np.float32)
    parts = pack(Frames({"a": Frame.of(array)}))
    assert np.shares_memory(np.frombuffer(parts[1], dtype=np.float32), array)


def test_arrays_lie_at_multiples_of_their_item_size() -> None:
    body = packed({"a": np.ones(3, np.uint8), "b": np.ones(1, np.int64), "c": np.ones(1, np.float16)})
    whole = np.frombuffer(body, dtype=np.uint8).ctypes.data
    for frame in unpack(body).arrays.values():
        array = frame.numpy()
        assert (array.ctypes.data - whole) % array.itemsize == 0


GOOD = packed({"a": np.arange(4, dtype=np.int32), "b": np.ones((2, 2), dtype=np.float32)}, {"word": "value"})


@pytest.mark.parametrize("size", range(len(GOOD)))
def test_every_prefix_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack(GOOD[:size])


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read_with_the_same_checks(at: int, value: int) -> None:
    """No byte brings anything but ValueError; what is accepted covers the data exactly."""
    body = bytearray(GOOD)
    body[at] = value
    try:
        frames = unpack(body)
    except ValueError:
        return
    (size,) = struct.unpack("<Q", body[:8])
    assert sum(len(frame.data) for frame in frames.arrays.values()) == len(body) - 8 - size


@given(st.binary(max_size=200))
def test_noise_brings_nothing_but_a_value_error(body: bytes) -> None:
    with suppress(ValueError):
        unpack(body)


FORGED = {
    "length past the end": (struct.pack("<Q", 99) + b"{}", "claims 99 bytes"),
    "length of 2^64-1": (b"\xff" * 8 + b"{}", "claims"),
    "header over the limit": (raw(b"{" + b" " * HEADER_BYTES_MAX + b"}"), "claims"),
    "no JSON": (raw(b"{'a'}"), "not JSON"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "endless nesting": (raw(b"[" * 100_000), "not JSON"),
    "a list": (raw([]), "JSON object"),
    "an array that is a number": (raw({"a": 1}), "dtype, shape and data_offsets"),
    "an array without a shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "dtype, shape and data_offsets"),
    "more than three members": (raw({"a": {**entry("U8", [0], 0, 0), "x": 1}}), "dtype, shape and data_offsets"),
    "unknown dtype": (raw({"a": entry("C64", [1], 0, 8)}, bytes(8)), "unknown dtype"),
    "dtype of a list": (raw({"a": entry(["U8"], [1], 0, 1)}, b"1"), "unknown dtype"),
    "negative shape": (raw({"a": entry("U8", [-1, -1], 0, 1)}, b"1"), "whole numbers"),
    "shape of floats": (raw({"a": entry("U8", [1.0], 0, 1)}, b"1"), "whole numbers"),
    "shape of booleans": (raw({"a": entry("U8", [True], 0, 1)}, b"1"), "whole numbers"),
    "shape of a number": (raw({"a": entry("U8", 1, 0, 1)}, b"1"), "whole numbers"),
    "one offset": (raw({"a": entry("U8", [1], 0)}, b"1"), "whole numbers"),
    "negative offset": (raw({"a": entry("U8", [2], -1, 1)}, b"1"), "whole numbers"),
    "offsets the wrong way round": (raw({"a": entry("U8", [1], 1, 0)}, b"1"), "its offsets span -1"),
    "shape larger than its bytes": (raw({"a": entry("I64", [2], 0, 8)}, bytes(8)), "takes 16 bytes"),
    "shape of 2^100 items": (raw({"a": entry("U8", [2**50, 2**50], 0, 1)}, b"1"), "its offsets span 1"),
    "offsets past the data": (raw({"a": entry("U8", [4], 0, 4)}, b"123"), "the data has 3"),
    "gap between arrays": (raw({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"), "gap or overlap"),
    "gap at the beginning": (raw({"a": entry("U8", [1], 1, 2)}, b"12"), "gap or overlap"),
    "overlap": (raw({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"), "gap or overlap"),
    "twice the same bytes": (raw({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"12"), "gap or overlap"),
    "bytes that belong to no array": (raw({"a": entry("U8", [1], 0, 1)}, b"12"), "the data has 2"),
    "metadata of a list": (raw({"__metadata__": ["a"]}), "strings to strings"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "strings to strings"),
}


@pytest.mark.parametrize(("body", "hint"), FORGED.values(), ids=FORGED)
def test_forged_body_is_refused_with_the_reason(body: bytes, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        unpack(body)


def test_body_without_arrays_is_read() -> None:
    assert unpack(raw({})) == Frames({})


@pytest.mark.parametrize("shape", [[1] * 65, [0, 10**30]], ids=["65 dimensions", "a dimension of 10^30"])
def test_shape_that_no_reader_could_hold_is_refused(shape: list[int]) -> None:
    size = 0 if 0 in shape else 1
    with pytest.raises(ValueError, match="at most 8 whole numbers"):
        unpack(raw({"a": entry("U8", shape, 0, size)}, bytes(size))).arrays["a"].numpy()


def test_a_header_that_was_read_before_is_checked_against_the_data_at_hand() -> None:
    body = raw({"a": entry("U8", [3], 0, 3)}, b"123")
    assert bytes(unpack(body).arrays["a"].data) == b"123"
    for changed in (body + b"4", body[:-1]):
        with pytest.raises(ValueError, match="the data has"):
            unpack(changed)
    assert bytes(unpack(body[:-3] + b"456").arrays["a"].data) == b"456"
