"""A batch while everything that works on it is killed again and again: the processes are real, so is SIGKILL.

A kill comes a moment after so many requests are answered, as a seed says. The seed is printed; to repeat a run:

    STAGECRAFT_KILLS_SEED=123 make test-slow TESTS=tests/orchestrator/batches/test_kills.py
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.batches.events import REQUEST
from orchestrator.batches.job import Teller, work
from orchestrator.batches.journal import Journal, State, read_state

JOBS = 2000
WRONG_LINES = 5  # answered 400 by the model
WRONG_EVENTS = 5  # which nobody can answer
VICTIMS = ("tiny", "tiny-stage-0", "tiny-stage-1", "tiny-results", "platform", "client")
ROUNDS = 4  # each victim once in each: one that is killed thrice in a row would be started again after 20 s only
DELAY_S_MAX = 0.5
WAIT_S = 300.0  # against hangs
TEST_S = 1200  # on a machine that is busy with other things


def line(number: int) -> dict[str, Any]:
    """Completions and chats, greedy and sampled, with and without a seed."""
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 4 + number % 16, "temperature": number % 3 * 0.7}
    if number % 7 == 0:
        body["seed"] = number
    if number % 400 == 9:
        body["prompt"] = "too long " * 100
    elif number % 5 == 0:
        body["messages"] = [{"role": "user", "content": f"question {number}"}]
    else:
        body["prompt"] = f"To be {number}"
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": f"job-{number}", "method": "POST", "url": url, "body": body}


def results(path: Path) -> dict[str, Any]:
    """By custom_id, each once; without the times, which are those of the requests' arrival.

    Lines are those of bytes: a random model may say U+0085, at which Python's splitlines ends a line of text."""
    lines = [json.loads(text) for text in path.read_bytes().splitlines()]
    for one in lines:
        one["response"]["body"].pop("created", None)
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


