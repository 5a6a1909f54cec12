"""The platform's side of the agents: one for each set of modules to have imported, started when first asked for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import structlog

import knative
from knative.kubelet import lineage
from knative.kubelet.agent import Start

MARK = "KNATIVE_KUBELET"  # in the environment of every process of a kubelet: whose it is
ROOT = Path(knative.__file__).resolve().parents[1]  # what the platform itself imports from
_LINE_BYTES_MAX = 4 << 20
_LOOK_EVERY_S = 0.01

log = structlog.get_logger()


class AgentGone(Exception):
    """The agent ended before it could start the process."""


class Process:
    """A process that an agent started. `ended` gives its exit code, minus the signal's number when one ended it."""

    def __init__(self, pid: int, agent: Agent) -> None:
        self.pid = pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._agent = agent

    def send(self, number: signal.Signals) -> None:
        """SIGKILL reaches its process group too, any other signal only itself. No error when it has ended."""
        if not self.ended.done():
            self._agent.send({"pid": self.pid, "signal": int(number)})


class Agent:
    """One agent process. `preloaded` gives the reason why its modules cannot be shared, "" when they can."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str) -> None:
        loop = asyncio.get_running_loop()
        self.preloaded: asyncio.Future[str] = loop.create_future()
        self.gone = asyncio.Event()
        self._popen = process
        self.mark = mark
        self._numbers = itertools.count()
        self._starting: dict[int, asyncio.Future[Process]] = {}
        self._running: dict[int, Process] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._life: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, preload: Sequence[str], mark: str, output: Path) -> Agent:
        """What the agent itself prints goes to `output`. Raises OSError."""
        # on this thread, since Linux ends the agent with the thread that started it
        with output.open("ab") as printed:
            ours, theirs = socket.socketpair()
            with theirs:
                # waits before there is a process: a start that is cancelled must not lose one
                reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LINE_BYTES_MAX)
                try:
                    process = _spawn(theirs.fileno(), preload, mark, printed)
                except OSError:
                    writer.close()
                    raise
        agent = cls(process, mark)
        agent._writer = writer
        agent._life = asyncio.create_task(agent._listen(reader))
        return agent

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def run(self, start: Start) -> Process:
        """Raises AgentGone, and OSError if the machine has no room for one more process."""
        if self.gone.is_set() or self._writer is None or self._writer.is_closing():
            raise AgentGone("the process agent has ended")
        number = next(self._numbers)
        answer = self._starting[number] = asyncio.get_running_loop().create_future()
        self.send({"id": number, **asdict(start)})
        try:
            # a start that was sent cannot be called back: whoever gives up must still learn the pid to end it
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_kill_if_started)
            raise

    def send(self, message: Mapping[str, object]) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def close(self) -> None:
        """Ends the agent and every process it started, with SIGKILL; returns when they have gone."""
        if self._writer is not None:
            self._writer.close()
        if not self.preloaded.done():
            self._popen.kill()  # it does not look at its socket while it imports, and has started nothing yet
        await self.gone.wait()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            async for line in reader:
                if line.endswith(b"\n"):  # else it ended in the middle
                    self._take(json.loads(line))
        try:
            await self._bury()
        finally:
            self._report_gone()

    def _take(self, message: dict[str, Any]) -> None:
        if "preloaded" in message:
            self.preloaded.set_result(message["preloaded"])
        elif "ended" in message:
            process = self._running.pop(message["ended"])
            process.ended.set_result(message["code"])
        elif "pid" in message:
            process = self._running[message["pid"]] = Process(message["pid"], self)
            self._starting.pop(message["id"]).set_result(process)
        else:
            self._starting.pop(message["id"]).set_exception(OSError(message["error"]))

    async def _bury(self) -> None:
        """Waits for the end of the agent, whose replicas die with it, and ends what those replicas had started.

        An agent that ends in good order has done so itself. After a kill -9 of it, its replicas' own children know no
        parent to die with: they come to this process, a subreaper too, and carry the kubelet's mark."""
        if self._writer is not None:
            self._writer.close()
        while self._popen.poll() is None:  # noqa: ASYNC110 (a process sets no event)
            await asyncio.sleep(_LOOK_EVERY_S)
        ours = set(self._running)
        while True:
            children = lineage.children_of(os.getpid())
            ours |= {pid for pid in children if self._is_marked(pid)}
            if not ours.intersection(children):
                return
            for pid in ours.intersection(children):
                os.kill(pid, signal.SIGKILL)  # our child and not waited for yet: no other process has this pid
                if os.waitpid(pid, os.WNOHANG)[0]:  # noqa: ASYNC222 (does not wait)
                    ours.remove(pid)
            await asyncio.sleep(_LOOK_EVERY_S)

    def _is_marked(self, pid: int) -> bool:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"{MARK}={self.mark}".encode() in environ.split(b"\0")

    def _report_gone(self) -> None:
        self.gone.set()
        if not self.preloaded.done():
            code = self._popen.poll()
            self.preloaded.set_result(f"the agent ended meanwhile ({how_it_ended(code or 0)})")
        for answer in self._starting.values():
            answer.set_exception(AgentGone("the process agent ended while it was starting the process"))
            answer.add_done_callback(lambda done: done.exception())  # nobody may wait any more
        for process in self._running.values():
            process.ended.set_result(-signal.SIGKILL)
        self._starting.clear()
        self._running.clear()


