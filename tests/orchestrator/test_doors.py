"""The public doors: API keys, and limits on what comes before a request is one. Against the real server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc

from functions.contract.http_limits import HttpLimits, limited_protocol
from functions.contract.watched_file import FileError, WatchedFile
from orchestrator.api_keys import ApiKeys, first_api_key, parse_api_keys
from orchestrator.http_guard import nests_deeper
from tests import warm

ROOT = Path(__file__).parents[2]
KEY, OTHER = "sk-first-0123456789abcdef", "sk-other-0123456789abcdef"


# --- the real server with keys


@dataclass
class Server:
    url: str
    grpc: str
    keys: Path
    log: Path
    client: httpx.Client

    def headers(self, key: str = KEY) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("doors")
    keys, log, gate = folder / "keys", folder / "log", folder / "gate"
    keys.write_text(f"# of the tests\nteam-a: {KEY}\n")
    gate.touch()
    http_port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "tests.orchestrator.whole_model", str(toy_folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ORCHESTRATOR_API_KEYS_FILE": str(keys)}
    with log.open("w") as stream:
        process = warm.Popen(
            [*command, str(http_port), str(grpc_port), str(gate)], env=env, stderr=stream, stdout=stream
        )
    try:
        url = f"http://127.0.0.1:{http_port}"
        with httpx.Client(base_url=url, timeout=240) as client:
            found = Server(url, f"127.0.0.1:{grpc_port}", keys, log, client)
            _wait_until_ready(found, process)
            yield found
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if server.client.get("/v2/models/toy/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail(server.log.read_text())


CLOSED = [
    ("POST", "/openai/v1/completions", {"model": "toy", "prompt": "To be", "max_tokens": 2}),
    ("POST", "/openai/v1/chat/completions", {"model": "toy", "messages": [{"role": "user", "content": "a"}]}),
    ("GET", "/openai/v1/models", None),
    ("GET", "/openai/v1/nothing", None),
    ("POST", "/v1/models/toy:predict", {"instances": ["To be"]}),
    ("GET", "/v1/models", None),
    ("POST", "/v2/models/toy/infer", {"inputs": []}),
    ("POST", "/v2/models/toy/generate", {"text_input": "To be"}),
    ("POST", "/v2/repository/models/toy/unload", {}),
    ("GET", "/v2", None),
    ("POST", "/events", {}),
    ("GET", "/docs", None),
    ("GET", "/openapi.json", None),
]
WRONG = {
    "none": {},
    "another": {"authorization": f"Bearer {OTHER}"},
    "a part": {"authorization": f"Bearer {KEY[:-1]}"},
    "empty": {"authorization": "Bearer"},
    "basic": {"authorization": f"Basic {KEY}"},
    "the name": {"authorization": "Bearer team-a"},
    "not ASCII": {"authorization": "Bearer \u00e4\u00f6".encode().decode("latin-1")},
}


@pytest.mark.parametrize(("method", "path", "body"), CLOSED)
def test_nothing_is_done_without_a_key(server: Server, method: str, path: str, body: Any) -> None:
    reply = server.client.request(method, path, json=body)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == 'Bearer realm="stagecraft"'
    error = reply.json()["error"]
    if path.startswith("/openai/"):
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        error = error["message"]
    assert "Authorization: Bearer" in error


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_a_wrong_key_is_refused_and_not_told_again(server: Server, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    reply = server.client.get("/openai/v1/models", headers=raw)  # type: ignore[arg-type]  # bytes, which httpx takes as they are
    assert reply.status_code == 401
    assert KEY[:-1] not in reply.text + server.log.read_text()
    assert OTHER not in reply.text + server.log.read_text()


@pytest.mark.parametrize("path", ["/", "/v2/health/live", "/v2/health/ready", "/v2/models/toy/ready", "/metrics"])
def test_health_and_metrics_need_no_key(server: Server, path: str) -> None:
    assert server.client.get(path).status_code == 200


def test_with_the_key_requests_are_served(server: Server) -> None:
    _, path, body = CLOSED[0]
    reply = server.client.post(path, json=body, headers=server.headers())
    assert reply.json()["usage"]["completion_tokens"] == 2


def test_a_body_without_a_key_is_not_read(server: Server) -> None:
    """The refusal comes although the body never does."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /openai/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 401")


