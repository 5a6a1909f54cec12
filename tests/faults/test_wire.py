"""Messages are read as the bytes that they are, and spoilt in one place."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.messages import Opening, Slice, Step
from functions.contract.sampling import SamplingParams
from tests.faults.wire import Message, flipped, page, read_message, step_tokens

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nCe-Type:  some.type \r\nContent-Length: 4\r\n\r\n"


async def read(*parts: bytes) -> list[Message]:
    """The messages in these bytes."""
    reader = asyncio.StreamReader()
    for part in parts:
        reader.feed_data(part)
    reader.feed_eof()
    found = []
    while (message := await read_message(reader)) is not None:
        found.append(message)
    return found


async def test_messages_come_as_they_were_sent() -> None:
    chunked = (
        b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"3\r\nabc\r\n10;x=y\r\n0123456789abcdef\r\n0\r\n\r\n",
    )
    found = await read(REQUEST, b"body", *chunked, page(503, "shutting down\n").to_bytes())
    assert [message.body for message in found] == [b"body", chunked[1], b"shutting down\n"]
    assert [message.to_bytes() for message in found[:2]] == [REQUEST + b"body", b"".join(chunked)]
    assert found[0].header("ce-type") == "some.type"
    assert found[0].header("ce-lane") == ""
    assert found[0].method == "POST"
    assert found[2].status == 503


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (REQUEST[:20], EOFError),
        (REQUEST + b"bod", EOFError),
        (REQUEST.replace(b"4", b"four") + b"body", ValueError),
    ],
)
async def test_what_is_cut_off_or_no_http_is_an_error(sent: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        await read(sent)


@given(st.binary(min_size=1, max_size=200), st.integers(0, 1 << 32))
def test_one_to_three_bits_are_flipped_the_same_for_the_same_salt(data: bytes, salt: int) -> None:
    spoilt = flipped(data, salt)
    assert len(spoilt) == len(data)
    assert 1 <= sum((a ^ b).bit_count() for a, b in zip(data, spoilt, strict=True)) <= 3
    assert spoilt == flipped(data, salt)


def test_tokens_of_a_step_are_counted_and_other_bodies_have_none() -> None:
    tokens = np.arange(7, dtype=np.int32)
    step = Step((Slice(5, 0, 7, True),), tokens, openings={5: Opening(SamplingParams(), 7)})
    assert step_tokens(Message(b"", b"".join(step.to_body()))) == 7
    assert step_tokens(Message(b"", b'{"sequences": [5]}')) == 0
    assert step_tokens(Message(b"", b"")) == 0
