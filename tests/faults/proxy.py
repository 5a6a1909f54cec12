"""What stands before one replica: its queue-proxy, and the network that faults happen in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

from functions.contract import events
from tests.faults.relay import Answer, Relay, Reset, Silence, Upstream
from tests.faults.schedule import Fault
from tests.faults.wire import Message, flipped, page, step_tokens


class Armed:
    """The faults of one stage that wait for its next event, and what its steps were."""

    def __init__(self, stage: int, tell: Callable[[str], None]) -> None:
        self.stage = stage
        self.computed_tokens = 0  # of steps that were answered, by whatever replica
        self.injected: list[Fault] = []
        self._tell = tell
        self._waiting: deque[Fault] = deque()

    def arm(self, fault: Fault) -> None:
        self._waiting.append(fault)

    def take(self, kind: str, replica: str) -> Fault | None:
        """The fault that befalls the event of this type which has come to a replica."""
        for fault in self._waiting:
            if kind == events.STEP or fault.takes_any_event:
                self._waiting.remove(fault)
                self.injected.append(fault)
                self._tell(f"fault {fault}, replica {replica}, {kind.removeprefix(events.PREFIX)}")
                return fault
        return None

    def __len__(self) -> int:
        return len(self._waiting)


class ReplicaProxy(Relay):
    """Passes events on to a stage's process at `port`, and lets faults befall them. `act` does what is done to the
    process: kill, stop, drain."""

    def __init__(self, upstream_port: int, armed: Armed, act: Callable[[Fault], Awaitable[None]]) -> None:
        super().__init__()
        self.draining = False
        self.last_event_s = 0.0
        self._upstream = Upstream(upstream_port)
        self._armed = armed
        self._act = act
        self._dark_until_s = 0.0
        self._passed = asyncio.Event()  # set by each request that has been answered

    async def close(self) -> None:
        await super().close()
        self._upstream.close()

    async def answer(self, request: Message) -> Answer:
        if self._is_dark:
            return Silence()
        if request.header("k-network-probe"):
            return page(503, "shutting down\n") if self.draining else page(200, "queue")
        kind = request.header("ce-type")
        if kind:
            self.last_event_s = _now_s()
        fault = self._armed.take(kind, self.address) if kind else None
        reply = await (self._pass(request) if fault is None else self._disturbed(fault, request))
        self._passed.set()
        if kind == events.STEP and isinstance(reply, Message) and reply.header("ce-type") == events.STEPPED:
            self._armed.computed_tokens += step_tokens(request)
        return Silence() if self._is_dark else reply

    @property
    def _is_dark(self) -> bool:
        return _now_s() < self._dark_until_s

    async def _pass(self, request: Message, *, anew: bool = False, sent: asyncio.Event | None = None) -> Message:
        return await self._upstream.exchange(request, anew=anew, sent=sent)

    async def _disturbed(self, fault: Fault, request: Message) -> Answer:
        match fault.kind:
            case "kill" | "stop" | "drain":
                return await self._with_process(fault, request)
            case "delay":
                return await self._delayed(fault, request)
            case "cut":
                return await self._cut(fault, request)
            case "drop":
                return await self._dropped(fault, request)
            case "corrupt":
                return await self._corrupted(fault, request)
            case "duplicate":
                return await self._doubled(fault, request)
            case "reorder":
                return await self._held_back(fault, request)
        raise ValueError(f"{fault.kind} is not done to a stage")

    async def _with_process(self, fault: Fault, request: Message) -> Answer:
        if fault.point == "after":
            reply = await self._pass(request)
            await self._act(fault)
            return Silence() if fault.kind == "kill" else reply  # a kill resets the connection by itself
        if fault.point == "before":
            await self._act(fault)
            return await self._pass(request)
        sent = asyncio.Event()
        reply_later = self.spawn(self._pass(request, sent=sent))
        await _until_sent(reply_later, sent)
        await self._act(fault)
        return await reply_later  # type: ignore[no-any-return]  # a Message

    async def _delayed(self, fault: Fault, request: Message) -> Answer:
        if fault.point == "before":
            await asyncio.sleep(fault.seconds)
        reply = await self._pass(request)
        if fault.point != "before":
            await asyncio.sleep(fault.seconds)
        return reply

    async def _cut(self, fault: Fault, request: Message) -> Answer:
        if fault.point == "before":
            return Reset()
        if fault.point == "during":
            sent = asyncio.Event()
            task = self.spawn(self._pass(request, anew=True, sent=sent))
            await _until_sent(task, sent)
            task.cancel()
            return Reset()
        whole = (await self._pass(request)).to_bytes()
        return Reset(whole[: fault.salt % len(whole)])

    async def _dropped(self, fault: Fault, request: Message) -> Answer:
        if fault.point != "before":
            await self._pass(request)
        self._dark_until_s = _now_s() + fault.seconds
        return Silence()

    async def _corrupted(self, fault: Fault, request: Message) -> Answer:
        """Over a connection of its own: what comes after a spoilt request is read as something else."""
        if fault.part == "request head":
            return await self._pass(replace(request, head=flipped(request.head, fault.salt)), anew=True)
        if fault.part == "request body":
            return await self._pass(replace(request, body=flipped(request.body, fault.salt)), anew=True)
        reply = await self._pass(request)
        if fault.part == "reply head":
            return replace(reply, head=flipped(reply.head, fault.salt))
        return replace(reply, body=flipped(reply.body, fault.salt))

    async def _doubled(self, fault: Fault, request: Message) -> Answer:
        """A second time that nobody waits for: at once, or when later steps may have passed."""

        async def again(wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            await self._pass(request, anew=True)

        if fault.point != "after":
            self.spawn(again(0))
            return await self._pass(request)
        reply = await self._pass(request)
        self.spawn(again(fault.seconds))
        return reply

    async def _held_back(self, fault: Fault, request: Message) -> Answer:
        """Arrives even if whoever sent it has given up: it was on its way already."""

        async def late() -> Message:
            self._passed.clear()
            try:
                async with asyncio.timeout(fault.seconds):
                    await self._passed.wait()
            except TimeoutError:
                pass
            return await self._pass(request, anew=True)

        return await asyncio.shield(self.spawn(late()))  # type: ignore[no-any-return]  # a Message


async def _until_sent(task: asyncio.Task[Message], sent: asyncio.Event) -> None:
    """Or until the task has come to nothing."""
    waiting = asyncio.ensure_future(sent.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
