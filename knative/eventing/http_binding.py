"""CloudEvents over HTTP, in binary, structured and batched mode (CloudEvents HTTP protocol binding 1.0.2).

Own code instead of the CloudEvents SDK (1.12), which does no percent-encoding of header values, knows no batches, and
takes a request for an event of spec version 0.3 or for one without a needed header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from knative.eventing.attributes import charset
from knative.eventing.event import REQUIRED, CloudEvent, InvalidEvent

STRUCTURED = "application/cloudevents+json"
BATCHED = "application/cloudevents-batch+json"
_PREFIX = "ce-"
_TO_ENCODE = re.compile(r"[^\x21\x23\x24\x26-\x7e]")  # all but printable ASCII without space, double quote and percent


class EventTooLarge(InvalidEvent):
    status = 413


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold. Knative itself has no limit but Go's for headers (1 MiB)."""

    body_bytes: int = 32 << 20
    headers_bytes: int = 1 << 20  # of all attributes, names included: any event may leave in binary mode, as headers
    batch_events: int = 1000


def is_event(headers: Mapping[str, str]) -> bool:
    """Whether a request or reply carries events: a CloudEvents content type, or all four needed attributes."""
    lowered = {name.lower(): value for name, value in headers.items()}
    if lowered.get("content-type", "").lower().startswith("application/cloudevents"):
        return True
    return all(_PREFIX + name in lowered for name in REQUIRED)


def parse(headers: Mapping[str, str], body: bytes, limits: Limits = Limits()) -> list[CloudEvent]:
    """The events of a request or reply: one, or any number in batched mode. All or none.

    Header names may have any case. Raises InvalidEvent, EventTooLarge.
    """
    if len(body) > limits.body_bytes:
        raise EventTooLarge(
            f"the body has {len(body)} bytes, at most {limits.body_bytes} are taken; pass a reference to the data"
        )
    content_type = _single(headers, "content-type").strip()
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type.startswith("application/cloudevents"):
        return [_from_binary(headers, body, content_type, limits)]
    if charset(content_type) not in ("", "utf-8", "utf8", "us-ascii"):
        raise InvalidEvent(f"the content type says charset {charset(content_type)}; JSON events are UTF-8")
    if media_type == STRUCTURED:
        return [_bounded(CloudEvent.from_json(body), limits)]
    if media_type == BATCHED:
        return [_bounded(event, limits) for event in CloudEvent.from_json_batch(body, events_max=limits.batch_events)]
    raise InvalidEvent(f"the event format {media_type} is not known; use {STRUCTURED}, {BATCHED} or binary mode")


def to_binary(event: CloudEvent) -> tuple[dict[str, str], bytes]:
    """Headers and body in binary mode, which has no types: a reader gets every extension as a string.

    Without a datacontenttype there is no Content-Type header; keep the HTTP client from adding one.
    """
    headers = {
        _PREFIX + name: encode_header(text) for name, text in event.attributes.items() if name != "datacontenttype"
    }
    if "datacontenttype" in event.attributes:
        headers["content-type"] = event.attributes["datacontenttype"]
    return headers, event.data or b""


def to_structured(event: CloudEvent) -> tuple[dict[str, str], bytes]:
    """Headers and body in structured mode."""
    return {"content-type": STRUCTURED}, event.to_json()


def encode_header(text: str) -> str:
    """An attribute as a header value: space, double quote, percent and what is not printable ASCII as %XY."""
    return _TO_ENCODE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), text)


def decode_header(value: str) -> str:
    """An attribute out of a header value; one round of decoding. Raises ValueError if the bytes are not UTF-8."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    if "%" not in value:
        return value
    raw = re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), value.encode())
    return raw.decode()


def _bounded(event: CloudEvent, limits: Limits) -> CloudEvent:
    if sum(len(name) + len(text) for name, text in event.attributes.items()) > limits.headers_bytes:
        raise EventTooLarge(f"the attributes take more than {limits.headers_bytes} bytes; long things belong in data")
    return event


def _from_binary(headers: Mapping[str, str], body: bytes, content_type: str, limits: Limits) -> CloudEvent:
    attributes: dict[str, str] = {}
    size_bytes = 0
    for header, value in headers.items():
        name = header.lower().removeprefix(_PREFIX)
        if len(name) == len(header):
            continue
        size_bytes += len(header) + len(value)
        if size_bytes > limits.headers_bytes:
            raise EventTooLarge(f"the attributes take more than {limits.headers_bytes} bytes of headers")
        if name == "datacontenttype":
            raise InvalidEvent("there is a header ce-datacontenttype; say the type of the data in Content-Type")
        if name in attributes:
            raise InvalidEvent(f"the header {_PREFIX}{name} is there twice")
        attributes[name] = _decoded(name, value)
    _expect_required(attributes)
    if content_type:
        attributes["datacontenttype"] = content_type
    return CloudEvent(attributes, body)


def _decoded(name: str, value: str) -> str:
    try:
        return decode_header(value.strip(" \t"))
    except ValueError:
        raise InvalidEvent(f"the header {_PREFIX}{name} is not percent-encoded UTF-8: {value[:80]!r}") from None


def _expect_required(attributes: Mapping[str, str]) -> None:
    missing = [_PREFIX + name for name in REQUIRED if name not in attributes]
    if missing:
        raise InvalidEvent(
            f"not a CloudEvent: no header {', '.join(missing)}; "
            f"send the attributes as {_PREFIX} headers, or a JSON event as {STRUCTURED}"
        )


def _single(headers: Mapping[str, str], wanted: str) -> str:
    found = [value for name, value in headers.items() if name.lower() == wanted]
    if len(found) > 1:
        raise InvalidEvent(f"the header {wanted} is there {len(found)} times")
    return found[0] if found else ""
