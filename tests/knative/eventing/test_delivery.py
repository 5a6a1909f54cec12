"""Delivery settings, waits, TTL and dead letters, as Knative has them."""

from __future__ import annotations

import base64

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from knative.errors import ValidationError
from knative.eventing import delivery
from knative.eventing.delivery import DEFAULT, DeliverySpec, effective, parse_delivery, wait_s
from knative.eventing.destination import Destination
from knative.eventing.durations import parse_iso_duration_s
from knative.eventing.event import CloudEvent

EVENT = CloudEvent({"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}, b"data")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("PT0.2S", 0.2), ("PT0,2S", 0.2), ("PT1M30S", 90), ("P1DT12H", 129_600), ("P2W", 1_209_600), ("-PT1S", -1),
        ("PT0S", 0), ("P1Y", 31_556_952), ("PT1.5H", 5400), ("+PT2S", 2),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_iso_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "P", "PT", "1S", "PT1", "PT1S1M", "P1DT", "PT-1S", "pt1s", "200ms", "PT١S", "PT1S "]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="ISO 8601"):
        parse_iso_duration_s(text)


def test_a_full_block_is_read() -> None:
    spec = parse_delivery(
        yaml.safe_load("""
        deadLetterSink: {ref: {apiVersion: serving.knative.dev/v1, kind: Service, name: dead}, uri: /letters}
        retry: 3
        backoffPolicy: linear
        backoffDelay: PT0.5S
        timeout: PT30S
        retryAfterMax: PT2M
        format: json
        """)
    )
    sink = Destination("/letters", "serving.knative.dev/v1", "Service", "dead")
    assert spec == DeliverySpec(3, "linear", 0.5, 30.0, sink, 120.0, "json")