class Agents:
    """All agents of one kubelet. `fork` False: modules are run by a new interpreter each time."""

    def __init__(self, folder: Path, *, fork: bool = True) -> None:
        self._folder = folder
        self._fork = fork
        self._agents: dict[tuple[str, ...], Agent] = {}
        self._opening: dict[tuple[str, ...], asyncio.Lock] = {}
        self._unshareable: set[tuple[str, ...]] = set()
        self._serial = itertools.count()
        self._kubelet = f"{os.getpid()}-{secrets.token_hex(4)}"

    async def warm(self, preload: Sequence[str]) -> bool:
        """Has an agent import these. False, with a logged warning, if forks cannot share them."""
        key = tuple(preload)
        if not key or not self._fork or key in self._unshareable:
            return False
        agent = await self._agent(key)
        error = await asyncio.shield(agent.preloaded)
        if error:
            if key not in self._unshareable:
                log.warning("preload_failed", modules=list(key), error=error, effect="each replica imports them anew")
            self._unshareable.add(key)
            await agent.close()
        return not error

    async def run(self, start: Start, preload: Sequence[str] = ()) -> Process:
        """Starts a process; a module as a fork of the agent that has imported `preload`.

        Raises AgentGone if the agent ended meanwhile (the next call brings up a new one) and OSError."""
        key: tuple[str, ...] = ()
        if start.module and await self.warm(preload):
            key = tuple(preload)
        agent = await self._agent(key)
        env = dict(start.env) | {MARK: agent.mark}
        if not start.module:
            return await agent.run(Start(start.argv, "", (), env, start.folder, start.log))
        env = with_root(env)
        if key:
            return await agent.run(Start((), start.module, start.args, env, start.folder, start.log))
        argv = (sys.executable, "-P", "-m", start.module, *start.args)
        return await agent.run(Start(argv, "", (), env, start.folder, start.log))

    async def close(self) -> None:
        """Ends all agents and, with SIGKILL, every process they started."""
        await asyncio.gather(*(agent.close() for agent in self._agents.values()))
        self._agents.clear()

    async def _agent(self, key: tuple[str, ...]) -> Agent:
        async with self._opening.setdefault(key, asyncio.Lock()):
            agent = self._agents.get(key)
            if agent is None or agent.gone.is_set():
                name = ".".join(key)[:100] or "plain"
                mark = f"{self._kubelet}-{next(self._serial)}"
                self._folder.mkdir(parents=True, exist_ok=True)
                agent = await Agent.start(key, mark, self._folder / f"{name}.log")
                self._agents[key] = agent
                log.info("agent_started", pid=agent.pid, preload=list(key))
            return agent


def _spawn(link: int, preload: Sequence[str], mark: str, printed: BinaryIO) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-P", "-u", "-m", "knative.kubelet.agent", str(link), str(os.getpid()), *preload]
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=printed,
        stderr=printed,
        env=with_root(os.environ) | {MARK: mark},
        pass_fds=(link,),
        start_new_session=True,
    )


def with_root(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with what the platform imports from in front of PYTHONPATH."""
    rest = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder and folder != str(ROOT)]
    return {**env, "PYTHONPATH": os.pathsep.join([str(ROOT), *rest])}


def how_it_ended(code: int) -> str:
    """For people: 'exit code 1', 'killed by SIGKILL'."""
    if code >= 0:
        return f"exit code {code}"
    hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
    return f"killed by {_signal_name(-code)}{hint}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _kill_if_started(answer: asyncio.Future[Process]) -> None:
    if answer.exception() is None:
        answer.result().send(signal.SIGKILL)
