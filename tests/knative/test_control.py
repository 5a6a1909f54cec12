"""The control API over a real socket, asked by the client that the commands use; the platform behind it is a list."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from knative import registry
from knative.client import Applied, Client
from knative.control import control_api
from knative.errors import KnativeError, NotFound, Unavailable, ValidationError
from knative.log_lines import log_lines
from knative.registry import Entry
from knative.resources.documents import Document, parse_documents

T = TypeVar("T")
Ask = Callable[[Callable[[Client], T]], Awaitable[T]]

YAML = """
kind: ConfigMap
apiVersion: v1
metadata: {name: first}
data: {on: "yes"}
---
kind: ConfigMap
apiVersion: v1
metadata:
  name: second
"""


@dataclass(frozen=True)
class Log:
    pod: str
    restart: int
    path: Path


@dataclass
class Objects:
    """Takes every document and keeps it; raises `trouble` if there is any."""

    url: str = "http://127.0.0.1:1"
    documents: list[Document] = field(default_factory=list)
    log_files: list[Log] = field(default_factory=list)
    asked_for_logs: int = 0
    trouble: Exception | None = None

    async def apply(self, documents: Sequence[Document], *, dry_run: bool = False) -> list[Applied]:
        self._fail()
        if not dry_run:
            self.documents += documents
        return [Applied("configmap", "default", self._name(document), "created", "note") for document in documents]

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        kept = [document for document in self.documents if self._name(document) != name]
        if len(kept) == len(self.documents):
            raise NotFound(f"{kind} {namespace}/{name} not found")
        self.documents = kept

    def get(self, kind: str, namespace: str | None) -> list[dict[str, Any]]:
        self._fail()
        return [{"kind": kind, "of": namespace, **document.value} for document in self.documents]

    def logs(self, namespace: str, name: str) -> list[Log]:
        self.asked_for_logs += 1
        if not self.log_files:
            raise NotFound(f"no {namespace}/{name}")
        return self.log_files

    def status(self) -> dict[str, Any]:
        return {"revisions": []}

    def metrics(self) -> bytes:
        return b"up 1\n"

    def _name(self, document: Document) -> str:
        return str(document.value["metadata"]["name"])  # type: ignore[index]  # the tests' own manifests

    def _fail(self) -> None:
        if self.trouble is not None:
            raise self.trouble


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGECRAFT_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
async def entry(objects: Objects, tmp_path: Path) -> AsyncIterator[Entry]:
    async with control_api(objects, "tests", tmp_path) as entry:
        yield entry


@pytest.fixture
def ask(entry: Entry) -> Ask[Any]:
    """Lets a thread ask, while this one answers."""

    def asked(question: Callable[[Client], T]) -> T:
        with Client(entry.socket) as client:
            return question(client)

    return lambda question: asyncio.to_thread(asked, question)


async def test_documents_arrive_as_they_were_written(ask: Ask[Any], objects: Objects) -> None:
    sent = parse_documents(YAML, "maps.yaml")
    applied = await ask(lambda client: client.apply(sent))
    assert objects.documents == sent
    assert [document.place("metadata.name") for document in objects.documents] == ["maps.yaml:4", "maps.yaml:10"]
    assert applied == [Applied("configmap", "default", name, "created", "note") for name in ("first", "second")]


async def test_a_dry_run_is_passed_on(ask: Ask[Any], objects: Objects) -> None:
    assert len(await ask(lambda client: client.apply(parse_documents(YAML, "a"), dry_run=True))) == 2
    assert objects.documents == []


async def test_all_problems_of_a_refused_manifest_come_back(ask: Ask[Any], objects: Objects) -> None:
    objects.trouble = ValidationError(["a.yaml:1: first", "a.yaml:2: second"])
    with pytest.raises(ValidationError) as caught:
        await ask(lambda client: client.apply([]))
    assert caught.value.problems == ("a.yaml:1: first", "a.yaml:2: second")


@pytest.mark.parametrize("error", [NotFound("no such thing"), Unavailable("full"), KnativeError("odd")])
async def test_an_error_of_the_platform_is_the_same_at_the_client(
    ask: Ask[Any], objects: Objects, error: KnativeError
) -> None:
    objects.trouble = error
    with pytest.raises(type(error), match=f"^{error}$") as caught:
        await ask(lambda client: client.get("service"))
    assert type(caught.value) is type(error)


async def test_a_mistake_of_the_platform_is_told_without_a_trace(ask: Ask[Any], objects: Objects) -> None:
    objects.trouble = ZeroDivisionError("by zero")
    with pytest.raises(KnativeError, match=r"the platform failed at GET /objects/service: ZeroDivisionError"):
        await ask(lambda client: client.get("service"))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"documents": [1]}', b'{"documents": [{"file": "a", "line": 1, "value": []}]}']
)
async def test_a_body_that_holds_no_documents_is_refused(entry: Entry, objects: Objects, body: bytes) -> None:
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(entry.socket))) as http:
        answer = await http.post("http://platform/apply", content=body)
    assert answer.status_code == 400
    assert answer.json()["problems"] == ["expected a JSON object with documents, each with file, line, value"]
    assert objects.documents == []


async def test_objects_are_listed_by_kind_and_namespace(ask: Ask[Any]) -> None:
    await ask(lambda client: client.apply(parse_documents(YAML, "a")[:1]))
    items = await ask(lambda client: client.get("configmap", "other"))
    assert [(item["of"], item["metadata"], item["data"]) for item in items] == [
        ("other", {"name": "first"}, {"on": "yes"})
    ]
    assert (await ask(lambda client: client.get("pod")))[0]["of"] is None
    with pytest.raises(NotFound, match="no kind 'secret'"):
        await ask(lambda client: client.get("secret"))


async def test_a_deleted_object_is_gone_and_a_missing_one_is_an_error(ask: Ask[Any], objects: Objects) -> None:
    await ask(lambda client: client.apply(parse_documents(YAML, "a")))
    await ask(lambda client: client.delete("configmap", "default", "first"))
    assert len(objects.documents) == 1
    with pytest.raises(NotFound, match="configmap de/fault/a b not found"):
        await ask(lambda client: client.delete("configmap", "de/fault", "a b"))


async def test_status_and_metrics_are_passed_on(ask: Ask[Any]) -> None:
    assert await ask(lambda client: client.status()) == {"revisions": []}
    assert await ask(lambda client: client.metrics()) == b"up 1\n"


async def test_a_platform_can_be_found_while_it_answers(entry: Entry) -> None:
    found = await asyncio.to_thread(registry.find)
    assert (found, found.name, found.url, found.pid) == (entry, "tests", "http://127.0.0.1:1", os.getpid())
    assert entry.socket.stat().st_mode & 0o777 == 0o600


# httpcore leaves a socket that could not connect to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_nothing_is_left_at_the_end(objects: Objects, runtime: Path) -> None:
    async with control_api(objects, "short", runtime) as entry:
        pass
    assert os.listdir(runtime) == ["lock"]
    with pytest.raises(Unavailable, match="the platform ended"), Client(entry.socket) as client:
        client.status()


def test_asking_reads_no_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket of this machine needs none, and reading them takes longer than most questions."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with Client(tmp_path / "socket"):
        pass


async def test_a_second_platform_of_the_name_leaves_the_first_alone(
    entry: Entry, objects: Objects, runtime: Path
) -> None:
    with pytest.raises(registry.RegistryError, match="'tests' runs already"):
        async with control_api(objects, "tests", runtime):
            pass
    assert await asyncio.to_thread(registry.entries) == [entry]
    assert len([name for name in os.listdir(runtime) if name.endswith(".sock")]) == 1


async def test_logs_are_those_of_each_pods_newest_process(ask: Ask[Any], objects: Objects, tmp_path: Path) -> None:
    objects.log_files = [
        write(tmp_path, "a", 0, "old\n"),
        write(tmp_path, "a", 1, "one\ntwo\nthree"),
        write(tmp_path, "b", 0, "bee\rbee\n"),
    ]
    assert await ask(lambda client: text_of(client.logs("default", "demo"))) == (
        "[a] one\n[a] two\n[a] three\n[b] bee\rbee\n"
    )
    assert await ask(lambda client: text_of(client.logs("default", "demo", tail=1))) == "[a] three\n[b] bee\rbee\n"
    assert await ask(lambda client: text_of(client.logs("default", "demo", tail=0))) == ""
    assert await ask(lambda client: text_of(client.logs("default", "demo", previous=True))) == "[a] old\n"


async def test_a_missing_log_is_an_error_not_an_empty_text(ask: Ask[Any], objects: Objects, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no default/demo"):
        await ask(lambda client: text_of(client.logs("default", "demo")))
    objects.log_files = [write(tmp_path, "a", 0, "one\n")]
    with pytest.raises(NotFound, match="none has been restarted"):
        await ask(lambda client: text_of(client.logs("default", "demo", previous=True)))


async def test_followed_logs_go_on_with_new_lines_and_new_processes(objects: Objects, tmp_path: Path) -> None:
    first = write(tmp_path, "a", 0, "one\ntw")
    objects.log_files = [first]
    async with aclosing(log_lines(lambda: objects.logs("default", "demo"), follow=True)) as lines:
        assert await next_text(lines) == b"[a] one\n"
        with first.path.open("a") as stream:
            stream.write("o\nlast words")
        assert await next_text(lines) == b"[a] two\n"
        objects.log_files = [first, write(tmp_path, "a", 1, "again\n")]
        assert await next_text(lines) == b"[a] last words\n"
        assert await next_text(lines) == b"[a] again\n"
        objects.log_files = []
        assert [text async for text in lines if text] == []


async def test_following_ends_when_the_client_goes(entry: Entry, objects: Objects, tmp_path: Path) -> None:
    objects.log_files = [write(tmp_path, "a", 0, "one\n")]
    reader, writer = await asyncio.open_unix_connection(entry.socket)
    writer.write(b"GET /logs/default/demo?follow=1 HTTP/1.1\r\nHost: platform\r\n\r\n")
    await reader.readuntil(b"[a] one\n")
    writer.close()
    await writer.wait_closed()
    while True:  # until it no longer asks for new processes
        asked = objects.asked_for_logs
        await asyncio.sleep(0.6)
        if objects.asked_for_logs == asked:
            break


async def test_the_end_of_the_platform_ends_those_who_follow(objects: Objects, tmp_path: Path) -> None:
    objects.log_files = [write(tmp_path, "a", 0, "one\n")]
    async with control_api(objects, "short", tmp_path) as entry:
        reader, writer = await asyncio.open_unix_connection(entry.socket)
        writer.write(b"GET /logs/default/demo?follow=1 HTTP/1.1\r\nHost: platform\r\n\r\n")
        await reader.readuntil(b"[a] one\n")
    assert (await reader.read()).endswith(b"0\r\n\r\n")
    writer.close()
    await writer.wait_closed()


def test_a_tail_is_right_however_long_the_lines(tmp_path: Path) -> None:
    lines = [f"{index}:{'x' * (30_000 * (index % 4))}\n" for index in range(12)]
    file = write(tmp_path, "p", 0, "".join(lines))
    for count in range(14):
        expected = "".join(lines[12 - min(count, 12) :])
        assert asyncio.run(all_text(file, count)).replace(b"[p] ", b"").decode() == expected


def test_a_line_without_end_comes_in_pieces(tmp_path: Path) -> None:
    text = asyncio.run(all_text(write(tmp_path, "p", 0, "y" * 3_000_000), None))
    assert text.replace(b"[p] ", b"").replace(b"\n", b"") == b"y" * 3_000_000
    assert len(text.splitlines()) == 3


def write(folder: Path, pod: str, restart: int, text: str) -> Log:
    path = folder / f"{pod}.{restart}.log"
    path.write_bytes(text.encode())
    return Log(pod, restart, path)


def text_of(parts: Iterator[str]) -> str:
    return "".join(parts)


async def next_text(lines: AsyncIterator[bytes]) -> bytes:
    async for text in lines:
        if text:
            return text
    raise AssertionError("the log ended")


async def all_text(file: Log, tail: int | None) -> bytes:
    return b"".join([part async for part in log_lines(lambda: [file], tail=tail)])
