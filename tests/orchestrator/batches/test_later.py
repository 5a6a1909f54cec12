"""Mode `later` from end to end: a channel that holds, an orchestrator that is killed, results at a sink."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from knative.eventing.http_binding import to_binary
from orchestrator.batch_requests import question, read_request
from orchestrator.batches.events import request_event

JOBS = 60
KILLED_AT = 20
BATCH = "batch-later"
BROKER = "http://broker-ingress.knative-eventing.svc.cluster.local/default/default"
REQUESTS_TRIGGER = "trigger-batch-requests.yaml"
WAIT_S = 120.0  # against hangs


def stagecraft(*arguments: object) -> None:
    from orchestrator.cli import app

    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.stderr


def line(number: int) -> dict[str, Any]:
    body = {"model": "demo", "prompt": f"ROMEO {number}:", "max_tokens": 8, "temperature": number % 2 * 0.8}
    return {"custom_id": f"job-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def event(number: int) -> Any:
    return request_event(BATCH, f"job-{number}", "demo", json.dumps(line(number)).encode())


def rendered(folder: Path, events_file: Path) -> Path:
    """Without the Trigger of requests: the channel delivers them itself."""
    stagecraft("plan", "demo", "--stages", 2, "-o", folder / "plan.yaml")
    settings = {"EVENTS": "later", "EVENTS_FILE": events_file, "EVENTS_SINK": BROKER}
    env = [text for name, value in settings.items() for text in ("--env", f"ORCHESTRATOR_{name}={value}")]
    stagecraft(
        "render", folder / "plan.yaml", "-o", folder / "deploy", "--batch", "--orchestrator-as", "knative",
        "--cpu", "1", "--min-scale", 1, "--image-registry", "registry.example/acme", "--kv-memory", "64MiB",
        "--window", "6s", *env,
    )  # fmt: skip
    (folder / "deploy" / REQUESTS_TRIGGER).unlink()
    return folder / "deploy"


@pytest.mark.slow
def test_what_a_channel_was_told_is_taken_has_one_result_each(
    start_platform: Callable[..., Any], tmp_path: Path
) -> None:
    platform = start_platform("platform", "local", "start", "--name", "later", "--drain-quiet", "0s")
    stagecraft("local", "apply", "-f", rendered(tmp_path, tmp_path / "requests.sqlite"))

    def kill() -> None:
        os.kill(platform.pids("demo")[0], signal.SIGKILL)

    def deliver(http: httpx.Client, number: int) -> None:
        """As a channel that has one delivery at a time, and repeats it until it is taken."""
        headers, body = to_binary(event(number))
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = http.post(f"{platform.url}/default/demo/events", headers=headers, content=body)
            if answer.status_code == 202:
                assert answer.content == b""  # no result: that comes later
                return
            assert answer.status_code >= 429, answer.text
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.1)

    with httpx.Client(timeout=WAIT_S) as http:
        for number in range(JOBS):
            deliver(http, number)
            if number == KILLED_AT:
                kill()
        kill()  # what was acknowledged is on the disk
        results = collected(http, f"{platform.url}/default/demo-results/batches/{BATCH}/results?limit=1000&wait_s=1")
        for number in range(0, JOBS, 7):
            path, body = question(read_request(event(number), 0))
            expected = http.post(f"{platform.url}/default/demo/openai{path}", json=body).json()
            assert results[f"job-{number}"]["body"]["choices"] == expected["choices"]
    assert results.keys() == {f"job-{number}" for number in range(JOBS)}
    assert {response["status_code"] for response in results.values()} == {200}
    assert platform.end() == 0


def collected(http: httpx.Client, url: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_S
    while True:
        lines = [json.loads(text) for text in http.get(url).content.splitlines()]
        if len(lines) >= JOBS:
            break
        assert time.monotonic() < deadline, f"{len(lines)} results"
    responses = {one["custom_id"]: one["response"] for one in lines}
    assert len(responses) == len(lines)
    return responses