@pytest.mark.parametrize(
    ("tree", "problems"),
    [
        ("5", ["invalid value: 5: spec.delivery"]),
        ("{retry: -1}", ["invalid value: -1: spec.delivery.retry"]),
        ("{retry: true}", ["invalid value: true: spec.delivery.retry"]),
        ("{retries: 1}", ['unknown field "spec.delivery.retries"']),
        ("{backoffPolicy: random}", ["invalid value: random: spec.delivery.backoffPolicy"]),
        ("{backoffDelay: 200ms}", ["invalid value: 200ms: spec.delivery.backoffDelay"]),
        ("{timeout: PT0S}", ["invalid value: PT0S: spec.delivery.timeout"]),
        ("{timeout: 5}", ["invalid value: 5: spec.delivery.timeout"]),
        ("{retryAfterMax: -PT1S}", ["invalid value: -PT1S: spec.delivery.retryAfterMax"]),
        ("{format: avro}", ["invalid value: avro: spec.delivery.format"]),
        (
            "{deadLetterSink: {}}",
            ["expected at least one, got none: spec.delivery.deadLetterSink.ref, spec.delivery.deadLetterSink.uri"],
        ),
        ("{deadLetterSink: {uri: /relative}}", ["invalid value: /relative: spec.delivery.deadLetterSink.uri"]),
        ("{deadLetterSink: {uri: 'http://a:b'}}", ["invalid value: http://a:b: spec.delivery.deadLetterSink.uri"]),
        ("{deadLetterSink: {ref: {name: x}}}", ["missing field(s): spec.delivery.deadLetterSink.ref.apiVersion, "]),
        (
            "{deadLetterSink: {ref: {apiVersion: v1, kind: Service, name: x}, uri: 'http://a'}}",
            ["an absolute URI is not allowed beside a ref: spec.delivery.deadLetterSink.ref"],
        ),
        ("{retry: x, format: y}", ["invalid value: x: spec.delivery.retry", "invalid value: y: spec.delivery.format"]),
    ],
)
def test_wrong_blocks_are_named_by_path(tree: str, problems: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_delivery(yaml.safe_load(tree))
    assert len(caught.value.problems) == len(problems)
    for found, begins in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(begins)


def test_a_trigger_replaces_the_brokers_block_but_not_its_dead_letter_sink() -> None:
    sink = Destination("http://dead/")
    broker = DeliverySpec(retry=5, backoff_policy="linear", backoff_delay_s=1.0, timeout_s=9.0, dead_letter=sink)
    assert effective(None, None) == DEFAULT
    assert effective(None, broker) == broker
    assert effective(DeliverySpec(retry=1), broker) == DeliverySpec(retry=1, dead_letter=sink)
    own = DeliverySpec(dead_letter=Destination("http://own/"))
    assert effective(own, broker) == own
    assert effective(DeliverySpec(), None) == DeliverySpec()


def test_waits_are_knatives() -> None:
    assert [wait_s(DEFAULT, retry) for retry in range(10)] == pytest.approx(
        [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4]
    )
    linear = DeliverySpec(retry=3, backoff_policy="linear", backoff_delay_s=2.0)
    assert [wait_s(linear, retry) for retry in range(3)] == [0.0, 2.0, 4.0]
    assert wait_s(DeliverySpec(retry=3, backoff_policy="linear"), 2) == 0.0
    assert wait_s(DeliverySpec(retry=3, backoff_delay_s=2.0), 2) == 0.0


def test_retry_after_counts_only_where_allowed() -> None:
    spec = DeliverySpec(backoff_policy="linear", backoff_delay_s=1.0)
    assert wait_s(spec, 2, retry_after_s=60.0) == 2.0
    for most, expected in ((0.0, 2.0), (30.0, 30.0), (90.0, 60.0), (1.0, 2.0)):
        allowing = DeliverySpec(backoff_policy="linear", backoff_delay_s=1.0, retry_after_max_s=most)
        assert wait_s(allowing, 2, retry_after_s=60.0) == expected


@pytest.mark.parametrize(
    ("status", "value", "seconds"),
    [
        (429, "7", 7.0),
        (503, " 7 ", 7.0),
        (500, "7", None),
        (None, None, None),
        (429, None, None),
        (429, "soon", None),
        (429, "-7", None),
        (429, "Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        (429, "Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
    ],
)
def test_retry_after_headers(status: int | None, value: str | None, seconds: float | None) -> None:
    assert delivery.parse_retry_after_s(status, value, now_s=60.0) == seconds


@given(st.integers(0, 2**31 - 1))
def test_waits_are_finite_after_any_number_of_retries(retries: int) -> None:
    assert 0 <= wait_s(DEFAULT, retries) < 1e12


def test_which_statuses_succeed_and_which_are_retried() -> None:
    assert [status for status in range(100, 600) if delivery.is_success(status)] == list(range(200, 300))
    retried = [status for status in range(100, 600) if delivery.is_retryable(status)]
    assert retried == [404, 408, 409, 429, *range(500, 600)]
    assert delivery.is_retryable(None)
    assert not delivery.is_success(None)


def test_a_loop_ends_by_ttl() -> None:
    event, passes = delivery.entering(EVENT), 0
    while event is not None:
        passes += 1
        assert delivery.ttl(event) == 256 - passes
        assert "knativebrokerttl" not in delivery.without_ttl(event).attributes
        event = delivery.entering(delivery.with_ttl(EVENT, delivery.ttl(event) or 0))
    assert passes == 255


@pytest.mark.parametrize(
    ("text", "left"),
    [("7", 6), ("1", None), ("0", None), ("-5", None), ("many", 255), ("99999999999", 255), ("", 255), ("1000", 999)],
)
def test_what_senders_write_as_ttl(text: str, left: int | None) -> None:
    entered = delivery.entering(EVENT.changed({"knativebrokerttl": text}))
    assert (None if entered is None else delivery.ttl(entered)) == left


def test_dead_letters_say_where_why_and_what() -> None:
    letter = delivery.dead_letter(EVENT, "http://subscriber/", 500, b"first\nsecond")
    assert letter.data == EVENT.data
    assert letter.attributes["knativeerrordest"] == "http://subscriber/"
    assert letter.values()["knativeerrorcode"] == 500
    assert base64.b64decode(letter.attributes["knativeerrordata"]) == b"first\nsecond"


def test_long_answers_are_cut_in_dead_letters() -> None:
    data = delivery.dead_letter(EVENT, "http://s/", 400, b"x" * 5000).attributes["knativeerrordata"]
    assert len(data) == 1024
    assert base64.b64decode(data) == b"x" * 768
    assert delivery.dead_letter(EVENT, "http://s/", 400, b"").attributes["knativeerrordata"] == ""
