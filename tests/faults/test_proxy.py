"""What each fault does to a request and its reply, as both ends see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from functions.contract import events
from tests.faults.proxy import Armed, ReplicaProxy
from tests.faults.relay import Answer, Relay, Upstream
from tests.faults.schedule import Fault, Kind, Part, Point
from tests.faults.wire import Message, page

BODY = b"0123456789" * 5
STEP = Message(
    f"POST / HTTP/1.1\r\nhost: x\r\nce-type: {events.STEP}\r\ncontent-length: {len(BODY)}\r\n\r\n".encode(), BODY
)
OTHER = Message(f"POST / HTTP/1.1\r\nhost: x\r\nce-type: {events.RELEASE}\r\ncontent-length: 2\r\n\r\n".encode(), b"{}")
PROBE = Message(b"GET / HTTP/1.1\r\nhost: x\r\nk-network-probe: queue\r\n\r\n", b"")
MOMENT_S = 0.05


class Echo(Relay):
    """Answers each request with its own body, once the gate is open, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Message] = []
        self.answered: list[Message] = []
        self.given_up: list[Message] = []  # whoever had asked has gone
        self.gate = asyncio.Event()
        self.gate.set()

    async def answer(self, request: Message) -> Answer:
        self.seen.append(request)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up.append(request)
            raise
        self.answered.append(request)
        return page(200, request.body.decode("latin-1"))


class Scene:
    """A proxy before an echo; `acts` are the faults that were to be done to the process."""

    def __init__(self) -> None:
        self.echo = Echo()
        self.acts: list[Fault] = []
        self.armed = Armed(0, lambda text: None)
        self.proxy: ReplicaProxy
        self.client: Upstream

    async def act(self, fault: Fault) -> None:
        self.acts.append(fault)

    def arm(
        self,
        kind: Kind,
        point: Point = "before",
        seconds: float = MOMENT_S,
        part: Part | None = None,
        salt: int = 12345,
    ) -> None:
        self.armed.arm(Fault(1, kind, 1, 0, point, seconds, part, salt))

    async def ask(self, message: Message = STEP) -> Message:
        return await self.client.exchange(message, anew=True)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("what was waited for does not come")


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    await scene.echo.open()
    scene.proxy = ReplicaProxy(scene.echo.port, scene.armed, scene.act)
    await scene.proxy.open()
    scene.client = Upstream(scene.proxy.port)
    yield scene
    await scene.proxy.close()
    await scene.echo.close()


async def test_without_a_fault_everything_passes_unchanged(scene: Scene) -> None:
    assert (await scene.ask()).body == BODY
    assert (await scene.client.exchange(OTHER)).body == b"{}"
    assert (await scene.client.exchange(STEP)).body == BODY  # over the same connection
    assert scene.echo.seen == [STEP, OTHER, STEP]


async def test_faults_wait_for_steps_and_befall_one_each(scene: Scene) -> None:
    scene.arm("cut")
    assert (await scene.ask(OTHER)).body == b"{}"
    with pytest.raises((OSError, EOFError)):
        await scene.ask()
    assert (await scene.ask()).body == BODY
    assert [fault.kind for fault in scene.armed.injected] == ["cut"]
    assert len(scene.armed) == 0


async def test_some_faults_befall_an_event_of_any_type_but_never_a_probe(scene: Scene) -> None:
    scene.arm("cut", salt=12344)
    assert (await scene.ask(PROBE)).status == 200
    with pytest.raises((OSError, EOFError)):
        await scene.ask(OTHER)
    assert (await scene.ask()).body == BODY


@pytest.mark.parametrize(("point", "arrives"), [("before", False), ("during", True), ("after", True)])
async def test_a_cut_resets_the_connection(point: Point, arrives: bool, scene: Scene) -> None:
    scene.arm("cut", point)
    with pytest.raises((OSError, EOFError)):
        await scene.ask()
    if arrives:
        await until(lambda: bool(scene.echo.seen))
    else:
        await asyncio.sleep(MOMENT_S)
        assert scene.echo.seen == []


async def test_a_drop_leaves_everybody_without_an_answer_for_some_time(scene: Scene) -> None:
    scene.arm("drop", "after", seconds=0.3)
    first = asyncio.ensure_future(scene.ask())
    await until(lambda: bool(scene.echo.seen))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(scene.ask(OTHER))
    await asyncio.sleep(0.4)
    assert not first.done()
    assert not second.done()
    assert scene.echo.seen == [STEP]
    assert (await scene.ask()).body == BODY
    for task in (first, second):
        task.cancel()
    await asyncio.gather(first, second, return_exceptions=True)