@dataclass
class Client:
    """`stagecraft batch`: killed and gone on with."""

    env: dict[str, str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> Path:
        return self.folder / "results.jsonl"

    @property
    def journal(self) -> Path:
        return self.folder / "results.jsonl.batch"

    @property
    def state(self) -> State:
        return read_state(self.journal)

    def run(self, *arguments: object) -> None:
        argv = [sys.executable, "-m", "orchestrator.cli", "batch", *map(str, arguments)]
        with (self.folder / "client.stderr").open("ab") as log:
            self.process = subprocess.Popen(argv, env=self.env, stderr=log)

    def wait_for_batch(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.journal.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.run("resume", self.output)


@dataclass
class Killer:
    """Kills what `moments` say: (requests that are answered, seconds after that, what)."""

    platform: Any
    client: Client
    moments: list[tuple[int, float, str]]
    kills: Counter[str] = field(default_factory=Counter)

    def go(self) -> None:
        for answered, delay_s, what in self.moments:
            self._wait_until(lambda answered=answered: self._answered() >= answered)
            time.sleep(delay_s)
            assert self._answered() < JOBS, (
                f"nothing was left to be done after {self.kills}; more tokens, or less kills"
            )
            self._kill(what)
            self.kills[what] += 1

    def _answered(self) -> int:
        if not self.client.state.all_sent:
            return 0
        depths = {one["name"]: one["waiting"] for one in self.platform.status()["triggers"]}
        return JOBS - depths["tiny-batch-requests"]

    def _kill(self, what: str) -> None:
        if what == "client":
            self.client.kill()
        elif what == "platform":
            self.platform.end(signal.SIGKILL)
            self.platform.start()
        else:
            self._wait_until(lambda: self.platform.pids(what))
            os.kill(self.platform.pids(what)[0], signal.SIGKILL)

    def _wait_until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert self.client.process.poll() is None, f"the client ended with {self.client.process.poll()}"
            assert self.platform.process.poll() is None, self.platform.log.read_text()
            assert time.monotonic() < deadline, f"stuck after {self.kills}: {self.platform.status()}"
            time.sleep(0.02)


def moments(seed: int) -> list[tuple[int, float, str]]:
    chance = random.Random(seed)
    victims = [what for _ in range(ROUNDS) for what in chance.sample(VICTIMS, len(VICTIMS))]
    counts = sorted(chance.randrange(JOBS * 9 // 10) for _ in victims)
    return [(count, chance.uniform(0, DELAY_S_MAX), what) for count, what in zip(counts, victims, strict=True)]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line(number)) + "\n" for number in range(JOBS)))
    return path


@pytest.fixture
def client(batch_platform: Callable[..., Any], tmp_path: Path) -> Iterator[Client]:
    made = Client(dict(os.environ), tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def undisturbed(platform: Any, job_file: Path, batch: str, output: Path) -> dict[str, Any]:
    """Of a batch with the same id: seeds come out of it."""
    state = State(
        batch, str(job_file), job_file.stat().st_size, str(output), platform.facts["broker"], platform.facts["results"],
        "tiny", time.time(),
    )  # fmt: skip
    quiet = Teller(lambda text: None, lambda bad: None, lambda failed: None, lambda state: None)
    with Journal.create(output.with_name(output.name + ".batch"), state) as journal:
        asyncio.run(work(journal, quiet, wait=True, cancel_wanted=lambda: False))
    return results(output)


def send_wrong_events(platform: Any, batch: str) -> None:
    headers = {
        "ce-specversion": "1.0",
        "ce-type": REQUEST,
        "ce-source": "/tests",
        "ce-batch": batch,
        "ce-model": "tiny",
    }
    for number in range(WRONG_EVENTS):
        sent = {**headers, "ce-id": f"wrong-{number}", "content-type": "application/json"}
        assert httpx.post(platform.facts["broker"], headers=sent, content=b'{"no": "custom_id"}').status_code == 202


def dead_letters(platform: Any, batch: str) -> list[dict[str, Any]]:
    """Waits until nothing is left to be delivered."""
    deadline = time.monotonic() + WAIT_S
    while any(one["waiting"] or one["dead_letters_waiting"] for one in platform.status()["triggers"]):
        assert time.monotonic() < deadline, platform.status()["triggers"]
        time.sleep(0.1)
    body = httpx.get(f"{platform.facts['results']}/batches/{batch}/dead-letters?limit=10000", timeout=WAIT_S).content
    return [json.loads(one) for one in body.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(TEST_S)
def test_every_job_has_its_one_result_whatever_is_killed(
    batch_platform: Callable[..., Any], client: Client, job_file: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("STAGECRAFT_KILLS_SEED") or secrets.randbelow(1 << 32))
    print(f"STAGECRAFT_KILLS_SEED={seed} repeats these kills: {moments(seed)}")
    platform = batch_platform("disturbed")
    begun_s = time.monotonic()
    client.run("submit", job_file, "-o", client.output)
    killer = Killer(platform, client, moments(seed))
    client.wait_for_batch()
    batch = client.state.batch
    send_wrong_events(platform, batch)
    killer.go()
    assert client.process is not None
    assert client.process.wait(WAIT_S) == 0
    print(f"{sum(killer.kills.values())} kills in {time.monotonic() - begun_s:.0f} s: {dict(killer.kills)}")

    assert sum(killer.kills.values()) >= 20
    given_up = dead_letters(platform, batch)
    assert sorted(one["id"] for one in given_up) == [f"wrong-{number}" for number in range(WRONG_EVENTS)], given_up
    disturbed = results(client.output)
    assert disturbed.keys() == {f"job-{number}" for number in range(JOBS)}
    assert Counter(one["response"]["status_code"] for one in disturbed.values()) == {
        200: JOBS - WRONG_LINES,
        400: WRONG_LINES,
    }
    platform.end()
    assert undisturbed(batch_platform("undisturbed"), job_file, batch, tmp_path / "undisturbed.jsonl") == disturbed
