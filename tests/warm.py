"""Processes of Python modules that are there in a moment: forks of interpreters that have imported what they need.

What a test starts by `Popen` here is a process of its own as one of subprocess.Popen is, with its own environment,
signals, files and end; only the seconds of imports before its first line are spent once for all. Tests of the start
itself, of imports and of command lines use subprocess.Popen.

As a program: `python -P -m tests.warm FD MODULE...`, one for each set of modules, forks what it is told to over FD.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from knative.images import BUILTIN
from knative.kubelet.agent import Start, _import_all, _run_module, begin_anew

_ROOT = Path(__file__).parents[1]
_ORCHESTRATOR = BUILTIN["stagecraft/orchestrator"].preload
# by the module that is run; what is not here is imported by a new interpreter each time
_PRELOADS: dict[str, tuple[str, ...]] = {
    **{command.module: command.preload for command in BUILTIN.values() if command.module},
    "orchestrator.cli": (
        "orchestrator.cli",
        "orchestrator.cli.batch_view",
        "orchestrator.batches.collect",
        "orchestrator.batches.known",
        "orchestrator.planner",
        "orchestrator.render.deployment",
        "knative.control",
        "knative.platform",
    ),
    "tests.exactness.endless": _ORCHESTRATOR,
    "tests.orchestrator.gated_model": _ORCHESTRATOR,
    "tests.orchestrator.whole_model": (*_ORCHESTRATOR, "transformers.models.llama.modeling_llama"),
}
_MESSAGE_BYTES_MAX = 1 << 17
_FDS_MAX = 16
_NUMBER = struct.Struct("i")

_servers: dict[tuple[str, ...], socket.socket] = {}


class Popen(subprocess.Popen[Any]):
    """Of a command `[sys.executable, ..., "-m", MODULE, ...]`."""

    _report = -1  # where its pid came from and its wait status will

    def _execute_child(self, args: Any, *details: Any) -> None:
        (_, _, _, pass_fds, cwd, env, _, _, _, *pipes) = details[:15]
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        module, arguments = _of_command(args)
        ours, theirs = socket.socketpair()
        standard = [given if given >= 0 else number for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        message = {
            "module": module,
            "args": arguments,
            "env": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
            "fds": [0, 1, 2, *pass_fds],
        }
        with theirs:
            server = _server(_PRELOADS[module])
            socket.send_fds(server, [json.dumps(message).encode()], [theirs.fileno(), *standard, *pass_fds])
        self._close_pipe_fds(*pipes)
        self._report = ours.detach()
        self.pid = _NUMBER.unpack(self._read())[0]
        self._child_created = True

    def _read(self) -> bytes:
        """The next number; that of SIGKILL if the server was lost, whose forks end with it."""
        return os.read(self._report, _NUMBER.size) or _NUMBER.pack(signal.SIGKILL)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._report], [], [], 0)[0]:
            return 0, 0
        (status,) = _NUMBER.unpack(self._read())
        os.close(self._report)
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run does with the output captured as text."""
    with Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def _of_command(argv: Sequence[Any]) -> tuple[str, list[str]]:
    command = [str(one) for one in argv]
    at = command.index("-m")
    return command[at + 1], command[at + 2 :]


def _server(preload: tuple[str, ...]) -> socket.socket:
    if preload not in _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            argv = [sys.executable, "-P", "-m", "tests.warm", str(fd), *preload]
            env = {**os.environ, "PYTHONPATH": str(_ROOT)}
            # nobody waits for it: it ends when this process has
            process = subprocess.Popen(argv, env=env, pass_fds=[fd], stdin=subprocess.DEVNULL, start_new_session=True)
            process.returncode = 0
        _servers[preload] = ours
        atexit.register(ours.close)
    return _servers[preload]


# -- the program


def main() -> NoReturn:
    control = socket.socket(fileno=int(sys.argv[1]))
    if error := _import_all(sys.argv[2:]):
        sys.exit(error)
    wake, wakeup = socket.socketpair()
    for end in (wake, wakeup):
        end.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    reports: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([control, wake], [], [])
        with contextlib.suppress(BlockingIOError):
            wake.recv(1 << 16)
        _reap(reports)
        if control not in readable:
            continue
        data, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES_MAX, _FDS_MAX)
        if not data:
            for pid in reports:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        report, *files = fds
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            _become(json.loads(data), files, server)
        for fd in files:
            os.close(fd)
        reports[pid] = report
        os.write(report, _NUMBER.pack(pid))


def _reap(reports: dict[int, int]) -> None:
    while reports:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with contextlib.suppress(BrokenPipeError), open(reports.pop(pid), "wb") as report:
            report.write(_NUMBER.pack(status))


def _become(message: dict[str, Any], files: Sequence[int], server: int) -> NoReturn:
    """Turns this fork into the process that was asked for."""
    code = 1
    try:
        begin_anew(server)
        above = max(message["fds"]) + 1
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, above) for fd in files]
        os.closerange(3, min(moved))
        for source, target in zip(moved, message["fds"], strict=True):
            os.dup2(source, target)
        os.closerange(above, os.sysconf("SC_OPEN_MAX"))
        os.chdir(message["folder"])
        # runpy's, about what is imported already; a new interpreter has nothing to warn of
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        code = _run_module(Start((), message["module"], message["args"], message["env"], "", ""))
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
