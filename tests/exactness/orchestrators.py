"""Orchestrator processes over the stages of a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests import warm

NAME = "whole"


@dataclass
class Orchestrator:
    """A process that may be ended and started again at its ports. `settings` without their ORCHESTRATOR_."""

    model: Path
    plan: str
    stage_urls: Sequence[str]
    log: Path
    settings: dict[str, str]
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    process: warm.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports[1]}"

    def start(self) -> None:
        """Returns when it is ready."""
        given = {
            "MODEL": str(self.model),
            "MODEL_NAME": NAME,
            "STAGE_URLS": ",".join(self.stage_urls),
            "PLAN": self.plan,
            "HOST": "127.0.0.1",
            "HTTP_PORT": str(self.ports[0]),
            "GRPC_PORT": str(self.ports[1]),
            **self.settings,
        }
        environment = {f"ORCHESTRATOR_{name}": value for name, value in given.items()}
        with self.log.open("ab") as output:
            self.process = warm.Popen(
                [sys.executable, "-P", "-m", "orchestrator.server"],
                env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )
        self.wait(lambda: httpx.get(f"{self.url}/v2/models/{NAME}/ready").status_code == 200)

    def wait(self, met: Callable[[], bool]) -> None:
        for _ in range(2400):
            assert self.process is not None
            if self.process.poll() is not None:
                pytest.fail(f"the orchestrator ended with {self.process.returncode}:\n{self.log.read_text()}")
            with suppress(httpx.TransportError):
                if met():
                    return
            time.sleep(0.05)
        pytest.fail(f"never happened:\n{self.log.read_text()}")

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return int(self.process.wait(30))

    def close(self) -> None:
        """In good order if it can; fails if that takes too long."""
        if self.process is None or self.process.poll() is not None:
            return
        try:
            self.end(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def sequences(self) -> list[float]:
        """Sequences that each stage holds."""
        return [metric(url, "stagecraft_stage_sequences") for url in self.stage_urls]

    def tokens(self) -> float:
        """Tokens that went through the first stage so far."""
        return metric(self.stage_urls[0], "stagecraft_stage_tokens_total")

    def waiting(self) -> float:
        return metric(self.url, 'stagecraft_sequences_waiting{priority="interactive"}')

    def until_idle(self) -> None:
        self.wait(lambda: not any(self.sequences()))


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), 0.0)
