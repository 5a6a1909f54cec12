"""Scoring at one stage: its events, and what two real stages make of good and bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from functions.contract import events, scoring
from functions.contract.errors import InvalidEvent, PromptTooLong
from functions.contract.events import Event
from functions.contract.frames import Frame, Frames, pack
from functions.contract.scoring import RESULT, SCORE, SPENT_PATH, Ask, Texts, next_event, result_event
from functions.runner import Runner
from functions.scoring import check_texts, parts


def texts_of(*texts: Sequence[int], ask: Ask = Ask()) -> Texts:
    tokens = np.array([token for text in texts for token in text], dtype=np.int32)
    return Texts(tuple(map(len, texts)), tokens, None, ask)


def body_of(*texts: Sequence[int], ask: Ask = Ask()) -> bytes:
    return b"".join(texts_of(*texts, ask=ask).to_body())


# --- messages -------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    ask=st.sampled_from([Ask(), Ask("embedding"), Ask("embedding", "last")]),
    width=st.integers(0, 3),
)
def test_texts_survive_their_body(lengths: list[int], ask: Ask, width: int) -> None:
    total = sum(lengths)
    hidden = Frame.of(np.arange(total * width, dtype=np.float32).reshape(total, width)) if width else None
    sent = Texts(tuple(lengths), np.arange(total, dtype=np.int32), hidden, ask)
    got = Texts.from_body(b"".join(sent.to_body()))
    assert (got.lengths, got.tokens.tolist(), got.ask) == (sent.lengths, sent.tokens.tolist(), ask)
    assert (got.hidden is None) == (hidden is None)


@pytest.mark.parametrize(
    ("arrays", "ask"),
    [
        ({"lengths": [2], "tokens": [1]}, "{}"),
        ({"lengths": [0, 1], "tokens": [1]}, "{}"),
        ({"lengths": [-1, 2], "tokens": [1]}, "{}"),
        ({"lengths": [], "tokens": []}, "{}"),
        ({"lengths": [[1]], "tokens": [1]}, "{}"),
        ({"lengths": [1], "tokens": [[1]]}, "{}"),
        ({"tokens": [1]}, "{}"),
        ({"lengths": [1], "tokens": [1], "more": [1]}, "{}"),
        ({"lengths": [1], "tokens": [1], "hidden": [1]}, "{}"),
        ({"lengths": [1], "tokens": [1]}, '{"want": "everything"}'),
        ({"lengths": [1], "tokens": [1]}, '{"want": "embedding", "pooling": []}'),
        ({"lengths": [1], "tokens": [1]}, '{"wants": "logprobs"}'),
        ({"lengths": [1], "tokens": [1]}, "[]"),
        ({"lengths": [1], "tokens": [1]}, "["),
    ],
)
def test_broken_texts_are_refused(arrays: dict[str, Any], ask: str) -> None:
    frames = {name: Frame.of(np.array(value, dtype=np.int32)) for name, value in arrays.items()}
    with pytest.raises(InvalidEvent):
        Texts.from_body(b"".join(pack(Frames(frames, {"ask": ask}))))


def test_the_next_event_carries_what_belongs_to_the_request() -> None:
    extensions = {
        "plan": "old", "stage": "1", "dataref": "file:///c/1", "usedref": "file:///c/0", "requestid": "r", "batch": "b",
        "customid": "c", "traceparent": "t", "knativearrivaltime": "now",
    }  # fmt: skip
    event = Event(SCORE, "/s", "1", events.TENSORS, b"", extensions)
    made = next_event(event, "p", 2, "my model", b"x", None)
    assert made.extensions == {
        "plan": "p", "stage": "2", "usedref": "file:///c/1", "requestid": "r", "batch": "b", "customid": "c",
        "traceparent": "t",
    }  # fmt: skip
    assert made.source == "/stagecraft/my%20model/stages/1"
    assert made.id != next_event(Event(SCORE, "/other", "1", events.TENSORS, b""), "p", 2, "my model", b"", None).id


def test_a_result_is_a_line_of_a_batch_output() -> None:
    event = Event(SCORE, "/s", "1", events.TENSORS, b"", {"batch": "b", "customid": "\u00e9", "requestid": "r"})
    result = result_event(event, "m", 200, {"data": []})
    line = json.loads(bytes(result.data))
    assert (result.type, result.id, result.extensions["customid"]) == (RESULT, "r.result", "\u00e9")
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("\u00e9", None, 200)


def test_the_type_of_results_is_that_of_batches() -> None:
    from orchestrator.batches.events import RESULT as OF_BATCHES

    assert OF_BATCHES == scoring.RESULT


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), most=st.integers(1, 40))
def test_parts_hold_all_texts_in_order_and_are_no_larger_than_need_be(lengths: list[int], most: int) -> None:
    texts = texts_of(*([0] * length for length in lengths))
    found = list(parts(texts, most))
    assert [length for part in found for length in part.lengths] == lengths
    assert [part.start for part in found] == [0, *(part.end for part in found[:-1])]
    for part in found:
        assert part.end - part.start == sum(part.lengths)
        assert sum(part.lengths) <= most or len(part.lengths) == 1


def test_what_a_model_has_no_room_for(runner_of: Callable[[str], Runner]) -> None:
    runner = runner_of("0:2")
    check_texts(runner, texts_of([1] * 256, [2]), 257)
    with pytest.raises(PromptTooLong, match="257 tokens; the model takes at most 256"):
        check_texts(runner, texts_of([1], [1] * 257), 300)
    with pytest.raises(InvalidEvent, match=r"has 258 tokens, this stage takes 257 \(STAGE_SCORE_TOKENS_MAX\)"):
        check_texts(runner, texts_of([1] * 257, [2]), 257)
    with pytest.raises(InvalidEvent, match="token ids must be in"):
        check_texts(runner, texts_of([257]), 10)


# --- two real stages ------------------------------------------------------------------------------------------------


def headers_of(stage: Any, **changed: str | None) -> dict[str, str]:
    more: dict[str, str | None] = {"ce_batch": "b", "ce_customid": "c", **changed}
    return dict(stage.headers(SCORE, events.TENSORS, **more))


def relay(stage: Any, answer: httpx.Response) -> httpx.Response:
    """The answer of the stage before, as a broker delivers it."""
    kept = {name: value for name, value in answer.headers.items() if name.startswith("ce-") or name == "content-type"}
    return stage.post(kept, answer.content)  # type: ignore[no-any-return]


def test_two_stages_score_what_a_broker_carries_between_them(stages: list[Any]) -> None:
    text = [84, 111, 32, 98, 101]
    first = stages[0].post(headers_of(stages[0], ce_plan=None, ce_customid="a%20%C3%A9%25"), body_of(text, [1]))
    assert (first.status_code, first.headers["ce-type"], first.headers["ce-stage"]) == (200, SCORE, "1")
    assert first.headers["ce-customid"] == "a%20%C3%A9%25"
    last = relay(stages[1], first)
    assert (last.status_code, last.headers["ce-type"], last.headers["ce-id"]) == (200, RESULT, "1.result")
    line = last.json()
    one, other = line["response"]["body"]["data"]
    assert line["custom_id"] == "a \u00e9%"
    assert (one["tokens"], len(one["logprobs"]), other["logprobs"]) == (text, 5, [None])
    assert one["sum"] == pytest.approx(sum(one["logprobs"][1:]))
    assert line["response"]["body"]["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


def test_events_of_scoring_are_as_the_schema_says(stages: list[Any], root: Path) -> None:
    schema = json.loads((root / "docs" / "events.schema.json").read_text())
    validator = Draft202012Validator(schema)
    headers = headers_of(stages[0])
    first = stages[0].post(headers, body_of([1, 2]))
    last = relay(stages[1], first)
    for sent, body in ((headers, body_of([1, 2])), (first.headers, first.content), (last.headers, last.content)):
        event: dict[str, Any] = {name[3:]: value for name, value in sent.items() if name.startswith("ce-")}
        event["datacontenttype"] = sent["content-type"]
        size = int.from_bytes(body[:8], "little")
        event["data"] = json.loads(body[8 : 8 + size] if event["type"] == SCORE else body)
        validator.validate(event)
        if event["type"] == SCORE:
            ask = Draft202012Validator({"$ref": "#/$defs/ask", "$defs": schema["$defs"]})
            ask.validate(json.loads(event["data"]["__metadata__"]["ask"]))
            validator.validate(
                {**{name: event[name] for name in event if name != "data"}, "dataref": f"s3://b/{'a' * 32}"}
            )
            assert not validator.is_valid({name: event[name] for name in event if name != "data"})
            assert not validator.is_valid({**event, "data": {"tokens": event["data"]["tokens"]}})


def test_embeddings_have_openai_form(stages: list[Any]) -> None:
    first = stages[0].post(headers_of(stages[0]), body_of([1, 2], ask=Ask("embedding")))
    body = relay(stages[1], first).json()["response"]["body"]
    assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", "tiny", "embedding")
    assert len(body["data"][0]["embedding"]) == 16


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"no tensors at all", 400, "invalid_event"),
        (body_of([1] * 257), 422, "prompt_too_long"),
        (body_of([999]), 400, "invalid_event"),
    ],
)
def test_what_is_wrong_with_a_text_is_its_result(stages: list[Any], content: bytes, status: int, code: str) -> None:
    answer = stages[0].post(headers_of(stages[0]), content)
    assert (answer.status_code, answer.headers["ce-type"]) == (200, RESULT)
    response = answer.json()["response"]
    assert (response["status_code"], response["body"]["error"]["code"]) == (status, code)


def test_a_reference_to_data_needs_a_place_for_them(stages: list[Any]) -> None:
    answer = stages[1].post(headers_of(stages[1], ce_dataref=f"file:///claims/{'a' * 32}"))
    assert "STAGE_CLAIMS" in answer.json()["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"ce_batch": None}, 400),  # nobody to tell
        ({"ce_plan": "another"}, 409),
        ({"ce_stage": "1"}, 409),
        ({"ce_id": None}, 400),
    ],
)
def test_what_cannot_be_understood_is_refused(stages: list[Any], changed: dict[str, Any], status: int) -> None:
    answer = stages[0].post(headers_of(stages[0], **changed), b"no tensors")
    assert (answer.status_code, answer.headers["ce-type"]) == (status, events.ERROR)


def test_results_pass_a_stage_and_end_where_claims_are_let_go(stages: list[Any]) -> None:
    headers = stages[1].headers(RESULT, ce_batch="b", ce_customid="c", ce_usedref="file:///x")
    answer = stages[1].post(headers, b'{"custom_id": "c"}')
    assert (answer.headers["ce-type"], answer.headers["ce-id"], answer.content) == (RESULT, "1", b'{"custom_id": "c"}')
    done = stages[1].client.post(stages[1].url + SPENT_PATH, headers=headers, content=b"{}")
    assert (done.status_code, done.content, "ce-type" in done.headers) == (200, b"", False)
