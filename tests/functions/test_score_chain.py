"""Scoring through stages that only a broker holds together: repeated, reordered and interrupted deliveries."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions import score_events
from functions.contract import events
from functions.contract.events import Event
from functions.contract.scoring import RESULT, SCORE, SPENT_PATH, Ask, Texts
from functions.service import StageService
from functions.settings import StageSettings
from functions.stage import Stage

PLAN = "0123456789abcdef"
SPANS = ("0:1", "1:2", "2:3", "3:4")
TEXTS = [[84, 111, 32, 98, 101], [9], [1, 2, 3] * 20, [200, 100]]


def first_event(number: int, ask: Ask = Ask(), **extensions: str) -> Event:
    tokens = TEXTS[number % len(TEXTS)]
    data = bytearray(b"".join(Texts((len(tokens),), np.array(tokens, dtype=np.int32), None, ask).to_body()))
    more = {"stage": "0", "batch": "b", "customid": f"text {number} \u00e9", **extensions}
    return Event(SCORE, "/stagecraft/batches/b", f"request-{number}", events.TENSORS, data, more)


@pytest.fixture(scope="module")
def make_chain(stage_of_span: Callable[[str], Stage]) -> Callable[..., list[StageService]]:
    """(claims, spans) -> the services of a chain, loaded."""

    def make(claims: Path | str, spans: Sequence[str] = SPANS, **more: Any) -> list[StageService]:
        chain = []
        for index, span in enumerate(spans):
            given = StageSettings(
                model="tiny", blocks=span, index=index, count=len(spans), plan=PLAN, claims=str(claims),
                **{"claim_bytes": 0, **more},
            )  # fmt: skip
            service = StageService(given)
            service._stage = stage_of_span(span)
            chain.append(service)
        return chain

    return make


@pytest.fixture(scope="module")
def stage_of_span(runner_of: Callable[[str], Any]) -> Callable[[str], Stage]:
    return lambda span: Stage(runner_of(span), 1 << 20)


class Broker:
    """Delivers at least once, in any order. `spends` as the Trigger that lets claims go."""

    def __init__(self, chain: Sequence[StageService], spends: bool = True) -> None:
        self.chain = chain
        self.spends = spends
        self.pending: list[Event] = []
        self.results: dict[str, list[bytes]] = defaultdict(list)

    def accept(self, event: Event) -> None:
        if event.type == RESULT:
            self.results[event.extensions["customid"]].append(bytes(event.data))
            if not self.spends or "usedref" not in event.extensions:
                return
        self.pending.append(event)

    async def deliver(self, event: Event) -> Event | None:
        # over the wire and back, as the data must be writable and attributes texts
        headers, data = events.to_http(event)
        arrived = events.from_http_request(headers, bytearray(data))
        if event.type == RESULT:
            return await self.chain[-1].answer(arrived, "here:1", SPENT_PATH)
        return await self.chain[int(event.extensions["stage"])].answer(arrived, "here:1")

    async def drain(self) -> None:
        while self.pending:
            if (reply := await self.deliver(self.pending.pop(0))) is not None:
                self.accept(reply)


def run(broker: Broker, *first: Event) -> dict[str, list[bytes]]:
    for event in first:
        broker.accept(event)
    asyncio.run(broker.drain())
    return dict(broker.results)


@pytest.fixture(scope="module")
def undisturbed(make_chain: Callable[..., list[StageService]]) -> dict[str, list[bytes]]:
    return run(Broker(make_chain("")), *(first_event(number) for number in range(3)))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_text_has_one_answer_whatever_is_repeated(
    make_chain: Callable[..., list[StageService]], undisturbed: dict[str, list[bytes]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(make_chain(folder))
        for number in range(3):
            broker.accept(first_event(number))

        async def disturbed() -> None:
            for _ in range(data.draw(st.integers(0, 25))):
                if not broker.pending:
                    return
                at = data.draw(st.integers(0, len(broker.pending) - 1))
                # unanswered: the stage did all it does, and its process or the connection ended before the reply came
                how = data.draw(st.sampled_from(("settled", "repeated", "unanswered")))
                reply = await broker.deliver(broker.pending[at])
                if how == "settled":
                    broker.pending.pop(at)
                if reply is not None and how != "unanswered":
                    broker.accept(reply)

        asyncio.run(disturbed())
        asyncio.run(broker.drain())
        assert {name: set(lines) for name, lines in broker.results.items()} == {
            name: set(lines) for name, lines in undisturbed.items()
        }
        assert [path.name for path in Path(folder).iterdir() if path.stat().st_size] == []


def test_events_and_claims_are_the_same_for_every_delivery(
    make_chain: Callable[..., list[StageService]], tmp_path: Path
) -> None:
    (first, *_) = chain = make_chain(tmp_path)
    one, two = (asyncio.run(first.answer(first_event(0), replica)) for replica in ("a:1", "b:2"))
    assert one == two
    assert one is not None
    assert one.extensions == {
        "plan": PLAN,
        "stage": "1",
        "batch": "b",
        "customid": "text 0 \u00e9",
        "requestid": "request-0",
        "dataref": f"{tmp_path.as_uri()}/{one.id}",
    }
    assert (one.source, one.data) == ("/stagecraft/model/stages/0", b"")
    answer = asyncio.run(chain[1].answer(one, "a:1"))
    assert answer is not None
    assert answer.extensions["usedref"] == one.extensions["dataref"]


def test_small_data_stay_in_the_event(make_chain: Callable[..., list[StageService]], tmp_path: Path) -> None:
    chain = make_chain(tmp_path, claim_bytes=48 << 10)
    (line,) = run(Broker(chain), first_event(0))["text 0 \u00e9"]
    assert json.loads(line)["response"]["status_code"] == 200
    assert list(tmp_path.iterdir()) == []


def test_without_the_trigger_only_the_last_claim_waits_for_its_age(
    make_chain: Callable[..., list[StageService]], tmp_path: Path
) -> None:
    run(Broker(make_chain(tmp_path), spends=False), first_event(0))
    assert Counter(path.stat().st_size > 0 for path in tmp_path.iterdir()) == {False: 2, True: 1}


def test_a_claim_that_is_gone_is_a_result_that_says_so(
    make_chain: Callable[..., list[StageService]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_events, "LATE_WAITS_S", (0.0,))
    chain = make_chain(tmp_path)
    event = asyncio.run(chain[0].answer(first_event(0), "a:1"))
    assert event is not None
    (tmp_path / event.id).unlink()
    result = asyncio.run(chain[1].answer(event, "a:1"))
    assert result is not None
    response = json.loads(bytes(result.data))["response"]
    assert (response["status_code"], response["body"]["error"]["code"]) == (410, "claim_lost")


def test_a_claim_that_shows_late_is_waited_for(make_chain: Callable[..., list[StageService]], tmp_path: Path) -> None:
    chain = make_chain(tmp_path)

    async def late() -> Event | None:
        event = await chain[0].answer(first_event(0), "a:1")
        assert event is not None
        (tmp_path / event.id).rename(tmp_path / "elsewhere")
        asyncio.get_running_loop().call_later(0.05, (tmp_path / "elsewhere").rename, tmp_path / event.id)
        return await chain[1].answer(event, "a:1")

    reply = asyncio.run(late())
    assert reply is not None
    assert reply.type == SCORE


def test_a_refused_text_passes_the_stages_of_a_sequence_that_are_left(
    make_chain: Callable[..., list[StageService]],
) -> None:
    chain = make_chain("")
    refused = asyncio.run(chain[0].answer(replace(first_event(0), data=b"no tensors"), "a:1"))
    assert refused is not None
    assert asyncio.run(chain[1].answer(refused, "a:1")) == refused


def test_old_claims_are_swept_when_texts_come(make_chain: Callable[..., list[StageService]], tmp_path: Path) -> None:
    old = tmp_path / ("a" * 32)
    old.write_bytes(b"x")
    service = make_chain(tmp_path, claim_age_s=1e-6)[0]

    async def score() -> None:
        await service.answer(first_event(0), "a:1")
        await service._scorer._sweeping  # type: ignore[misc]  # it runs: an event has come

    asyncio.run(score())
    assert not old.exists()
