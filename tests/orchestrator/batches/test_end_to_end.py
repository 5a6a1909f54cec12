"""`stagecraft up --batch` and `stagecraft batch submit` with real stages: from lines to results, and back to zero."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.batch_requests import question, read_request
from orchestrator.batches.events import request_event

WAIT_S = 120.0  # against hangs


def body(number: int) -> dict[str, Any]:
    """Completions and chats; greedy, sampled with a seed and without one."""
    what: dict[str, Any] = {"model": "tiny", "max_tokens": 4 + number % 5, "temperature": number % 3 * 0.8}
    if number % 3 == 1:
        what["seed"] = number
    if number % 2:
        return {**what, "messages": [{"role": "user", "content": f"question {number}"}]}
    return {**what, "prompt": f"To be {number}", "n": 1 + number % 4 // 2}


def line(number: int) -> dict[str, Any]:
    url = "/v1/chat/completions" if number % 2 else "/v1/completions"
    return {"custom_id": f"ünï {number}", "method": "POST", "url": url, "body": body(number)}


GOOD = {one["custom_id"]: one for one in map(line, range(46))}
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "too long": ({"prompt": "long " * 100}, 400, "context_length_exceeded"),
    "unknown parameter": ({"prompt": "a", "colour": 1}, 400, "unknown_parameter"),
    "wrong value": ({"prompt": "a", "temperature": -1}, 400, "invalid_value"),
    "streamed": ({"prompt": "a", "stream": True}, 400, "unsupported_parameter"),
    "no prompt": ({}, 400, "missing_parameter"),
}
BAD = {  # by what is wrong: lines that are not sent
    "invalid_json_line": "{no json",
    "missing_required_parameter": json.dumps({"method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}),
    "duplicate_custom_id": json.dumps(GOOD["ünï 2"]),
    "invalid_url": json.dumps({**GOOD["ünï 2"], "custom_id": "url", "url": "/v1/embeddings"}),
    "mismatched_model": json.dumps({"model": "other", "prompt": "a"}),
}


def refused_line(name: str) -> dict[str, Any]:
    wrong = {"model": "tiny", **REFUSED[name][0]}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": wrong}


@pytest.fixture
def line_file(tmp_path: Path) -> Path:
    """60 lines and a blank one: the good, the bad among them, and plain ones."""
    good = [json.dumps(one) for one in GOOD.values()]
    plain = [json.dumps({"prompt": f"plain {number}", "max_tokens": 3}) for number in range(4)]
    refused = [json.dumps(refused_line(name)) for name in REFUSED]
    lines = [*good[:20], *BAD.values(), "", *plain, *good[20:], *refused]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def interactive(url: str, answers: list[int], stop: threading.Event) -> None:
    """Asks as people do, one question after the other."""
    while not stop.wait(0.2):
        asked = {"model": "tiny", "prompt": "now", "max_tokens": 3, "temperature": 0}
        answers.append(httpx.post(f"{url}/openai/v1/completions", json=asked, timeout=WAIT_S).status_code)


def by_endpoint(http: httpx.Client, url: str, batch: str, one: dict[str, Any]) -> dict[str, Any]:
    """What the endpoint answers for the same body with the seed that the batch used."""
    event = request_event(batch, one["custom_id"], "tiny", json.dumps(one).encode())
    path, asked = question(read_request(event, 0))
    answer = http.post(f"{url}/openai{path}", json=asked)
    return without_names({"status_code": answer.status_code, "body": answer.json()})


def without_names(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what is never the same: ids and times."""
    response = {**response, "body": {**response["body"]}}
    response.pop("request_id", None)
    for name in ("id", "created"):
        response["body"].pop(name, None)
    return response


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_batch_from_its_lines_to_its_results(
    batch_platform: Callable[..., Any], batch: Callable[..., Any], line_file: Path, tmp_path: Path
) -> None:
    platform = batch_platform("platform", "--window", "6s", "--grace", "1s")
    answers: list[int] = []
    stop = threading.Event()
    person = threading.Thread(target=interactive, args=(platform.url, answers, stop))
    person.start()
    try:
        output = tmp_path / "results.jsonl"
        done = batch("submit", line_file, "-o", output, "--json")
    finally:
        stop.set()
        person.join()
    assert done.code == 1, done.err  # as lines were left out
    assert set(answers) == {200}

    lines = [json.loads(text) for text in output.read_bytes().splitlines()]
    responses = {one["custom_id"]: one["response"] for one in lines}
    plain = {f"line-{number:06}" for number in range(27, 31)}
    assert sorted(responses) == sorted(one["custom_id"] for one in lines)
    assert responses.keys() == GOOD.keys() | REFUSED.keys() | plain
    assert [one["error"] for one in lines] == [None] * len(lines)

    name = done.json["batch"]
    with httpx.Client(timeout=WAIT_S) as http, ThreadPoolExecutor(8) as people:
        expected = people.map(lambda one: by_endpoint(http, platform.url, name, one), GOOD.values())
        for custom_id, response in zip(GOOD, expected, strict=True):
            assert response["status_code"] == 200
            assert without_names(responses[custom_id]) == response, custom_id
    for wrong, (_, status, code) in REFUSED.items():
        assert (responses[wrong]["status_code"], responses[wrong]["body"]["error"]["code"]) == (status, code)
    assert [responses[one]["status_code"] for one in plain] == [200] * 4

    errors = [json.loads(text) for text in Path(done.json["errors"]).read_bytes().splitlines()]
    assert [one["error"]["code"] for one in errors] == list(BAD)
    for number in range(21, 26):
        assert f"line {number}" in done.err
    assert (done.json["sent"], done.json["completed"], done.json["failed"], done.json["bad_lines"]) == (55, 50, 5, 5)
    told: dict[str, Any] = {"service": None}
    while told["service"] is None:  # it may have gone to zero, and `status` does not wait for it for ever
        told = batch("status", output, "--json").json
    assert told["service"] == {
        "batch": name, "completed": 50, "failed": 5, "cancelled": 0, "dead_letters": 0, "cancelling": False,
    }  # fmt: skip
    assert told["dead_letters"] == []
    wait_until(lambda: not any(one["pods"] for one in platform.status()["revisions"]))
    assert platform.end() == 0
