"""Requests with one key read one generation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from orchestrator.generation import GenerationError
from orchestrator.idempotency import Key
from orchestrator.shared_generation import READERS_MAX, SharedGenerations, SharedSettings

KEY = Key("digest", "body")


class Source:
    """Generations of letters that come when they are let out."""

    def __init__(self, **settings: float) -> None:
        self.begun = self.closed = 0
        self.letters: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.now_s = 0.0
        given = SharedSettings(**settings)  # type: ignore[arg-type]  # counts are given as whole numbers
        self.shared = SharedGenerations[str]("m", len, given, lambda: self.now_s)

    def let_out(self, *letters: str | Exception | None) -> None:
        for letter in letters:
            self.letters.put_nowait(letter)

    async def generate(self) -> AsyncGenerator[str, None]:
        self.begun += 1
        try:
            while (letter := await self.letters.get()) is not None:
                if isinstance(letter, Exception):
                    raise letter
                yield letter
        finally:
            self.closed += 1

    def read(self, key: Key = KEY, deadline_s: float | None = None) -> AsyncGenerator[str, None]:
        return self.shared.read(key, self.generate, deadline_s)

    async def text(self, key: Key = KEY) -> str:
        return "".join([letter async for letter in self.read(key)])

    async def quiet(self) -> None:
        """Lets everybody do what can be done."""
        for _ in range(10):
            await asyncio.sleep(0)


async def test_who_comes_later_gets_everything_from_the_beginning() -> None:
    source = Source()
    first = asyncio.create_task(source.text())
    source.let_out("a", "b")
    await source.quiet()
    second = asyncio.create_task(source.text())
    await source.quiet()
    source.let_out("c", None)
    assert await first == await second == "abc"
    assert await source.text() == "abc"
    assert (source.begun, source.closed) == (1, 1)


async def test_an_answer_is_forgotten_after_its_time() -> None:
    source = Source(keep_s=10)
    source.let_out("a", None, "b", None)
    assert [await source.text() for _ in range(2)] == ["a", "a"]
    source.now_s = 11
    assert source.shared.begun_s(KEY) is None
    assert await source.text() == "b"


async def test_another_body_is_refused_while_it_runs_and_after_it() -> None:
    source = Source()
    reading = asyncio.create_task(source.text())
    await source.quiet()
    for _ in range(2):
        with pytest.raises(GenerationError) as caught:
            await source.text(Key("digest", "other"))
        assert caught.value.status == 422
        source.let_out("a", None)
        await reading
    assert source.begun == 1


async def test_a_failure_is_told_to_all_and_not_kept() -> None:
    source = Source()
    reading = [asyncio.create_task(source.text()) for _ in range(2)]
    await source.quiet()
    source.let_out("a", GenerationError("no", status=503, code="no"))
    for reader in reading:
        with pytest.raises(GenerationError, match="no"):
            await reader
    source.let_out("b", None)
    assert await source.text() == "b"


async def test_it_goes_on_for_a_client_that_comes_back() -> None:
    source = Source(linger_s=60)
    reading = source.read()
    source.let_out("a")
    assert await anext(reading) == "a"
    await reading.aclose()
    source.let_out("b")
    await source.quiet()
    assert (source.begun, source.closed) == (1, 0)
    source.let_out(None)
    assert await source.text() == "ab"


async def test_it_is_closed_when_nobody_comes_back() -> None:
    source = Source(linger_s=0.01)
    reading = source.read()
    source.let_out("a")
    await anext(reading)
    await reading.aclose()
    while not source.closed:  # noqa: ASYNC110 (a timer of the event loop closes it)
        await asyncio.sleep(0.005)
    source.let_out("b", None)
    assert await source.text() == "b"


async def test_without_lingering_it_is_closed_at_once() -> None:
    source = Source(linger_s=0)
    reading = source.read()
    source.let_out("a")
    await anext(reading)
    await reading.aclose()
    await source.quiet()
    assert source.closed == 1
    assert source.shared.begun_s(KEY) is None


async def test_it_is_not_closed_while_another_reads() -> None:
    source = Source(linger_s=0)
    leaving = source.read()
    staying = asyncio.create_task(source.text())
    source.let_out("a")
    await anext(leaving)
    await source.quiet()
    await leaving.aclose()
    source.let_out("b", None)
    assert await staying == "ab"


async def test_a_deadline_ends_the_wait_and_with_the_last_reader_the_work() -> None:
    source = Source(linger_s=60)
    patient = source.read()
    source.let_out("a")
    await anext(patient)
    impatient = source.read(deadline_s=time.monotonic() + 0.01)
    assert await anext(impatient) == "a"
    with pytest.raises(GenerationError) as caught:
        await anext(impatient)
    assert caught.value.status == 504
    await source.quiet()
    assert source.closed == 0, "another one waits"
    await patient.aclose()
    alone = source.read(deadline_s=time.monotonic() + 0.01)
    await anext(alone)
    with pytest.raises(GenerationError):
        await anext(alone)
    await source.quiet()
    assert source.closed == 1
    assert source.begun == 1


async def test_the_readers_of_a_key_are_bounded() -> None:
    source = Source()
    readers = [source.read() for _ in range(READERS_MAX + 1)]
    source.let_out("a")
    for reader in readers[:-1]:
        assert await anext(reader) == "a"
    with pytest.raises(GenerationError) as caught:
        await anext(readers[-1])
    assert caught.value.status == 429
    for reader in readers:
        await reader.aclose()
    await source.shared.close()
    assert source.closed == 1


async def test_closing_ends_those_that_nobody_waits_for() -> None:
    source = Source()
    reading = asyncio.create_task(source.text())
    await source.quiet()
    await source.shared.close()
    with pytest.raises(GenerationError) as caught:
        await reading
    assert (caught.value.status, source.closed) == (503, 1)
