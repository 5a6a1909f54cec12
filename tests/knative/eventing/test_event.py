"""CloudEvents and their JSON form: the published vectors, and what is kept and refused."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.eventing.event import CloudEvent, InvalidEvent

SPECS = Path(__file__).resolve().parents[4] / "shared" / "specs" / "cloudevents"
needs_vectors = pytest.mark.skipif(not SPECS.is_dir(), reason="NO VECTORS: ../shared/specs/cloudevents is not there")

MINIMAL = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}


def vectors(file: str) -> list[Any]:
    if not SPECS.is_dir():
        return []
    tests = json.loads((SPECS / "json_format" / file).read_text())["tests"]
    return [pytest.param(test, id=test["id"]) for test in tests]


def sample(kind: str, name: str) -> Any:
    # without implicit types but those of JSON: a timestamp stays the text it is
    return yaml.safe_load((SPECS / "json_format" / "samples.yaml").read_text())[kind][name]


def check_equal(event: CloudEvent, expected: dict[str, Any]) -> None:
    """Timestamps are compared as instants."""
    values: dict[str, Any] = event.values()
    expected = dict(expected)
    assert (event.data or b"").decode() == expected.pop("data", "")
    for name in ("time", "exttimestamp"):
        if name in expected:
            assert datetime.fromisoformat(values.pop(name)) == datetime.fromisoformat(expected.pop(name))
    assert values == expected


@needs_vectors
def test_all_vectors_are_there() -> None:
    files = ("valid-events.json", "invalid-events.json", "valid-batches.json", "invalid-batches.json")
    assert [len(vectors(file)) for file in files] == [10, 25, 5, 3]


@pytest.mark.parametrize("vector", vectors("valid-events.json"))
def test_valid_events_are_read(vector: dict[str, Any]) -> None:
    event = CloudEvent.from_json(json.dumps(vector["event"]).encode())
    check_equal(event, sample("events", vector["sampleId"]))
    assert CloudEvent.from_json(event.to_json()) == event


@pytest.mark.parametrize("vector", vectors("invalid-events.json"))
def test_invalid_events_are_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent):
        CloudEvent.from_json(json.dumps(vector["event"]).encode())


@pytest.mark.parametrize("vector", vectors("valid-batches.json"))
def test_valid_batches_are_read(vector: dict[str, Any]) -> None:
    events = CloudEvent.from_json_batch(json.dumps(vector["batch"]).encode())
    expected = sample("batches", vector["sampleId"])
    assert len(events) == len(expected)
    for event, wanted in zip(events, expected, strict=True):
        check_equal(event, wanted)


@pytest.mark.parametrize("vector", vectors("invalid-batches.json"))
def test_invalid_batches_are_refused_as_a_whole(vector: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent):
        CloudEvent.from_json_batch(json.dumps(vector["batch"]).encode())


def test_a_wrong_event_of_a_batch_is_named() -> None:
    batch = json.dumps([MINIMAL, {**MINIMAL, "id": ""}]).encode()
    with pytest.raises(InvalidEvent, match=r"event 1 of the batch: .*id must not be empty"):
        CloudEvent.from_json_batch(batch)


@pytest.mark.parametrize(
    "data",
    ["1.0", "12345678901234567890123", '{"b":1,"a":2,"b":3}', '"\\ud83d\\ude00"', "[1e400]", "null", '""', "[ 1 ]"],
)
def test_json_data_passes_through_byte_for_byte(data: str) -> None:
    document = json.dumps({**MINIMAL, "datacontenttype": "application/json"})[:-1] + f', "data" :  {data} }}'
    event = CloudEvent.from_json(document.encode())
    assert event.data == data.encode()
    assert event.to_json().endswith(b'"data":' + data.encode() + b"}")


def test_data_without_a_content_type_is_json_and_is_said_to_be() -> None:
    event = CloudEvent.from_json(json.dumps({**MINIMAL, "data": {"a": 1}}).encode())
    assert event.attributes["datacontenttype"] == "application/json"


@pytest.mark.parametrize(
    ("content_type", "data", "member"),
    [
        ("application/json", b"{broken", "data_base64"),
        ("application/json", b"NaN", "data_base64"),
        ("application/json", b"1],[2", "data_base64"),
        ("application/json", "[1]".encode("utf-16"), "data_base64"),
        ("application/json", b" [1] \n", "data"),
        ("application/vnd.x+json", b"1", "data"),
        ("text/plain", "grüß".encode(), "data"),
        ("text/plain", b"\xff", "data_base64"),
        ("text/plain; charset=iso-8859-1", b"gr\xfc\xdf", "data_base64"),
        ("application/xml", b"<a/>", "data"),
        ("image/png", b"plain", "data_base64"),
    ],
)
def test_data_goes_into_json_as_its_type_allows(content_type: str, data: bytes, member: str) -> None:
    event = CloudEvent({**MINIMAL, "datacontenttype": content_type}, data)
    document = json.loads(event.to_json())
    assert {"data", "data_base64"} & set(document) == {member}
    assert CloudEvent.from_json(event.to_json()).data == (data.strip() if member == "data" else data)


def test_deep_data_is_stored_so_that_it_can_always_be_read_again() -> None:
    event = CloudEvent({**MINIMAL, "datacontenttype": "application/json"}, b"[" * 900 + b"]" * 900)
    assert "data_base64" in json.loads(event.to_json())


def test_a_string_is_written_in_the_charset_of_its_content_type() -> None:
    document = {**MINIMAL, "datacontenttype": 'text/plain; charset="ISO-8859-1"', "data": "grüß"}
    assert CloudEvent.from_json(json.dumps(document).encode()).data == b"gr\xfc\xdf"
    document["data"] = "€"
    with pytest.raises(InvalidEvent, match="charset iso-8859-1; send it encoded in data_base64"):
        CloudEvent.from_json(json.dumps(document).encode())


def test_types_of_extensions_are_kept_beside_their_text() -> None:
    event = CloudEvent.from_json(json.dumps({**MINIMAL, "number": 10, "flag": True, "text": "10"}).encode())
    assert (event.attributes["number"], event.attributes["flag"]) == ("10", "true")
    assert event.values() == {**MINIMAL, "number": 10, "flag": True, "text": "10"}
    assert event.changed({"number": None, "other": False}).values() == {
        **MINIMAL, "flag": True, "text": "10", "other": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"number": 2**31}, "whole number from"),
        ({"number": 1.0}, "whole number from"),
        ({"list": [1]}, "list is an array, must be a string"),
        ({"subject": True}, "subject is a boolean, must be a string"),
        ({"data_base64": "%"}, "data_base64 is not base64"),
        ({"data_base64": 1}, "data_base64 must be a string"),
        ({"datacontenttype": "text/plain", "data": {}}, "must be a string"),
    ],
)
def test_values_of_wrong_types_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidEvent, match=why):
        CloudEvent.from_json(json.dumps({**MINIMAL, **changes}).encode())


def test_a_member_twice_is_refused() -> None:
    with pytest.raises(InvalidEvent, match="'id' is there twice"):
        CloudEvent.from_json(b'{"id":"1","id":"2"}')


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "source",
            ["#f", "//a/b", "urn:uuid:6e8b", "mailto:a@b", "cloudevents/spec/pull/123", "1-555-123-4567", "http://[::1]:80/"],
            ["a b", "é", "%zz", "1:2", "a\\b", "[x]"],
        ),
        ("dataschema", ["https://a/b?c#d", "urn:x"], ["/relative", "//a/b", "a b:c"]),
        (
            "time",
            ["2018-04-05T17:31:00Z", "2018-04-05t17:31:00.123456789z", "2016-12-31T23:59:60Z",
             "0001-01-01T00:00:00-23:59"],
            ["2018-02-30T00:00:00Z", "2018-04-05T24:00:00Z", "2018-04-05 17:31:00Z", "2018-04-05T17:31:00",
             "2018-٢4-05T17:31:00Z"],
        ),
        (
            "datacontenttype",
            ["text/plain;charset=utf-8", 'multipart/form-data; boundary="a; \\"b"', "application/vnd.a+json"],
            ["text", "text/", "text/plain; charset", "text/plain; a=b c", "te xt/plain"],
        ),
        ("subject", ["a b", "😀"], ["", "\x7f", "a\nb", "\ufffe", "\U0001ffff", "\ud800"]),
        ("ext20characterslong1x", ["", "x"], ["\x00"]),
    ],
)  # fmt: skip
def test_attributes_are_checked(name: str, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert CloudEvent({**MINIMAL, name: text}).attributes[name] == text
    for text in bad:
        with pytest.raises(InvalidEvent, match=name):
            CloudEvent({**MINIMAL, name: text})


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(InvalidEvent, match=r"type is missing; id must not be empty; .*RFC 3339"):
        CloudEvent({"specversion": "1.0", "id": "", "source": "/s", "time": "lunchtime"})


@pytest.mark.parametrize("text", ["/" + "a" * 200_000 + " ", "%" * 200_000, "a:" * 100_000 + "\\"])
def test_long_hostile_values_are_refused_quickly(text: str) -> None:
    for name in ("source", "datacontenttype", "time", "dataschema"):
        with pytest.raises(InvalidEvent):
            CloudEvent({**MINIMAL, name: text})


def test_events_do_not_change() -> None:
    given = dict(MINIMAL)
    event = CloudEvent(given, b"")
    given["id"] = "2"
    assert event.id == "1"
    assert event.data is None
    with pytest.raises(TypeError):
        event.attributes["id"] = "3"  # type: ignore[index]  # that it cannot be is what is tested
