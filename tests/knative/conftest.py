"""A platform in this process, with small servers for images that need no torch, and a clock that the test turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
import yaml

from knative.images import Command
from knative.platform import Applied, Platform, PlatformSettings
from knative.resources.documents import parse_documents
from knative.revision import Revision

WAIT_S = 30.0  # against hangs

# /slow?S answers after S seconds, /stream sends a line every 0.05 s, /env says its variables; /chunked and /announced
# begin a body whose end can be told and do not end it
SERVER = """
import http.server, json, os, sys, time, urllib.parse

if os.environ.get("CRASH"):
    sys.exit(os.environ["CRASH"])
time.sleep(float(os.environ.get("START_S", "0")))

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        if url.path == "/slow":
            time.sleep(float(url.query))
        if url.path == "/stream":
            return self.stream(int(url.query))
        if url.path in ("/chunked", "/announced"):
            return self.begin(url.path == "/chunked", int(url.query))
        facts = {"pid": os.getpid(), "path": self.path, "env": dict(os.environ) if url.path == "/env" else {}}
        body = json.dumps({"text": os.environ.get("TEXT", "hello"), **facts}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin(self, chunked, size):
        self.send_response(200)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(size))))
        self.end_headers()
        self.wfile.write(b"5\\r\\nbegun\\r\\n" if chunked else b"begun")
        time.sleep(600)

    def stream(self, count):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(count):
            self.wfile.write(f"{number}\\n".encode())
            time.sleep(0.05)
        self.close_connection = True

    def log_message(self, *_):
        pass

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

print("serves", flush=True)
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


class Clock:
    """Unix seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Cluster:
    """A running platform and what the tests do with it."""

    platform: Platform
    client: aiohttp.ClientSession
    clock: Clock | None
    events: list[Any]  # its log

    async def apply(self, *manifests: dict[str, Any]) -> list[Applied]:
        return await self.platform.apply(parse_documents(yaml.safe_dump_all(manifests), "test.yaml"))

    async def get(self, service: str, path: str = "/", **options: Any) -> tuple[int, str]:
        async with self.client.get(f"{self.platform.url}/default/{service}{path}", **options) as answer:
            return answer.status, await answer.text()

    async def ask(self, service: str, path: str = "/", **options: Any) -> dict[str, Any]:
        """The JSON of an answer that must be good."""
        async with self.client.get(f"{self.platform.url}/default/{service}{path}", **options) as answer:
            assert answer.status == 200, await answer.text()
            data: dict[str, Any] = await answer.json(content_type=None)
            return data

    @property
    def revisions(self) -> list[Revision]:
        return list(self.platform._revisions())

    def status(self, service: str) -> dict[str, Any]:
        """Of the newest revision."""
        found = [one for one in self.platform.status()["revisions"] if one["service"] == service]
        assert found, self.platform.status()
        return found[-1]

    def condition(self, service: str) -> dict[str, Any]:
        """Ready, of the Service."""
        (one,) = (one for one in self.platform.get("service", None) if one["metadata"]["name"] == service)
        condition: dict[str, Any] = one["status"]["conditions"][0]
        return condition

    def ready(self, service: str, count: int = 1) -> Callable[[], bool]:
        return lambda: bool(self.status(service)["ready"] == count)

    async def turn(self, seconds: int) -> None:
        """Lets the clock go on, second by second."""
        assert self.clock is not None
        for _ in range(seconds):
            self.clock.now_s += 1
            for revision in self.revisions:
                revision.tick()
            await asyncio.sleep(0)

    async def turn_until(self, condition: Callable[[], object]) -> None:
        """Turns the clock until it holds."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self.turn(1)
                await asyncio.sleep(0.002)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """tests/server: a fork of an interpreter that has the HTTP server imported."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "tests_small_server.py").write_text(SERVER)
    preload = ("http.server", "json")
    return {
        "tests/server": Command(module="tests_small_server", preload=preload, env={"PYTHONPATH": str(folder)}),
    }


def _service(
    name: str,
    *,
    image: str = "tests/server",
    annotations: dict[str, str] | None = None,
    traffic: list[dict[str, Any]] | None = None,
    revision: str = "",
    limits: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    command: list[str] | None = None,
    spec: dict[str, Any] | None = None,
    **env: str,
) -> dict[str, Any]:
    scaling = {f"autoscaling.knative.dev/{key}": value for key, value in (annotations or {}).items()}
    container: dict[str, Any] = {"image": image, "env": [{"name": key, "value": env[key]} for key in env]}
    if limits:
        container["resources"] = {"limits": limits}
    if command:
        container["command"] = command
    template: dict[str, Any] = {
        "metadata": {"annotations": scaling},
        "spec": {"containers": [container], **(spec or {})},
    }
    if revision:
        template["metadata"]["name"] = revision
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, "annotations": metadata or {}},
        "spec": {"template": template, **({"traffic": traffic} if traffic else {})},
    }


@pytest.fixture(scope="session")
def service() -> Callable[..., dict[str, Any]]:
    """service("name", annotations={"min-scale": "1"}, TEXT="...") -> a manifest of tests/server."""
    return _service


@pytest.fixture(scope="session")
def settings_of() -> Callable[..., dict[str, Any]]:
    """settings_of(**{"initial-scale": "0"}) -> config-autoscaler."""

    def config_map(**data: str) -> dict[str, Any]:
        metadata = {"name": "config-autoscaler", "namespace": "knative-serving"}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}

    return config_map


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """`await until(condition)` for states of processes that nobody announces."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 (other processes set no events)
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """What this process logs meanwhile, an event each."""
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
async def start(
    tmp_path: Path, images: dict[str, Command], events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    """`await start(clock=True, **settings)` -> a Cluster, ended with the test. With `clock`, its time stands still but
    for `turn`."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)))
        serial = iter(range(100))

        async def start_one(*, clock: bool = False, **settings: Any) -> Cluster:
            turned = Clock() if clock else None
            if turned is not None:
                monkeypatch.setattr("knative.platform._unix_clock", lambda: turned)
            name = f"p{next(serial)}"
            options: dict[str, Any] = {"port": 0, "drain_quiet_s": 0.0, "gpus": (), "images": images, **settings}
            platform = Platform(PlatformSettings(folder=tmp_path / name, name=name, **options))
            await stack.enter_async_context(platform)
            return Cluster(platform, client, turned, events)

        yield start_one
