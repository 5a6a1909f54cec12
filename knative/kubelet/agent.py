"""Starts processes for the platform and reports their ends: `python -m knative.kubelet.agent FD PARENT [MODULE...]`.

FD is one end of a Unix socket pair, PARENT the platform's pid. The MODULEs are imported once; a replica that is a
Python module is then a fork of this process, which has them already (a fork server), any other is fork and exec.
Standard library only, and one thread only: a fork of a process with threads may find a lock held for ever.

One JSON object a line. From the platform: a `Start` with an `id`, or `{"pid": P, "signal": N}`. To it:
`{"preloaded": ERROR}` once, `{"id": I, "pid": P}` or `{"id": I, "error": TEXT}`, and `{"ended": P, "code": C}`, with C
minus the signal's number when a signal ended it.

Nothing outlives the platform:

    platform  --socket-->  agent: a subreaper; on EOF or SIGTERM (sent when the platform dies) kills all its descendants
                             └── replica: SIGKILL when the agent dies; a subreaper, as process 1 of a container is
                                   └── whatever it starts, in whatever session, stays below it

When a replica ends, its orphans become children of the agent, which kills them before it reports the end. When the
agent is killed, they come to the platform (`agents.Agent._bury`). Only if both are killed by SIGKILL at one moment does
something stay: what a replica itself had started. The replicas die even then.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from knative.kubelet import lineage

CANNOT_START = 126  # the shell's exit code for a command that cannot be run
NOT_FOUND = 127
_HELD_BACK = (signal.SIGCHLD, signal.SIGTERM)
_RECEIVE_BYTES = 1 << 16
_LOOK_AGAIN_S = 0.005


@dataclass(frozen=True, slots=True)
class Start:
    """A process to start: `argv`, or `module` with `args` as `python -m` would run it.

    `env` is the whole environment; `folder` "" is the platform's own; `log` is emptied first."""

    argv: Sequence[str]
    module: str
    args: Sequence[str]
    env: Mapping[str, str]
    folder: str
    log: str


def main(argv: Sequence[str]) -> None:
    fd, platform, preload = int(argv[1]), int(argv[2]), argv[3:]
    lineage.die_with_parent(signal.SIGKILL)  # there are no descendants yet, and an import may hang
    if os.getppid() != platform:
        sys.exit(1)
    link = socket.socket(fileno=fd)
    link.set_inheritable(False)
    error = _import_all(preload)
    Agent(link).serve(error)


def _import_all(modules: Sequence[str]) -> str:
    """Why these cannot be shared by forks; "" if they can."""
    gc.disable()  # no holes in the pages to be shared; see gc.freeze
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            traceback.print_exc()
            return f"{name}: {type(error).__name__}: {error}"
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        return f"an import started threads ({names}), which do not survive a fork"
    gc.freeze()
    return ""


