"""Free ports of 127.0.0.1 for programs that bind them themselves."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from knative.errors import Unavailable

_LOWEST, _HIGHEST = 10_000, 65_535
_TRIES = 1000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class Ports:
    """Hands out each port once. Between the choice and the program's bind nobody else should come by it:

    * outgoing connections do not, since it lies outside the kernel's ephemeral range;
    * other platforms on this machine do not, since the choice is announced as an abstract Unix socket (unix(7)), which
      vanishes with the process that holds it.
    """

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}
        self._range = _user_ports()

    def take(self) -> int:
        """Raises Unavailable if a thousand choices were all taken."""
        for port in (random.choice(self._range) for _ in range(_TRIES)):
            if port not in self._held and (claim := _claim(port)) is not None:
                self._held[port] = claim
                return port
        raise Unavailable(f"no free port found between {self._range[0]} and {self._range[-1]}; end some programs")

    def give_back(self, port: int) -> None:
        with contextlib.suppress(KeyError):
            self._held.pop(port).close()

    def close(self) -> None:
        for port in list(self._held):
            self.give_back(port)


def is_free(port: int) -> bool:
    """Whether a program that asks for SO_REUSEADDR, as servers do, could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _binds(lambda: probe.bind(("127.0.0.1", port)))


def _claim(port: int) -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX)
    announced = sys.platform != "linux" or _binds(lambda: claim.bind(f"\0knative-port-{port}"))
    if announced and is_free(port):
        return claim
    claim.close()
    return None


def _binds(bind: Callable[[], None]) -> bool:
    try:
        bind()
    except OSError:
        return False
    return True


def _user_ports() -> list[int]:
    """Ports that the kernel does not give to outgoing connections, or all if those are too few to choose from."""
    first, last = 32_768, 60_999
    with contextlib.suppress(OSError):
        first, last = map(int, _EPHEMERAL.read_text().split())
    user = [port for port in range(_LOWEST, _HIGHEST + 1) if not first <= port <= last]
    return user if len(user) >= _TRIES else list(range(_LOWEST, _HIGHEST + 1))
