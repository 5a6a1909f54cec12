"""Events over HTTP: the CloudEvents SDK understands ours, and we understand its."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cloudevents.conversion import to_binary, to_structured
from cloudevents.http import CloudEvent, from_http
from hypothesis import given
from hypothesis import strategies as st

from functions.contract import events
from functions.contract.errors import InvalidEvent
from functions.contract.events import Event, from_http_request, from_lower_case, to_http, to_raw

RESERVED = {
    "specversion", "type", "source", "id", "datacontenttype", "time", "subject", "dataschema", "data", "extensions",
}  # fmt: skip
words = st.text("abcdefghijklmnopqrstuvwxyz0123456789-./_", min_size=1, max_size=20)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20).filter(
    lambda name: name not in RESERVED
)
extensions = st.dictionaries(st.sampled_from(["plan", "stage", "lane", "replica", "computeus"]), words)
some_events = st.builds(
    Event,
    st.sampled_from([*events.REQUEST_TYPES, events.WOKEN, events.STEPPED, events.RELEASED, events.ERROR]),
    words,
    words,
    st.sampled_from([events.JSON, events.TENSORS]),
    st.binary(max_size=50),
    extensions,
)
SAMPLE = Event(events.STEP, "/orchestrator", "7", events.TENSORS, b"\x00\xff{", {"plan": "ab", "stage": "1"})


@given(some_events)
def test_event_survives_http(event: Event) -> None:
    headers, body = to_http(event)
    assert from_http_request(headers, body) == event


@given(some_events)
def test_the_sdk_reads_our_events(event: Event) -> None:
    headers, body = to_http(event)
    read = from_http(headers, bytes(body), data_unmarshaller=lambda data: data)
    assert (read["type"], read["source"], read["id"]) == (event.type, event.source, event.id)
    assert read["specversion"] == "1.0"
    assert {name: read[name] for name in event.extensions} == dict(event.extensions)
    assert (read.data or b"") == event.data


@given(some_events)
def test_we_read_events_of_the_sdk(event: Event) -> None:
    attributes = {"type": event.type, "source": event.source, "id": event.id, "datacontenttype": event.content_type}
    made = CloudEvent({**attributes, **event.extensions}, event.data)
    headers, body = to_binary(made, data_marshaller=lambda data: data)
    assert from_http_request(headers, body) == event


@given(st.dictionaries(names, words, max_size=6), some_events)
def test_our_headers_are_the_sdks(extensions: dict[str, str], event: Event) -> None:
    """Whatever the extensions are called. The SDK leaves percent-encoding to its users: values need none here."""
    event = replace(event, extensions=extensions)
    attributes = {"type": event.type, "source": event.source, "id": event.id, "datacontenttype": event.content_type}
    made = CloudEvent({**attributes, **extensions, "time": None}, b"")
    theirs, _ = to_binary(made, data_marshaller=lambda data: data)
    theirs.pop("ce-time", None)
    assert to_http(event)[0] == theirs


@given(st.dictionaries(names, texts, max_size=6), texts, texts)
def test_any_text_survives_http_as_printable_ascii(extensions: dict[str, str], source: str, identity: str) -> None:
    event = Event(events.STEP, source, identity, events.TENSORS, b"", extensions)
    headers, parts = to_raw(event)
    assert all(0x21 <= byte <= 0x7E for _, value in headers for byte in value)
    text = {name.decode(): value.decode() for name, value in headers}
    assert from_lower_case(text, parts[0]) == event
    assert from_http_request({name.title(): value for name, value in text.items()}, parts[0]) == event


def test_parts_are_sent_as_the_same_objects() -> None:
    first, second = bytearray(b"head"), bytearray(b"large")
    _, parts = to_raw(Event(events.STEPPED, "/s", "1", events.TENSORS, first, {}, [second]))
    assert [id(part) for part in parts] == [id(first), id(second)]


def test_data_is_passed_on_as_the_same_object() -> None:
    data = bytearray(b"large")
    event = Event(events.STEP, "/s", "1", events.TENSORS, data)
    assert to_http(event)[1] is data
    assert from_http_request(to_http(event)[0], data).data is data


def test_headers_are_those_of_binary_content_mode() -> None:
    headers, _ = to_http(SAMPLE)
    assert {name.lower(): value for name, value in headers.items()} == {
        "ce-specversion": "1.0",
        "ce-type": "dev.stagecraft.stage.step.v1",
        "ce-source": "/orchestrator",
        "ce-id": "7",
        "ce-plan": "ab",
        "ce-stage": "1",
        "content-type": "application/vnd.stagecraft.tensors+safetensors",
    }


def test_structured_mode_is_refused() -> None:
    headers, body = to_structured(CloudEvent({"type": events.WAKE, "source": "/s"}, {}))
    with pytest.raises(InvalidEvent, match="binary content mode"):
        from_http_request(headers, body)


def test_batch_mode_is_refused() -> None:
    body = json.dumps([{"specversion": "1.0", "type": events.WAKE, "source": "/s", "id": "1"}]).encode()
    with pytest.raises(InvalidEvent, match="binary content mode"):
        from_http_request({"content-type": "application/cloudevents-batch+json; charset=UTF-8"}, body)


def test_request_that_is_no_event_is_refused() -> None:
    with pytest.raises(InvalidEvent, match="specversion"):
        from_http_request({"content-type": "application/json"}, b"{}")


def test_attributes_in_the_body_do_not_count() -> None:
    """Bytes from outside are never decoded to find attributes."""
    body = json.dumps({"specversion": "1.0", "type": events.WAKE, "source": "/s", "id": "1"}).encode()
    with pytest.raises(InvalidEvent, match="specversion"):
        from_http_request({"content-type": "application/json"}, body)


@pytest.mark.parametrize("attribute", ["type", "source", "id"])
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_required_attribute_is_named(attribute: str, value: str | None) -> None:
    headers = dict(to_http(SAMPLE)[0])
    del headers[f"ce-{attribute}"]
    if value is not None:
        headers[f"ce-{attribute}"] = value
    with pytest.raises(InvalidEvent, match=rf"ce-{attribute}\b"):
        from_http_request(headers, b"x")


@pytest.mark.parametrize("version", ["0.3", "1", "1.1", "2.0", "", "one"])
def test_other_specversions_are_refused(version: str) -> None:
    headers = {**to_http(SAMPLE)[0], "ce-specversion": version}
    with pytest.raises(InvalidEvent, match=r"must be 1\.0"):
        from_http_request(headers, b"x")


def test_standard_attributes_are_no_extensions() -> None:
    extra: dict[str, Any] = {"ce-time": "2026-01-01T00:00:00Z", "ce-subject": "s", "ce-dataschema": "/d"}
    assert from_http_request({**to_http(SAMPLE)[0], **extra}, SAMPLE.data).extensions == SAMPLE.extensions