def test_keys_are_changed_while_it_runs(server: Server) -> None:
    before = server.keys.read_text()
    fresh = server.keys.with_name("fresh")
    fresh.write_text(f"{before}team-b: {OTHER}\n")
    os.replace(fresh, server.keys)
    while server.client.get("/openai/v1/models", headers=server.headers(OTHER)).status_code != 200:
        pass
    server.keys.write_text("nonsense")  # is told, and changes nothing
    fresh.write_text(before)
    os.replace(fresh, server.keys)
    while server.client.get("/openai/v1/models", headers=server.headers(OTHER)).status_code != 401:
        pass
    assert server.client.get("/openai/v1/models", headers=server.headers()).status_code == 200


async def test_grpc_needs_the_key_too(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="toy"))).ready
        request = pb.ModelMetadataRequest(name="toy")
        for metadata in ((), (("authorization", f"Bearer {OTHER}"),)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ModelMetadata(request, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert OTHER not in str(refused.value.details())
        assert (await stub.ModelMetadata(request, metadata=(("authorization", f"Bearer {KEY}"),))).name == "toy"


def test_generate_sends_the_key_of_a_file(server: Server, tmp_path: Path) -> None:
    def generate(*more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "orchestrator.cli", "generate", "To be", "--url", server.url, "--max-tokens", "2"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([*argv, *more], capture_output=True, text=True, env=env, check=False)

    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    assert generate("--api-key-file", str(path)).returncode == 0
    path.write_text("short-secret\n")
    told = generate("--api-key-file", str(path))
    assert (told.returncode, "short-secret" in told.stderr) == (2, False)


# --- files of keys


def test_a_file_of_keys_takes_names_and_comments() -> None:
    keys = parse_api_keys(f"# c\n\n  {KEY}  \nteam-b: {OTHER}\n".encode())
    assert [keys.accept(token) for token in (KEY, OTHER, "team-b", "", f"team-b: {OTHER}")] == [
        True,
        True,
        *[False] * 3,
    ]
    assert first_api_key(f"team-b: {OTHER}\n{KEY}".encode()) == OTHER
    assert KEY not in repr(keys)


@pytest.mark.parametrize(
    "text", ["", "# nothing", "too-short", f"{KEY} {OTHER}", f"a name: {KEY}", f"{KEY}\u00e4", "a: b"]
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        WatchedFile[ApiKeys](path, parse_api_keys)
    assert KEY not in str(caught.value)


# --- limits of the HTTP server, with an application that reads what comes


async def _count(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes that it was sent."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def limited(limits: HttpLimits, app: Any = _count) -> AsyncIterator[int]:
    """The port of a server under `limits`."""
    config = uvicorn.Config(app, http=limited_protocol(limits), lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await serving


async def _answer(port: int, *pieces: bytes) -> bytes:
    """All that is answered until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0)
    try:
        return await asyncio.wait_for(reader.read(), 60)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


CLOSE = b"Connection: close\r\n"


async def test_what_is_within_the_limits_passes() -> None:
    async with limited(HttpLimits()) as port:
        head = b"POST / HTTP/1.1\r\nHost: x\r\n" + CLOSE
        assert (await _answer(port, head + b"Content-Length: 5\r\n\r\n", b"ab", b"cde")).endswith(b"\r\n\r\n5")
        many = b"".join(b"a%d: %s\r\n" % (n, b"v" * 400) for n in range(100))
        assert (await _answer(port, head + many + b"Content-Length: 0\r\n\r\n")).endswith(b"\r\n\r\n0")


@pytest.mark.parametrize(
    "head",
    [
        b"a: " + b"v" * 5000,  # one that never ends
        b"".join(b"a%d: b\r\n" % n for n in range(30)) + b"\r\n",
        b"x" * 5000 + b": b\r\n\r\n",
    ],
    ids=["long", "many", "a long name"],
)
async def test_headers_are_bounded(head: bytes) -> None:
    async with limited(HttpLimits(header_bytes_max=4096, headers_max=20)) as port:
        answer = await _answer(
            port, b"GET / HTTP/1.1\r\nHost: x\r\n", *(head[n : n + 1000] for n in range(0, len(head), 1000))
        )
    assert answer.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab"],
)
async def test_who_says_nothing_more_is_not_waited_for(said: bytes) -> None:
    async with limited(HttpLimits(receive_timeout_s=0.2)) as port:
        answer = await _answer(port, said)
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "the request did not come within 0.2 s"


async def test_the_second_request_of_a_connection_is_not_waited_for_either() -> None:
    async with limited(HttpLimits(receive_timeout_s=0.2)) as port:
        answer = await _answer(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHo")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in answer


@pytest.mark.parametrize(
    "second",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: b\r\n" % n for n in range(30)) + b"\r\n",
        b"no HTTP at all",
        b"GET / HTTP/1.1\r\n" + b"x" * 5000,
    ],
    ids=["many headers", "nonsense", "long"],
)
async def test_a_refusal_is_never_taken_for_the_answer_to_an_earlier_request(second: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab"
    async with limited(HttpLimits(header_bytes_max=4096, headers_max=20)) as port:
        assert await _answer(port, head + second) == b""  # the answer to the first was not there yet


async def test_a_request_that_runs_learns_that_its_client_has_gone_with_another_one_behind_it() -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async with limited(HttpLimits(), app) as port, asyncio.timeout(60):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        await begun.wait()
        writer.close()
        await gone.wait()


async def test_what_is_no_http_is_refused_in_words() -> None:
    async with limited(HttpLimits()) as port:
        answer = await _answer(port, b"no HTTP at all\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "Invalid HTTP request received."


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
async def test_an_upgrade_is_answered_as_any_request_and_ends_the_connection(upgrade: bytes) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %b\r\n" % upgrade
    async with limited(HttpLimits()) as port:
        answer = await _answer(port, head + b"\r\nleft out")
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n0")
        # httptools would leave the body out
        assert (await _answer(port, head + b"Content-Length: 2\r\n\r\nab")).startswith(b"HTTP/1.1 501")


async def test_trailers_are_bounded_as_headers_are() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    async with limited(HttpLimits(header_bytes_max=4096)) as port:
        assert (await _answer(port, head, b"a: b\r\n\r\n")).endswith(b"\r\n\r\n3")
        endless = await _answer(port, head + b"a: ", *[b"v" * 1000] * 6)
    assert endless.startswith(b"HTTP/1.1 431")


async def test_connections_are_bounded_and_come_free_again() -> None:
    async with limited(HttpLimits(connections_max=2)) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert (await _answer(port, b"")).startswith(b"HTTP/1.1 503")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        while not (await _answer(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n")).startswith(b"HTTP/1.1 200"):
            pass


# --- nesting


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


JSON = st.recursive(
    st.none() | st.text() | st.sampled_from(['[{"', "\\", '\\"[', "]]]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@given(JSON, st.integers(1, 5), st.booleans())
def test_nesting_is_counted_as_a_parser_would(value: Any, depth: int, plain: bool) -> None:
    text = json.dumps(value, ensure_ascii=plain).encode(errors="surrogatepass")
    assert nests_deeper(text, depth) == (depth_of(value) > depth)


@given(st.binary())
def test_nesting_of_anything_has_an_answer(body: bytes) -> None:
    assert nests_deeper(body, 1) in (True, False)


@pytest.mark.parametrize("path", ["/openai/v1/completions", "/v1/models/toy:predict", "/v2/models/toy/generate"])
def test_what_nests_too_deeply_is_refused_at_each_door(server: Server, path: str) -> None:
    body = b'{"model": "toy", "prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}"
    reply = server.client.post(path, content=body, headers=server.headers())
    assert reply.status_code == 400
    assert "nested deeper than 64" in reply.text
