"""Which lines can be sent, what they become, and what output lines say."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import parse, to_binary
from orchestrator.batches.events import REQUEST, request_event, request_id
from orchestrator.batches.lines import (
    CUSTOM_ID_CHARACTERS_MAX,
    LINE_BYTES_MAX,
    BadLine,
    OutputLineError,
    Request,
    error_output,
    parse_line,
    parse_output,
)
from orchestrator.batches.reader import CHUNK_REQUESTS, InputChanged, InputReader, Mark

OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}


def line(**changes: Any) -> bytes:
    """OPENAI with members changed; None takes one away."""
    members = {name: value for name, value in {**OPENAI, **changes}.items() if value is not None}
    return json.dumps(members).encode()


def sent(raw: bytes, number: int = 7, model: str | None = None) -> dict[str, Any]:
    parsed = parse_line(number, raw, model)
    assert isinstance(parsed, Request), parsed
    data = json.loads(parsed.line)
    assert (data["custom_id"], data["body"]["model"]) == (parsed.custom_id, parsed.model)
    return data


def test_an_openai_line_is_sent_as_it_came() -> None:
    raw = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "seed": 1.50}}'
    parsed = parse_line(1, raw + b"\r\n", None)
    assert isinstance(parsed, Request)
    assert parsed.line == raw


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "model": None}])
def test_the_batch_s_model_fills_in_for_a_body_that_names_none(body: dict[str, Any]) -> None:
    assert sent(line(body=body), model="demo")["body"] == {"prompt": "x", "model": "demo"}
    assert sent(json.dumps(body).encode(), model="demo")["body"] == {"prompt": "x", "model": "demo"}


def test_a_plain_line_becomes_a_completion_or_a_chat() -> None:
    assert sent(b'{"prompt": "x", "top_p": 0.5}', model="m") == {
        "custom_id": "line-000007",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "x", "top_p": 0.5, "model": "m"},
    }
    messages = [{"role": "user", "content": "ÿ 🙂"}]
    chat = sent(json.dumps({"messages": messages, "model": "m", "custom_id": "mine"}).encode())
    assert (chat["custom_id"], chat["url"]) == ("mine", "/v1/chat/completions")
    assert chat["body"] == {"messages": messages, "model": "m"}


@pytest.mark.parametrize("raw", [b"", b"\n", b" \t\r\n"])
def test_blank_lines_are_passed_over(raw: bytes) -> None:
    assert parse_line(1, raw, None) is None


BAD = {
    "broken JSON": (b'{"prompt": ', "invalid_json_line", "not valid JSON: Expecting value at character"),
    "half a line": (b'{"prompt": "x', "invalid_json_line", "Unterminated string starting at character 12"),
    "two values": (b'{"prompt": "x"} {}', "invalid_json_line", "Extra data"),
    "NaN": (b'{"prompt": "x", "top_p": NaN}', "invalid_json_line", "NaN is not JSON"),
    "an endless number": (b'{"prompt": ' + b"1" * 5000 + b"}", "invalid_json_line", "not valid JSON"),
    "a number beyond all": (b'{"prompt": "x", "model": "m", "top_p": 1e999}', "invalid_json_line", "number"),
    "too deep": (b'{"prompt": ' + b"[" * 100_000, "invalid_json_line", "nested too deeply"),
    "a list": (b"[1]", "invalid_json_line", "not a JSON object"),
    "a text": (b'"x"', "invalid_json_line", "not a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff"}', "invalid_encoding", "not UTF-8 at byte 13"),
    "neither form": (b'{"text": "x"}', "missing_required_parameter", "neither prompt nor messages"),
    "both plain forms": (b'{"prompt": "x", "messages": []}', "missing_required_parameter", "both prompt and messages"),
    "no custom_id": (line(custom_id=None), "missing_required_parameter", "without custom_id"),
    "no method": (line(method=None), "missing_required_parameter", "without method"),
    "no url and body": (line(url=None, body=None), "missing_required_parameter", "without url and body"),
    "custom_id a number": (line(custom_id=1), "invalid_type", "custom_id must be a text"),
    "custom_id empty": (line(custom_id=""), "invalid_type", "custom_id must be a text that is not empty"),
    "custom_id endless": (line(custom_id="a" * (CUSTOM_ID_CHARACTERS_MAX + 1)), "invalid_value", "at most 256"),
    "custom_id with a bell": (line(custom_id="a\a"), "invalid_value", "U+0007"),
    "custom_id half a pair": (line(custom_id="\ud800"), "invalid_value", "U+D800"),
    "method": (line(method="GET"), "invalid_method", "method must be POST, got 'GET'"),
    "url": (line(url="/v1/embeddings"), "invalid_url", "got '/v1/embeddings'"),
    "body": (line(body="x"), "invalid_type", "body must be a JSON object"),
    "no model": (line(body={"prompt": "x"}), "missing_required_parameter", "--model"),
    "plain without model": (b'{"prompt": "x"}', "missing_required_parameter", "without model"),
    "model a list": (line(body={"model": []}), "invalid_type", "model must be a text"),
}


@pytest.mark.parametrize(("raw", "code", "words"), BAD.values(), ids=BAD)
def test_a_bad_line_says_what_is_wrong_and_where(raw: bytes, code: str, words: str) -> None:
    bad = parse_line(12, raw, None)
    assert isinstance(bad, BadLine)
    assert (bad.number, bad.code) == (12, code)
    assert words in bad.message
    error = json.loads(bad.to_json())
    assert error["response"] is None
    assert error["error"] == {"code": code, "message": f"line 12: {bad.message}", "line": 12}


def test_a_line_for_another_model_is_left_out() -> None:
    bad = parse_line(1, line(), "demo")
    assert isinstance(bad, BadLine)
    assert (bad.code, bad.custom_id) == ("mismatched_model", "a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = st.sampled_from(["custom_id", "method", "url", "body", "prompt", "messages", "model"])


@settings(max_examples=50)
@given(st.binary(max_size=80) | st.dictionaries(MEMBERS, JSON).map(lambda data: json.dumps(data).encode()))
def test_any_line_is_a_request_that_can_be_sent_or_a_problem_in_words(raw: bytes) -> None:
    parsed = parse_line(1, raw, None)
    if isinstance(parsed, Request):
        event = request_event("b", parsed.custom_id, parsed.model, parsed.line)
        for headers, body in (to_binary(event), ({"content-type": "application/cloudevents+json"}, event.to_json())):
            (read,) = parse(headers, body)
            assert read.attributes["customid"] == parsed.custom_id
            assert json.loads(read.data or b"") == json.loads(parsed.line)
    elif parsed is not None:
        assert json.loads(parsed.to_json())["error"]["code"] == parsed.code


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3), st.text(max_size=20))
def test_a_plain_line_keeps_its_members(members: dict[str, Any], prompt: str) -> None:
    reserved = {"custom_id", "method", "url", "body", "prompt", "messages", "model"}
    body = {name: value for name, value in members.items() if name not in reserved} | {"prompt": prompt}
    assert sent(json.dumps(body).encode(), model="m")["body"] == {**body, "model": "m"}


def test_ids_of_events_are_stable_and_differ_between_batches() -> None:
    event = request_event("b", "a", "m", line())
    assert event.id == request_id("b", "a") == "c4a78e5bdf318c857b19a6ae4678d9fc"
    assert len({request_id("b", "a"), request_id("c", "a"), request_id("b", "b")}) == 3
    expected = {"type": REQUEST, "source": "/stagecraft/batches/b", "batch": "b", "customid": "a", "model": "m"}
    assert {name: event.attributes[name] for name in expected} == expected
    assert isinstance(event, CloudEvent)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({"response": {"status_code": 200}, "error": None}, "completed"),
        ({"response": {"status_code": 400, "body": {"error": {}}}, "error": None}, "failed"),
        ({"response": None, "error": {"code": "batch_cancelled", "message": ""}}, "cancelled"),
        ({"response": None, "error": {"code": "other"}}, "failed"),
    ],
)
def test_an_output_line_says_what_became_of_its_request(data: dict[str, Any], kind: str) -> None:
    outcome = parse_output(json.dumps({"id": "i", "custom_id": "a", **data}).encode())
    assert (outcome.custom_id, outcome.kind) == ("a", kind)


@pytest.mark.parametrize("raw", [b"", b"[]", b"1", b"{", b'{"custom_id": 1, "error": {}}', b'{"custom_id": "a"}',
                                 b'{"custom_id": "a", "response": {}}', b'{"custom_id": "a", "error": 1}'])  # fmt: skip
def test_what_is_no_output_line_is_told(raw: bytes) -> None:
    with pytest.raises(OutputLineError):
        parse_output(raw)


def test_an_error_line_is_an_output_line() -> None:
    assert parse_output(error_output("i", "a\n🙂", "batch_cancelled", "m")).custom_id == "a\n🙂"


# --- reading


def drain(reader: InputReader) -> tuple[list[Request], list[BadLine], Mark]:
    requests: list[Request] = []
    bad: list[BadLine] = []
    end = Mark()
    while (chunk := reader.chunk()) is not None:
        requests += chunk.requests
        bad += chunk.bad
        end = chunk.end
        assert len(chunk.requests) <= CHUNK_REQUESTS
    return requests, bad, end


def test_lines_are_counted_as_an_editor_counts_them() -> None:
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": \n{"prompt": "b"}'
    requests, bad, end = drain(InputReader(io.BytesIO(data), "m"))
    assert [(one.number, one.custom_id) for one in requests] == [(1, "line-000001"), (4, "line-000004")]
    assert [one.number for one in bad] == [3]
    assert end == Mark(len(data), 4, hashlib.sha256(data).hexdigest())


def test_the_first_line_that_names_a_model_decides_for_all() -> None:
    data = b'{"prompt": "a"}\n{"prompt": "b", "model": "m"}\n{"prompt": "c"}\n{"prompt": "d", "model": "n"}\n'
    requests, bad, _ = drain(InputReader(io.BytesIO(data), None))
    assert [(one.number, one.model) for one in requests] == [(2, "m"), (3, "m")]
    assert [one.number for one in bad] == [1, 4]


@pytest.mark.parametrize("excess", [0, 1, 2, 3_000_000])
def test_a_line_over_the_limit_is_told_and_the_next_is_read(excess: int) -> None:
    head, tail = b'{"prompt": "', b'"}'
    long = head + b"x" * (LINE_BYTES_MAX - len(head) - len(tail) + excess) + tail
    requests, bad, end = drain(InputReader(io.BytesIO(long + b'\r\n{"prompt": "b"}\n'), "m"))
    assert [one.number for one in requests] == ([2] if excess else [1, 2])
    assert [(one.number, one.code) for one in bad] == ([(1, "line_too_long")] if excess else [])
    assert end.line == 2


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=12), max_size=40), st.integers(0, 40))
def test_reading_goes_on_exactly_behind_a_mark(lines: list[bytes], at: int) -> None:
    head = b"".join(one.replace(b"\n", b"") + b"\n" for one in lines[:at])
    data = head + b"\n".join(lines[at:])
    whole = InputReader(io.BytesIO(data), "m")
    first = InputReader(io.BytesIO(head), "m")
    requests, bad, mark = drain(first)
    second = InputReader(io.BytesIO(data), "m")
    second.skip_to(mark)
    more, more_bad, end = drain(second)
    assert (requests + more, bad + more_bad) == drain(whole)[:2]
    if end.offset:
        assert end.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("data", [b"", b'{"prompt": "a"}', b'{"prompt": "B"}\n{"prompt": "c"}\n'])
def test_an_input_that_begins_otherwise_is_refused(data: bytes) -> None:
    first = InputReader(io.BytesIO(b'{"prompt": "a"}\n'), "m")
    _, _, mark = drain(first)
    with pytest.raises(InputChanged):
        InputReader(io.BytesIO(data), "m").skip_to(mark)