class Agent:
    """Reaps and reports, in one thread. `serve` returns when the platform has gone and all descendants with it."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._replicas: set[int] = set()
        self._ended: list[tuple[int, int]] = []  # not reported yet: what they left behind still runs

    def serve(self, preload_error: str) -> None:
        lineage.adopt_orphans()
        wake, wakeup = socket.socketpair()
        for end in (wake, wakeup):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        # not SIGKILL as for replicas: this process has descendants to kill, some of which know no parent to die with
        platform = os.getppid()
        lineage.die_with_parent(signal.SIGTERM)
        if os.getppid() == platform:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._send({"preloaded": preload_error})
                self._loop(wake)
        self._end()

    def _loop(self, wake: socket.socket) -> None:
        received = b""
        while True:
            readable, _, _ = select.select([self._link, wake], [], [])
            if wake in readable:
                with contextlib.suppress(BlockingIOError):
                    wake.recv(_RECEIVE_BYTES)
            self._reap()
            if self._link not in readable:
                continue
            data = self._link.recv(_RECEIVE_BYTES)
            if not data:
                return
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))

    def _obey(self, message: dict[str, Any]) -> None:
        if "signal" in message:
            self._signal(message["pid"], message["signal"])
            return
        number = message.pop("id")
        try:
            self._send({"id": number, "pid": self._fork(Start(**message))})
        except OSError as error:
            self._send({"id": number, "error": f"cannot fork: {error.strerror}"})

    def _signal(self, pid: int, number: int) -> None:
        """To the process itself, as a container runtime does; SIGKILL to its group too. Never to a recycled pid."""
        if pid in self._replicas:
            os.kill(pid, number)
            if number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):  # it may not have made its session yet
                    os.killpg(pid, number)

    def _fork(self, start: Start) -> int:
        agent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)  # a handler of ours must not run in the child
        try:
            pid = os.fork()
            if pid == 0:
                become(start, agent)
            self._replicas.add(pid)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
        return pid

    def _reap(self) -> None:
        """Collects what has ended. A child that is not a replica is an orphan of a replica that ended: it goes too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid in self._replicas:
                self._replicas.remove(pid)
                self._ended.append((pid, os.waitstatus_to_exitcode(status)))
        if self._ended and not self._kill_orphans():
            for pid, code in self._ended:
                self._send({"ended": pid, "code": code})
            self._ended.clear()

    def _kill_orphans(self) -> list[int]:
        orphans = [pid for pid in lineage.children_of(os.getpid()) if pid not in self._replicas]
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)  # ours to wait for, so the pid cannot have been given to another
        return orphans

    def _end(self) -> NoReturn:
        """Kills every descendant, those included that become children only as their parents go."""
        while True:
            for pid in {*lineage.children_of(os.getpid()), *self._replicas}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                ended, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                os._exit(0)
            self._replicas.discard(ended)
            if not ended:
                time.sleep(_LOOK_AGAIN_S)

    def _send(self, message: Mapping[str, object]) -> None:
        self._link.sendall(json.dumps(message).encode() + b"\n")


def become(start: Start, agent: int) -> NoReturn:
    """Turns this fork of the agent into the process asked for. None of the agent's own code runs after it."""
    code = CANNOT_START
    try:
        _detach(start, agent)
        code = _run_module(start) if start.module else _execute(start)
    except Exception as error:
        print(f"cannot start: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def begin_anew(parent: int) -> None:
    """A fork takes signals as a new process does, and ends with the one that has forked it."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    lineage.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(CANNOT_START)


def _detach(start: Start, agent: int) -> None:
    begin_anew(agent)
    lineage.adopt_orphans()
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, source in enumerate((nothing, log, log)):
        os.dup2(source, fd)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if start.folder:
        os.chdir(start.folder)


def _execute(start: Start) -> int:
    try:
        os.execvpe(start.argv[0], list(start.argv), start.env)
    except FileNotFoundError:
        print(f"cannot start {start.argv[0]!r}: no such program", file=sys.stderr)
        return NOT_FOUND


def _run_module(start: Start) -> int:
    """As `python -P -m module` would, but for what an interpreter reads only as it starts (PYTHONHASHSEED and such)."""
    os.environ.clear()
    os.environ.update(start.env)
    for folder in reversed(start.env.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    _renew_libraries(start.env)
    gc.enable()
    sys.argv = [start.module, *start.args]
    return _run_to_end(start.module)


def _renew_libraries(env: Mapping[str, str]) -> None:
    """What libraries settle when first imported, and each replica must settle anew. `random` sees to it itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
        threads = env.get("OMP_NUM_THREADS", "")
        if threads.isdecimal() and int(threads):
            sys.modules["torch"].set_num_threads(int(threads))


def _run_to_end(module: str) -> int:
    """The exit code. Does what an interpreter does as it ends, since os._exit will not: threads, atexit, output."""
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException as error:
        code = 1
        traceback.print_exception(error.with_traceback(_without_agent(error)))
    for end in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):  # type: ignore[attr-defined]  # typeshed leaves the first out
        with contextlib.suppress(Exception):
            end()
    return code


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _without_agent(error: BaseException) -> Any:
    """The traceback from the first line that is neither ours nor runpy's, as far as there is one."""
    step = error.__traceback__
    while step is not None and step.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        step = step.tb_next
    return step


if __name__ == "__main__":
    main(sys.argv)
