"""The results service: durable, first wins, refuses what it cannot keep."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import BATCHED, to_binary, to_structured
from knative.eventing.store_errors import StoreError, StoreFull
from orchestrator.batches.events import RESULT, cancel_event, request_event
from orchestrator.batches.group_commit import GroupCommit
from orchestrator.batches.results_api import results_app
from orchestrator.batches.results_store import PAGE_BYTES, Cancellation, DeadLetter, Result, ResultsStore

ROOT = Path(__file__).resolve().parents[3]
HTTP = httpx.Client(timeout=60)  # one for all, since making one costs more than a request


@pytest.fixture(scope="module", autouse=True)
def _closed_client() -> Iterator[None]:
    yield
    HTTP.close()


def result_event(batch: str, custom_id: str, text: str = "t", status: int = 200, **changes: Any) -> CloudEvent:
    response = {"status_code": status, "request_id": "r", "body": {"text": text}}
    data = {"id": f"i-{custom_id}", "custom_id": custom_id, "response": response, "error": None}
    core = {"specversion": "1.0", "id": f"{custom_id}.result", "type": RESULT, "source": "/stagecraft/m"}
    extensions = {"datacontenttype": "application/json", "batch": batch, "customid": custom_id}
    return CloudEvent.build({**core, **extensions}, json.dumps(data, indent=1).encode()).changed(changes)


def post(url: str, *events: CloudEvent, path: str = "") -> httpx.Response:
    if len(events) == 1:
        headers, body = to_binary(events[0])
    else:
        headers, body = {"content-type": BATCHED}, b"[" + b",".join(event.to_json() for event in events) + b"]"
    return HTTP.post(url + path, headers=headers, content=body)


# --- over HTTP, by a process of its own


def test_the_first_result_of_a_request_stays(results_service: Any) -> None:
    for text in ("first", "second"):
        assert post(results_service.url, result_event("first-wins", "a", text)).status_code == 202
    headers, body = to_structured(result_event("first-wins", "b 🙂", "third", status=400))
    assert HTTP.post(results_service.url, headers=headers, content=body).status_code == 202
    texts = [line["response"]["body"]["text"] for line in results_service.lines("first-wins")]
    assert texts == ["first", "third"]
    counts = {"completed": 1, "failed": 1, "cancelled": 0, "dead_letters": 0, "cancelling": False}
    assert results_service.counts("first-wins") == {"batch": "first-wins", **counts}
    assert counts | {"batch": "first-wins"} in HTTP.get(f"{results_service.url}/batches").json()["batches"]


def test_readers_get_what_is_new_behind_a_number(results_service: Any) -> None:
    post(results_service.url, *(result_event("pages", f"c{number}") for number in range(5)))
    post(results_service.url, result_event("other", "x"))
    url, after, seen = f"{results_service.url}/batches/pages/results", "0", []
    for expected in (2, 2, 1, 0):
        answer = HTTP.get(url, params={"after": after, "limit": 2})
        lines = answer.text.splitlines()
        assert len(lines) == expected
        seen += [json.loads(line)["custom_id"] for line in lines]
        after = answer.headers["x-next"]
    assert seen == [f"c{number}" for number in range(5)]


def test_a_reader_waits_for_what_comes(results_service: Any) -> None:
    url = f"{results_service.url}/batches/waited-for/results"
    answers: list[httpx.Response] = []
    reader = threading.Thread(target=lambda: answers.append(HTTP.get(url, params={"wait_s": 30}, timeout=40)))
    reader.start()
    while "stagecraft_batch_readers 1.0" not in HTTP.get(f"{results_service.url}/metrics").text:
        pass
    post(results_service.url, result_event("waited-for", "a"))
    reader.join()
    assert json.loads(answers[0].text)["custom_id"] == "a"


def test_a_text_that_was_given_up_gets_a_result_too(results_service: Any) -> None:
    from functions.contract.scoring import SCORE

    core = {"specversion": "1.0", "id": "s", "source": "s", "type": SCORE, "batch": "scored", "customid": "a"}
    event = CloudEvent.build({**core, "stage": "1"}, b"{}").changed({"knativeerrorcode": 503})
    assert post(results_service.url, event, path="/dead-letters").status_code == 202
    (line,) = results_service.lines("scored")
    assert (line["custom_id"], line["error"]["code"]) == ("a", "undeliverable")


def test_dead_letters_are_kept_and_end_the_waiting_for_their_request(results_service: Any) -> None:
    errors = {"knativeerrorcode": 503, "knativeerrordest": "http://m/events", "knativeerrordata": "bm8gcm9vbQ=="}
    request = request_event("dead", "a", "m", b'{"custom_id": "a"}').changed(errors)
    late = result_event("dead", "b", **errors)
    stray = CloudEvent.build({"specversion": "1.0", "id": "1", "source": "s", "type": "t"})
    for event in (request, request, late, stray):
        assert post(results_service.url, event, path="/dead-letters").status_code == 202
    assert results_service.counts("dead") | {"batch": "", "cancelling": ""} == {
        "batch": "", "cancelling": "", "completed": 1, "failed": 1, "cancelled": 0, "dead_letters": 2
    }  # fmt: skip
    by_id = {line["custom_id"]: line for line in results_service.lines("dead")}
    assert by_id["a"]["error"]["code"] == "undeliverable"
    assert "http://m/events answered 503. no room" in by_id["a"]["error"]["message"]
    assert by_id["b"]["response"]["status_code"] == 200
    told = [json.loads(line) for line in HTTP.get(f"{results_service.url}/batches/dead/dead-letters").text.splitlines()]
    assert [(one["custom_id"], one["error_code"], one["error_data"]) for one in told] == [
        ("a", "503", "no room"),
        ("b", "503", "no room"),
    ]


def test_a_batch_can_be_cancelled_and_deleted(results_service: Any) -> None:
    post(results_service.url, cancel_event("gone"))
    assert results_service.counts("gone")["cancelling"] is True
    post(results_service.url, *(result_event("gone", f"c{number}") for number in range(1500)))
    post(results_service.url, result_event("stays", "a"))
    assert HTTP.delete(f"{results_service.url}/batches/gone").status_code == 204
    assert HTTP.get(f"{results_service.url}/batches/gone").status_code == 404
    assert results_service.lines("gone") == []
    assert len(results_service.lines("stays")) == 1


def of_data(data: bytes) -> CloudEvent:
    """A result event without the extension customid."""
    return CloudEvent(result_event("x", "a").changed({"customid": None}).attributes, data)


NO_EXTENSION = result_event("x", "a").changed({"batch": None})


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (NO_EXTENSION, "no extension batch"),
        (result_event("x", "a", type="other"), "has type other"),
        (request_event("x", "a", "m", b"{}"), "has type dev.stagecraft.batch.request.v1"),
        (result_event("x", "a", customid="b"), "customid is not the custom_id"),
        (CloudEvent(result_event("x", "a").attributes, b"{}"), "not a line of a batch output"),
        (CloudEvent(result_event("x", "a").attributes, b"\xff"), "not a line of a batch output"),
        (of_data(b'{"custom_id": "\\ud800", "response": {"status_code": 200}}'), "not a line of a batch output"),
        (of_data(b'{"custom_id": "a", "response": {"status_code": 1e999}}'), "not a line of a batch output"),
    ],
)
def test_what_is_no_result_is_refused_and_not_tried_again(results_service: Any, event: CloudEvent, words: str) -> None:
    answer = post(results_service.url, event)
    assert (answer.status_code, words in answer.json()["error"]) == (400, True), answer.text
    assert HTTP.get(f"{results_service.url}/batches/x").status_code == 404


def test_one_wrong_event_keeps_out_its_whole_request(results_service: Any) -> None:
    answer = post(results_service.url, result_event("all-or-none", "a"), result_event("all-or-none", "b", type="t"))
    assert answer.status_code == 400
    assert HTTP.get(f"{results_service.url}/batches/all-or-none").status_code == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [("/batches/none", 404), ("/batches/none/results", 200), ("/batches/x/results?after=-1", 400),
     ("/batches/x/results?wait_s=nan", 400), ("/batches/x/results?limit=x", 400), ("/nowhere", 404),
     ("/healthz", 200), ("/readyz", 200)],
)  # fmt: skip
def test_answers_to_readers(results_service: Any, path: str, status: int) -> None:
    assert HTTP.get(results_service.url + path).status_code == status


def test_not_an_event_at_all(results_service: Any) -> None:
    assert HTTP.post(results_service.url, content=b"hello").status_code == 400
    assert HTTP.get(results_service.url).status_code == 405


def test_accepted_results_survive_a_kill(own_results_service: Any) -> None:
    service = own_results_service
    accepted: list[str] = []
    for round_ in range(1, 4):
        killer = threading.Thread(target=kill_after, args=(service, accepted, 15 * round_))
        killer.start()
        with suppress(httpx.TransportError):
            while True:
                custom_id = f"c{round_}-{len(accepted)}"
                if post(service.url, result_event("b", custom_id)).status_code == 202:
                    accepted.append(custom_id)
        killer.join()
        service.start()
    kept = [line["custom_id"] for line in service.lines("b")]
    assert set(accepted) <= set(kept)
    assert len(kept) <= len(accepted) + 3  # at most the one that was in the air at each kill
    assert service.counts("b")["completed"] == len(kept)


def kill_after(service: Any, accepted: list[str], count: int) -> None:
    while len(accepted) < count:
        pass
    service.end(signal.SIGKILL)


def test_a_signal_ends_it_although_a_reader_waits(own_results_service: Any) -> None:
    service = own_results_service
    answers: list[int] = []
    url = f"{service.url}/batches/b/results?wait_s=60"
    reader = threading.Thread(target=lambda: answers.append(HTTP.get(url, timeout=90).status_code))
    reader.start()
    while "stagecraft_batch_readers 1.0" not in HTTP.get(f"{service.url}/metrics").text:
        pass
    assert service.end() == 0
    reader.join()
    assert answers == [200]


# --- its start


def run_server(**environment: str) -> subprocess.CompletedProcess[str]:
    """A start that is meant to fail."""
    env = {"PATH": os.environ["PATH"], "HOST": "127.0.0.1", **environment}
    argv = [sys.executable, "-m", "orchestrator.batches.server"]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_a_newer_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "r.sqlite"
    ResultsStore(file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 2")
        db.commit()
    before = file.read_bytes()
    done = run_server(RESULTS_FILE=str(file), PORT="0")
    assert done.returncode == 2
    assert "has version 2, this program knows version 1" in done.stderr
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello, this is no database" * 100, None])
def test_a_file_of_another_program_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "r.sqlite"
    if content is None:
        with closing(sqlite3.connect(file)) as db:
            db.execute("CREATE TABLE mine (x)")
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(StoreError):
        ResultsStore(file)
    assert file.read_bytes() == before


def test_without_the_folder_named_it_uses_the_state_folder(tmp_path: Path) -> None:
    from orchestrator.batches.server import SettingError, read_settings

    missing = {"RESULTS_FILE": "/nowhere/at/all/r.sqlite", "XDG_STATE_HOME": str(tmp_path), "K_SERVICE": "m-results"}
    settings = read_settings(missing)
    assert settings.file == tmp_path / "stagecraft" / "results" / "m-results.sqlite"
    assert settings.file.parent.is_dir()
    there = {"RESULTS_FILE": str(tmp_path / "r.sqlite"), "PORT": "1234", "HOST": "::1"}
    settings = read_settings(there)
    assert (settings.file, settings.port, settings.host) == (tmp_path / "r.sqlite", 1234, "::1")
    with pytest.raises(SettingError, match="PORT must be a number"):
        read_settings({"PORT": "http"})


def test_a_taken_port_is_told(results_service: Any, tmp_path: Path) -> None:
    done = run_server(RESULTS_FILE=str(tmp_path / "r.sqlite"), PORT=str(results_service.port))
    assert done.returncode == 3
    assert "choose another PORT" in done.stderr
    assert "Traceback" not in done.stderr


# --- the file


def a_result(number: int, size_bytes: int = 10) -> Result:
    return Result("b", f"c{number}", "completed", b"x" * size_bytes)


def test_two_processes_may_have_the_file_open_for_a_while(tmp_path: Path) -> None:
    one, other = ResultsStore(tmp_path / "r.sqlite"), ResultsStore(tmp_path / "r.sqlite")
    assert one.add([a_result(1)]) == [True]
    assert other.add([a_result(1), a_result(2)]) == [False, True]
    assert len(one.results("b", 0, 10)[0]) == 2
    one.close()
    other.close()


def test_numbers_are_not_used_again_after_a_deletion(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "r.sqlite")
    store.add([a_result(1), a_result(2), DeadLetter("b", "k", {}, b"")])
    _, last = store.results("b", 0, 10)
    while store.delete_some("b"):
        pass
    assert store.batches() == []
    store.add([a_result(3)])
    assert len(store.results("b", last, 10)[0]) == 1
    store.close()


def test_a_page_of_long_lines_is_short(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "r.sqlite")
    store.add([a_result(number, PAGE_BYTES // 2 + 1) for number in range(4)])
    lines, last = store.results("b", 0, 1000)
    assert len(lines) == 2
    assert len(store.results("b", last, 1000)[0]) == 2
    assert store.add([Cancellation("b"), Cancellation("b")]) == [True, False]  # nothing holds the file
    store.close()


def fill(store: ResultsStore) -> None:
    """As on a full disk: the file cannot grow."""
    store._db.execute("PRAGMA max_page_count = 40")


async def test_a_full_disk_refuses_what_comes_and_loses_nothing(tmp_path: Path) -> None:
    file = ResultsStore(tmp_path / "r.sqlite")
    fill(file)
    store = GroupCommit(file)
    transport = httpx.ASGITransport(results_app(store))
    async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
        accepted, status = [], 202
        while status == 202:
            custom_id = f"c{len(accepted)}"
            headers, body = to_binary(result_event("b", custom_id, "x" * 5000))
            answer = await http.post("/", headers=headers, content=body)
            if (status := answer.status_code) == 202:
                accepted.append(custom_id)
        assert status == 507
        assert answer.headers["retry-after"] == "5"
        assert "no room" in answer.json()["error"]
        kept = (await http.get("/batches/b/results")).text.splitlines()
        assert [json.loads(line)["custom_id"] for line in kept] == accepted
        assert len(accepted) > 3
        file._db.execute("PRAGMA max_page_count = 4000")
        assert (await http.post("/", headers=headers, content=body)).status_code == 202
        assert 'stagecraft_batch_refused_events_total{status="507"} 1.0' in (await http.get("/metrics")).text
    await store.close()


def test_want_of_room_is_an_error_of_its_own(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "r.sqlite")
    fill(store)
    with pytest.raises(StoreFull):
        store.add([a_result(1, 1 << 20)])
    assert store.counts("b") is None
    store.close()
