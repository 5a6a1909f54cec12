"""CloudEvents over HTTP: the published vectors, what is refused, and that nothing changes on the way."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloudevents.conversion import to_binary as sdk_to_binary
from cloudevents.http import CloudEvent as SdkEvent
from cloudevents.http import from_http as sdk_from_http
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.eventing.event import CloudEvent, InvalidEvent
from knative.eventing.http_binding import (
    BATCHED,
    STRUCTURED,
    EventTooLarge,
    Limits,
    decode_header,
    encode_header,
    is_event,
    parse,
    to_binary,
    to_structured,
)

SPECS = Path(__file__).resolve().parents[4] / "shared" / "specs" / "cloudevents"
needs_vectors = pytest.mark.skipif(not SPECS.is_dir(), reason="NO VECTORS: ../shared/specs/cloudevents is not there")

MINIMAL = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}
HEADERS = {f"ce-{name}": text for name, text in MINIMAL.items()}
BINDING = yaml.safe_load((SPECS / "http-binding.yaml").read_text()) if SPECS.is_dir() else {}


def named(cases: list[dict[str, Any]], key: str) -> list[Any]:
    return [pytest.param(case, id=str(case[key])) for case in cases]


@pytest.mark.parametrize("vector", named(BINDING.get("header_vectors", []), "header"))
def test_header_values_follow_the_vectors(vector: dict[str, Any]) -> None:
    if vector["attribute"] is None:
        with pytest.raises(InvalidEvent, match="ce-subject is not percent-encoded UTF-8"):
            parse({**HEADERS, "ce-subject": vector["header"]}, b"")
        return
    (event,) = parse({**HEADERS, "ce-subject": vector["header"]}, b"")
    assert event.attributes["subject"] == vector["attribute"]
    if vector["encode"]:
        assert to_binary(event)[0]["ce-subject"] == vector["header"]


@pytest.mark.parametrize("vector", BINDING.get("binary_vectors", []), ids=lambda vector: vector["event"]["id"])
def test_structured_events_become_binary_ones_as_in_the_vectors(vector: dict[str, Any]) -> None:
    (event,) = parse({"Content-Type": STRUCTURED}, json.dumps(vector["event"]).encode())
    headers, body = to_binary(event)
    assert headers.get("content-type") == vector["content_type"]
    assert body.decode() == vector["body"]
    assert vector.get("headers", {}).items() <= headers.items()
    assert not set(vector.get("absent", [])) & set(headers)


@pytest.mark.parametrize("name", BINDING.get("attributes", {}).get("present_means_non_empty", []))
def test_attributes_that_are_there_are_not_empty(name: str) -> None:
    with pytest.raises(InvalidEvent, match=name):
        parse({**HEADERS, f"ce-{name}": ""}, b"")


# --- the conformance scenarios, read from their Gherkin tables ---


def scenarios() -> list[Any]:
    """(request head, body, attributes, JSON data) of each example."""
    found: list[Any] = []
    if not SPECS.is_dir():
        return found
    text = (SPECS / "conformance" / "http-protocol-binding.feature").read_text()
    for scenario in text.split("Scenario Outline:")[1:]:
        message, data = re.findall(r'"""\n(.*?)"""', scenario, re.DOTALL)
        table = re.findall(r"\|\s*(\S+)\s*\|\s*(.*?)\s*\|\n", scenario.partition("the attributes are:")[2])
        attributes = {name: value for name, value in table if name not in ("key", "contentType")}
        examples = re.findall(r"\|\s*(\S[^|]*?)\s*\|\s*$", scenario.partition("Examples:")[2], re.MULTILINE)
        for content_type in examples[1:]:
            expected = {name: value.replace("<contentType>", content_type) for name, value in attributes.items()}
            request = message.replace("<contentType>", content_type)
            title = scenario.splitlines()[0].strip().replace("<contentType>", content_type)
            found.append(pytest.param(request, expected, data, id=title))
    return found


@needs_vectors
def test_every_scenario_is_read() -> None:
    assert len(scenarios()) == 4


@pytest.mark.parametrize(("request_text", "attributes", "data"), scenarios())
def test_conformance_scenarios(request_text: str, attributes: dict[str, str], data: str) -> None:
    lines = [line.removeprefix("        ") for line in request_text.splitlines()]
    head, body = lines[1 : lines.index("")], "\n".join(lines[lines.index("") + 1 :])
    headers = dict(line.split(": ", 1) for line in head)
    (event,) = parse(headers, body.encode())
    assert dict(event.attributes) == attributes
    assert json.loads(event.data or b"") == json.loads(data)


def samples() -> Iterator[Any]:
    if not SPECS.is_dir():
        return
    for file in ("v1.yaml", "v1_minimum.yaml"):
        # timestamps and the spec version stay text
        for index, sample in enumerate(yaml.load_all((SPECS / "conformance" / file).read_text(), yaml.BaseLoader)):
            yield pytest.param(sample, id=f"{file}-{index}")


@pytest.mark.parametrize("sample", list(samples()))
def test_conformance_samples_travel_in_both_modes(sample: dict[str, Any]) -> None:
    attributes = dict(sample["ContextAttributes"])
    # the block style of the YAML ends a value with a line feed, which no attribute may hold
    attributes |= {name: text.rstrip("\n") for name, text in attributes.pop("Extensions", {}).items()}
    event = CloudEvent(attributes, sample["Data"].encode())
    assert parse(*to_binary(event)) == [event]
    (again,) = parse(*to_structured(event))
    assert again.attributes == event.attributes
    if "json" in attributes.get("datacontenttype", ""):
        assert json.loads(again.data or b"") == json.loads(event.data or b"")
    else:
        assert again.data == event.data


def test_a_line_feed_in_an_attribute_is_refused() -> None:
    with pytest.raises(InvalidEvent, match=r"comexampleextension2 holds the character U\+000A"):
        parse({**HEADERS, "ce-comexampleextension2": "%7B%7D%0A"}, b"")


# --- modes ---


@pytest.mark.parametrize(
    ("headers", "body", "why"),
    [
        ({}, b"{}", "no header ce-id, ce-source, ce-specversion, ce-type"),
        ({"ce-id": "1", "ce-specversion": "1.0"}, b"", "no header ce-source, ce-type"),
        ({**HEADERS, "ce-specversion": "0.3"}, b"", "specversion is '0.3', must be '1.0'"),
        ({**HEADERS, "ce-datacontenttype": "text/plain"}, b"", "Content-Type"),
        ({**HEADERS, "ce-My_Ext": "1"}, b"", "'my_ext' is not allowed"),
        ({**HEADERS, "ce-data": "1"}, b"", "'data' is not allowed"),
        ({**HEADERS, "CE-ID": "2"}, b"", "ce-id is there twice"),
        ({**HEADERS, "content-type": "xyz"}, b"a", "no media type"),
        ({**HEADERS, "ce-subject": "caf\udce9"}, b"", r"U\+DCE9"),
        ({"content-type": "application/cloudevents+avro"}, b"", "is not known; use application/cloudevents"),
        ({"content-type": "application/cloudevents"}, b"{}", "is not known"),
        ({"content-type": STRUCTURED + "; charset=utf-16"}, b"{}", "JSON events are UTF-8"),
        ({"content-type": STRUCTURED}, b"", "expected an object at character 0, found the end"),
        ({"content-type": STRUCTURED}, b"[]", "expected an object"),
        ({"content-type": STRUCTURED}, b"{}}", "expected the end at character 2"),
        ({"content-type": STRUCTURED}, b"\xff", "not UTF-8 at byte 0"),
        ({"content-type": STRUCTURED}, b"[" * 100_000, "expected an object"),
        ({"content-type": STRUCTURED}, b'{"data":' + b"[" * 100_000, "too deeply nested"),
        ({"content-type": BATCHED}, b"{}", "expected an array"),
    ],
)
def test_what_is_no_event_is_refused_with_the_reason(headers: dict[str, str], body: bytes, why: str) -> None:
    with pytest.raises(InvalidEvent, match=why) as caught:
        parse(headers, body)
    assert caught.value.status == 400


def test_modes_are_chosen_by_content_type_in_any_case() -> None:
    event = json.dumps(MINIMAL).encode()
    assert parse({"CONTENT-TYPE": "Application/CloudEvents+JSON ; charset=UTF-8"}, event) == [CloudEvent(MINIMAL)]
    batch = b" [ " + event + b" , " + event + b" ] "
    assert parse({"content-type": BATCHED}, batch) == [CloudEvent(MINIMAL)] * 2
    assert parse({"content-type": BATCHED}, b"[]") == []


def test_the_body_of_a_structured_event_decides_over_repeated_headers() -> None:
    headers = {**HEADERS, "ce-id": "other", "content-type": STRUCTURED}
    assert parse(headers, json.dumps(MINIMAL).encode())[0].id == "1"


def test_which_answers_are_events() -> None:
    assert is_event(HEADERS)
    assert is_event({"Content-Type": STRUCTURED})
    assert is_event({"content-type": BATCHED})
    assert not is_event({"content-type": "application/json"})
    assert not is_event({name: value for name, value in HEADERS.items() if name != "ce-type"})


def test_limits_name_what_is_too_large() -> None:
    limits = Limits(body_bytes=100, headers_bytes=60, batch_events=1)
    with pytest.raises(EventTooLarge, match="has 101 bytes, at most 100") as caught:
        parse(HEADERS, b"x" * 101, limits)
    assert caught.value.status == 413
    with pytest.raises(EventTooLarge, match="more than 60 bytes of headers"):
        parse({**HEADERS, "ce-subject": "x" * 60}, b"", limits)
    event = json.dumps({"specversion": "1.0", "id": "1", "source": "s", "type": "t"}, separators=(",", ":"))
    with pytest.raises(EventTooLarge, match="attributes take more than 60 bytes") as caught:
        parse({"content-type": STRUCTURED}, event.replace('"t"', f'"{"t" * 60}"').encode(), Limits(headers_bytes=60))
    assert caught.value.status == 413
    long = event.replace('"t"', f'"{"t" * 60}"')
    with pytest.raises(EventTooLarge, match="attributes take more than 60 bytes"):
        parse({"content-type": BATCHED}, f"[{event},{long}]".encode(), Limits(headers_bytes=60))
    with pytest.raises(InvalidEvent, match="more than 1 items"):
        parse({"content-type": BATCHED}, f"[{event},{event}]".encode(), Limits(batch_events=1))


def test_an_event_without_content_type_makes_no_claim_about_its_data() -> None:
    (event,) = parse(HEADERS, b"\x00\xff")
    assert "datacontenttype" not in event.attributes
    assert "content-type" not in to_binary(event)[0]
    assert json.loads(event.to_json())["data_base64"] == "AP8="


# --- properties ---

# no control characters, surrogates (Cs) or noncharacters (in Cn)
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn")), max_size=12)
NAMES = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(lambda name: name not in {*CORE_NAMES, "data"})
CORE_NAMES = {"id", "source", "specversion", "type", "datacontenttype", "dataschema", "subject", "time"}
SOURCES = st.from_regex(r"(https?://[a-z]{1,8}(:[0-9]{2,4})?)?/[a-zA-Z0-9/._~%20-]{0,10}", fullmatch=True).filter(
    lambda text: re.search(r"%(?![0-9A-Fa-f]{2})", text) is None
)
TYPED = st.one_of(TEXT, st.booleans(), st.integers(-(2**31), 2**31 - 1))


@st.composite
def any_event(draw: st.DrawFn) -> CloudEvent:
    """An event that a structured message carries unchanged: JSON data has no space around it."""
    values: dict[str, str | int | bool] = {
        "specversion": "1.0",
        "id": draw(TEXT.filter(bool)),
        "type": draw(TEXT.filter(bool)),
        "source": draw(SOURCES),
        **draw(st.dictionaries(NAMES, TYPED, max_size=3)),
    }
    if draw(st.booleans()):
        values["subject"] = draw(TEXT.filter(bool))
        values["time"] = draw(st.datetimes()).isoformat() + draw(st.sampled_from(["Z", "+01:30", "-23:59"]))
    content_type = draw(st.sampled_from(["", "application/json", "a/b+json; x=y", "text/plain", "image/png"]))
    data = draw(
        st.binary(max_size=20) | TEXT.map(str.encode) | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    )
    if content_type:
        values["datacontenttype"] = content_type
    return CloudEvent.build(values, data.strip(b" \t\r\n") if "json" in content_type else data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(any_event())
def test_every_event_survives_structured_mode(event: CloudEvent) -> None:
    assert parse(*to_structured(event)) == [event]


@settings(max_examples=150, deadline=None)
@given(any_event())
def test_every_event_survives_binary_mode_but_for_types(event: CloudEvent) -> None:
    headers, body = to_binary(event)
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert parse(headers, body) == [CloudEvent(event.attributes, event.data)]


@given(st.text())
def test_header_values_come_back(text: str) -> None:
    if text.isascii() or not any(0xD800 <= ord(character) < 0xE000 for character in text):
        assert decode_header(encode_header(text)) == text


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=8).map(lambda name: f"ce-{name}"), st.text(max_size=8)), st.binary(max_size=40))
def test_hostile_requests_are_events_or_refused(headers: dict[str, str], body: bytes) -> None:
    for extra in (HEADERS, {"content-type": STRUCTURED}, {"content-type": BATCHED}):
        with contextlib.suppress(InvalidEvent):
            parse({**headers, **extra}, body)


def test_the_sdk_reads_what_we_send_and_we_read_what_it_sends() -> None:
    event = CloudEvent({**MINIMAL, "datacontenttype": "application/json", "subject": "plain"}, b'{"a":[1,2]}')
    for headers, body in (to_binary(event), to_structured(event)):
        theirs = sdk_from_http(headers, body)
        assert theirs["subject"] == "plain"
        assert theirs.data == {"a": [1, 2]}
    headers, body = sdk_to_binary(SdkEvent({**MINIMAL, "datacontenttype": "application/json"}, {"a": 1}))
    (ours,) = parse(headers, body)
    assert json.loads(ours.data or b"") == {"a": 1}
