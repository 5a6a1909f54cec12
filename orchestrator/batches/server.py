"""The results service: `python -m orchestrator.batches.server`. HTTP as in results_api.py.

PORT and HOST say where it listens (8080, 0.0.0.0), RESULTS_FILE where results lie. Exit codes: 0 after SIGTERM or
SIGINT, 1 when the file cannot be trusted any more, 2 for bad settings or a file that cannot be used, 3 when the port is
taken.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import structlog
import uvicorn

from functions.contract.logs import configure_logs
from knative.eventing.store_errors import StoreError
from orchestrator.batches.group_commit import GroupCommit
from orchestrator.batches.results_api import results_app
from orchestrator.batches.results_store import ResultsStore
from orchestrator.state_folder import state_folder

PORT_DEFAULT = 8080
GRACE_S = 10

_log = structlog.get_logger("results")


class SettingError(Exception):
    """A variable that cannot be used; the text names it."""


@dataclass(frozen=True, slots=True)
class Settings:
    host: str
    port: int
    file: Path


def main() -> int:
    """The whole life of the process; returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # until the server takes them; it raises them again at its end
        signal.signal(number, lambda *_: sys.exit(0))
    configure_logs(as_json=not sys.stderr.isatty())
    try:
        settings = read_settings(os.environ)
        store = ResultsStore(settings.file)
    except (SettingError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        listening = _listen(settings)
    except OSError as error:
        print(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another PORT", file=sys.stderr
        )
        return 3
    with listening:
        return asyncio.run(_serve(store, listening))


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Raises SettingError."""
    text = environment.get("PORT") or str(PORT_DEFAULT)
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise SettingError(f"PORT must be a number of 0 to 65535, got {text[:40]!r}")
    return Settings(environment.get("HOST") or "0.0.0.0", int(text), _file(environment))


def _file(environment: Mapping[str, str]) -> Path:
    """RESULTS_FILE where its folder can be written to (a cluster's volume), else a file in the user's state folder."""
    named = environment.get("RESULTS_FILE", "")
    if named and os.access(Path(named).parent, os.W_OK | os.X_OK):
        return Path(named)
    # K_SERVICE is what Knative tells a container of its service
    own = state_folder(environment) / "results" / f"{environment.get('K_SERVICE') or 'results'}.sqlite"
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"cannot use {own.parent}: {error.strerror}; name a file in RESULTS_FILE") from None
    if named:
        _log.warning("results_file_elsewhere", wanted=named, used=str(own), reason="its folder cannot be written to")
    return own


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # with its protocol named, without which asyncio lets small writes wait for acknowledgements (40 ms a reply)
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError:
        listening.close()
        raise
    return listening


class _Server(uvicorn.Server):
    """Over one file. Lets waiting readers go at the first signal, so that the end does not wait for them."""

    def __init__(self, file: ResultsStore) -> None:
        self.store = GroupCommit(file, self._give_up)
        self.failure: Exception | None = None
        app = results_app(self.store)
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", loop="none", timeout_graceful_shutdown=GRACE_S
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.store.release()
        super().handle_exit(sig, frame)

    def _give_up(self, error: Exception) -> None:
        self.failure = error
        self.should_exit = True


async def _serve(file: ResultsStore, listening: socket.socket) -> int:
    server = _Server(file)
    _log.info("serving", file=str(file.path), port=listening.getsockname()[1])
    try:
        await server.serve([listening])
    finally:
        await server.store.close()
    if server.failure is not None:
        print(server.failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