@pytest.mark.parametrize("part", ["request head", "request body", "reply head", "reply body"])
async def test_a_corrupted_message_differs_in_that_part_alone(part: Part, scene: Scene) -> None:
    whole = page(200, BODY.decode())
    scene.arm("corrupt", part=part)
    reader, writer = await asyncio.open_connection("127.0.0.1", scene.proxy.port)
    writer.write(STEP.to_bytes())
    got = bytearray()
    while len(got) < len(whole.to_bytes()):
        try:
            async with asyncio.timeout(0.5):
                chunk = await reader.read(1000)
        except TimeoutError:
            break  # a spoilt length: the rest never comes
        if not chunk:
            break
        got += chunk
    writer.transport.abort()
    head, body = bytes(got).split(b"\r\n\r\n", 1) if b"\r\n\r\n" in got else (bytes(got), b"")
    if part == "request body":
        assert scene.echo.seen[0].head == STEP.head
        assert scene.echo.seen[0].body != BODY
        assert body == scene.echo.seen[0].body.decode("latin-1").encode()
    elif part == "reply body":
        assert head + b"\r\n\r\n" == whole.head
        assert body != BODY
        assert scene.echo.seen == [STEP]
    elif part == "reply head":
        assert bytes(got) != whole.to_bytes()
        assert scene.echo.seen == [STEP]
    else:
        assert scene.echo.seen != [STEP]


@pytest.mark.parametrize("point", ["before", "after"])
async def test_a_duplicate_arrives_twice_and_is_answered_once(point: Point, scene: Scene) -> None:
    scene.arm("duplicate", point)
    assert (await scene.ask()).body == BODY
    await until(lambda: len(scene.echo.answered) >= 2)
    assert scene.echo.seen == [STEP, STEP]


async def test_a_late_duplicate_arrives_after_what_came_later(scene: Scene) -> None:
    scene.arm("duplicate", "after", seconds=0.1)
    await scene.ask()
    await scene.ask(OTHER)
    await until(lambda: len(scene.echo.seen) >= 3)
    assert scene.echo.seen == [STEP, OTHER, STEP]


async def test_a_reordered_request_arrives_after_a_later_one(scene: Scene) -> None:
    scene.arm("reorder", seconds=30)
    first = asyncio.ensure_future(scene.ask())
    await until(lambda: bool(scene.armed.injected))
    assert (await scene.ask(OTHER)).body == b"{}"
    assert (await first).body == BODY
    assert scene.echo.seen == [OTHER, STEP]


async def test_a_reordered_request_arrives_though_its_sender_gave_up(scene: Scene) -> None:
    scene.arm("reorder", seconds=30)
    first = asyncio.ensure_future(scene.ask())
    await until(lambda: bool(scene.armed.injected))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await scene.ask(OTHER)
    await until(lambda: len(scene.echo.seen) >= 2)
    assert scene.echo.seen == [OTHER, STEP]


@pytest.mark.parametrize("point", ["before", "after"])
async def test_a_delayed_message_arrives_in_the_end(point: Point, scene: Scene) -> None:
    scene.arm("delay", point)
    assert (await scene.ask()).body == BODY


@pytest.mark.parametrize("kind", ["stop", "drain"])
@pytest.mark.parametrize("point", ["before", "during", "after"])
async def test_what_is_done_to_the_process_lets_the_request_pass(kind: Kind, point: Point, scene: Scene) -> None:
    scene.arm(kind, point)
    assert (await scene.ask()).body == BODY
    assert [fault.kind for fault in scene.acts] == [kind]


async def test_a_replica_that_drains_says_so_to_probes(scene: Scene) -> None:
    assert (await scene.ask(PROBE)).status == 200
    scene.proxy.draining = True
    reply = await scene.ask(PROBE)
    assert (reply.status, reply.body) == (503, b"shutting down\n")
    assert (await scene.ask()).body == BODY
    assert scene.echo.seen == [STEP]


async def test_a_client_that_goes_is_told_on(scene: Scene) -> None:
    """The stage's end sees the connection close, so that a step whose sender has left is not computed."""
    scene.echo.gate.clear()
    first = asyncio.ensure_future(scene.ask())
    await until(lambda: bool(scene.echo.seen))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: scene.echo.given_up == [STEP])
    assert scene.echo.answered == []


async def test_a_closed_proxy_refuses(scene: Scene) -> None:
    scene.echo.gate.clear()
    waiting = asyncio.ensure_future(scene.ask())
    await until(lambda: bool(scene.echo.seen))
    await scene.proxy.close()
    with pytest.raises((OSError, EOFError)):
        await waiting
    with pytest.raises(ConnectionRefusedError):
        await scene.ask()
