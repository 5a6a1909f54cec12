"""Digests and signatures of events: what is as it was sent passes, and nothing else does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract import events
from functions.contract.errors import CorruptEvent, StageError, StaleEvent, Unauthorized
from functions.contract.events import Event
from functions.contract.frames import Buffer
from functions.contract.seals import DIGEST, SIGNATURE, SIGNED_AT, Seals, SeenEvents, parse_keys
from functions.contract.watched_file import FileError, WatchedFile

NOW_S = 1_764_345_600.5
BODY = bytes(range(256)) * 3


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def key_file(folder: Path, *keys: str) -> Path:
    path = folder / f"keys-{len(list(folder.iterdir()))}"
    path.write_text("# shared by all stages\n\n" + "".join(f"{key * 16}\n" for key in keys))
    return path


def seals(path: Path | None, clock: Clock | None = None) -> Seals:
    return Seals(None if path is None else WatchedFile(path, parse_keys, look_every_s=0.0), 60.0, clock or Clock())


def step(identity: str = "1") -> dict[str, str]:
    event = Event(events.STEP, "/me", identity, events.TENSORS, b"", {"plan": "p", "stage": "0", "lane": "ä b"})
    return events.to_http(event)[0]


async def sealed(sender: Seals, body: Buffer = BODY, identity: str = "1") -> dict[str, str]:
    headers = step(identity)
    await sender.seal_request(headers, (body,))
    return headers


async def replied(sender: Seals, request: Mapping[str, str], body: Buffer = BODY) -> dict[str, str]:
    headers = events.to_http(Event(events.STEPPED, "/stagecraft/s", "1.reply", events.TENSORS, b"", {"replica": "h:1"}))
    await sender.seal_reply(headers[0], (body[:100], body[100:]), request)
    return headers[0]


async def take(receiver: Seals, headers: Mapping[str, str], body: Buffer = BODY) -> None:
    receiver.check_request_head(headers)
    await receiver.check_body(headers, body)


async def take_reply(receiver: Seals, headers: Mapping[str, str], request: Mapping[str, str], body: Buffer) -> None:
    receiver.check_reply_head(headers, request)
    await receiver.check_body(headers, body)


@pytest.fixture(params=[False, True], ids=["digest", "signed"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return key_file(tmp_path, "a") if request.param else None


@pytest.mark.parametrize("size", [0, 1, 10_000, (1 << 20) + 1])
async def test_what_was_sent_passes_there_and_back(keys: Path | None, size: int) -> None:
    sender, receiver, body = seals(keys), seals(keys), os.urandom(size)
    request = await sealed(sender, body)
    await take(receiver, request, memoryview(bytearray(body)))
    await take_reply(sender, await replied(receiver, request, body), request, body)


@pytest.mark.parametrize("way", ["request", "reply"])
def test_any_byte_that_flips_is_found(keys: Path | None, way: str) -> None:
    """In the value or the name of any header that counts, and in the body; never so that the event is lost for good."""
    asked = asyncio.run(sealed(seals(keys)))
    headers = asked if way == "request" else asyncio.run(replied(seals(keys), asked))
    texts = [f"{name}: {value}" for name, value in headers.items()]

    @given(st.integers(0, sum(map(len, texts)) + len(BODY) - 1), st.integers(0, 7))
    def check(at: int, bit: int) -> None:
        arrived, body = list(texts), bytearray(BODY)
        for number, text in enumerate(texts):
            if at < len(text):
                arrived[number] = text[:at] + chr(ord(text[at]) ^ 1 << bit) + text[at + 1 :]
                break
            at -= len(text)
        else:
            body[at] ^= 1 << bit
        read = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in arrived)}
        if read == headers and body == BODY:
            return  # a letter's case, or a blank
        if DIGEST not in read:
            return  # then nothing else is wrong, or it is found by the source, as below
        taking = take(seals(keys), read, body) if way == "request" else take_reply(seals(keys), read, asked, body)
        with pytest.raises(CorruptEvent):
            asyncio.run(taking)

    check()


async def test_a_digest_of_ours_that_is_lost_is_missed() -> None:
    headers = step() | {"ce-source": "/stagecraft/orchestrator/1"}
    with pytest.raises(CorruptEvent, match="lost its digest"):
        await take(seals(None), headers)


async def test_without_a_key_an_event_needs_no_digest() -> None:
    await take(seals(None), step())


async def test_a_reply_to_another_request_is_not_taken(keys: Path | None) -> None:
    one, other = await sealed(seals(keys)), await sealed(seals(keys), identity="2")
    reply = await replied(seals(keys), one)
    with pytest.raises((CorruptEvent, Unauthorized)):
        await take_reply(seals(keys), reply, other, BODY)


async def test_a_request_is_not_taken_for_a_reply(tmp_path: Path) -> None:
    path = key_file(tmp_path, "a")
    request = await sealed(seals(path))
    with pytest.raises((CorruptEvent, Unauthorized)):
        await take_reply(seals(path), request, request, BODY)


async def without_a_signature(tmp_path: Path) -> dict[str, str]:
    return await sealed(seals(None))


async def of_another_key(tmp_path: Path) -> dict[str, str]:
    return await sealed(seals(key_file(tmp_path, "b")))


async def with_a_digest_made_anew(tmp_path: Path) -> dict[str, str]:
    """What somebody on the way could do who knows how all of this works, but has no key."""
    headers = await sealed(seals(key_file(tmp_path, "a")))
    del headers[DIGEST]
    headers["ce-stage"] = "1"
    await seals(None).seal_request(headers, (BODY,))
    return headers


async def with_no_ascii(tmp_path: Path) -> dict[str, str]:
    headers = step() | {SIGNATURE: "\u00ff", SIGNED_AT: str(int(NOW_S * 1000))}
    await seals(None).seal_request(headers, (BODY,))
    return headers


Forged = Callable[[Path], Awaitable[dict[str, str]]]


@pytest.mark.parametrize("forged", [without_a_signature, of_another_key, with_a_digest_made_anew, with_no_ascii])
async def test_what_is_not_signed_with_our_key_is_refused_for_good(tmp_path: Path, forged: Forged) -> None:
    headers = await forged(tmp_path)
    with pytest.raises(Unauthorized, match="sign") as caught:
        await take(seals(key_file(tmp_path, "a")), headers)
    assert not caught.value.retriable


async def test_a_checksum_is_no_proof_of_a_body(tmp_path: Path) -> None:
    """The signature covers BODY; if a sender with the key had used XXH3, another body with the same could be found."""
    path = key_file(tmp_path, "a")
    sender, weak = seals(path), step()
    weak[SIGNED_AT] = str(int(NOW_S * 1000))
    sender._add(weak, "0123456789abcdef", "request", "request")
    with pytest.raises(Unauthorized):
        seals(path).check_request_head(weak)


async def test_an_unsigned_reply_is_not_believed(tmp_path: Path) -> None:
    path = key_file(tmp_path, "a")
    request = await sealed(seals(path))
    with pytest.raises(Unauthorized):
        await take_reply(seals(path), await replied(seals(None), request), request, BODY)


@pytest.mark.parametrize(("off_s", "word"), [(61, "ago"), (-61, "future")])
async def test_a_wrong_clock_is_told_and_how_to_mend_it(tmp_path: Path, off_s: float, word: str) -> None:
    path, clock = key_file(tmp_path, "a"), Clock()
    headers = await sealed(seals(path))
    clock.now_s += off_s
    with pytest.raises(StaleEvent, match=rf"61 s .*{word}.*STAGE_CLOCK_SKEW_S.*NTP") as caught:
        await take(seals(path, clock), headers)
    assert caught.value.retriable


@pytest.mark.parametrize("off_s", [59, -59])
async def test_a_clock_that_is_a_little_off_is_borne(tmp_path: Path, off_s: float) -> None:
    path, clock = key_file(tmp_path, "a"), Clock()
    headers = await sealed(seals(path))
    clock.now_s += off_s
    await take(seals(path, clock), headers)


async def test_a_recorded_event_is_taken_once(tmp_path: Path) -> None:
    path, clock = key_file(tmp_path, "a"), Clock()
    receiver, headers = seals(path, clock), await sealed(seals(path))
    await take(receiver, headers)
    for wait_s in (0, 30, 29, 2, 1000):
        clock.now_s += wait_s
        with pytest.raises(StaleEvent):
            await take(receiver, headers)
    await take(receiver, await sealed(seals(path, clock), identity="2"))


def test_seen_events_take_bounded_memory_and_none_is_taken_twice() -> None:
    clock = Clock()
    seen = SeenEvents(60.0, clock, events_max=50)
    taken = []
    for number in range(1000):
        clock.now_s += 1
        event = {SIGNATURE: str(number), SIGNED_AT: str(int(clock.now_s * 1000))}
        try:
            seen.take(event)
            taken.append(event)
        except StaleEvent:
            pass
        assert sum(map(len, seen._buckets.values())) <= 50
    assert len(taken) > 800
    for event in taken:
        with pytest.raises(StageError):
            seen.take(event)


@pytest.mark.parametrize("text", ["", "soon", "-1", "1e3", "9" * 40, "\u0663"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StaleEvent, match="milliseconds"):
        SeenEvents(60.0, Clock()).take({SIGNATURE: "s", SIGNED_AT: text})


async def test_keys_are_changed_without_a_refusal(tmp_path: Path) -> None:
    """The new key behind the old one everywhere, then before it, then alone."""
    path = key_file(tmp_path, "a")
    sender, receiver = seals(path), seals(path)
    replacement = key_file(tmp_path, "a", "b")
    for number, content in enumerate(["ab", "ba", "b"]):
        request = await sealed(sender, identity=str(number))
        os.replace(key_file(tmp_path, *content), replacement)
        os.replace(replacement, path)
        receiver.check_request_head(request | {}) if number < 2 else None
        reply = await replied(receiver, request)
        await take_reply(sender, reply, request, BODY)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no key"),
        (b"# nothing\n\n", "holds no key"),
        (b"0123456789abcdef\nsecret-short\n", "line 2 has less than 16 bytes"),
        (b"\xff\xfe" * 20, "not UTF-8"),
        (b"a" * (1 << 21), "more than"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused_and_not_quoted(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(FileError, match=complaint) as caught:
        Seals.open(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        Seals.open(tmp_path / "none")


def test_a_mounted_secret_that_is_switched_is_read_again_and_a_broken_one_is_not(tmp_path: Path) -> None:
    """As kubelet does it: the file is a link into a folder that is itself a link, which is replaced."""
    for name in ("1", "2", "3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text("short" if name == "3" else name * 16)
    (tmp_path / "data").symlink_to("1")
    (tmp_path / "keys").symlink_to("data/keys")
    watched = WatchedFile(tmp_path / "keys", parse_keys, look_every_s=0.0)
    assert watched.value == (b"1" * 16,)
    for name in ("2", "3"):
        (tmp_path / "next").symlink_to(name)
        os.replace(tmp_path / "next", tmp_path / "data")
        assert watched.value == (b"2" * 16,)
    (tmp_path / "data").unlink()
    assert watched.value == (b"2" * 16,)
