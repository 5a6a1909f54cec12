"""The events themselves: CloudEvents 1.0 over HTTP in binary content mode.

Types and attributes are described in `docs/events.md` and, for machines, in `docs/events.schema.json`.
Spec: CloudEvents 1.0.2, HTTP protocol binding 1.0.2 section 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from cloudevents.conversion import to_binary
from cloudevents.exceptions import GenericException
from cloudevents.http import CloudEvent, from_http

from functions.contract.errors import InvalidEvent
from functions.contract.frames import Buffer

PREFIX = "dev.stagecraft.stage"
WAKE, WOKEN = f"{PREFIX}.wake.v1", f"{PREFIX}.woken.v1"
STEP, STEPPED = f"{PREFIX}.step.v1", f"{PREFIX}.stepped.v1"
RELEASE, RELEASED = f"{PREFIX}.release.v1", f"{PREFIX}.released.v1"
ERROR = f"{PREFIX}.error.v1"
REQUEST_TYPES = (WAKE, STEP, RELEASE)

JSON = "application/json"
TENSORS = "application/vnd.stagecraft.tensors+safetensors"

# HTTP binding, section 3.1.3.2: space, double quote, percent, and all that is not printable ASCII
_TO_ENCODE = re.compile(r"[^\x21\x23\x24\x26-\x7e]")


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `extensions` are our attributes: plan, stage, lane, step (requests); replica, computeus (replies)."""

    type: str
    source: str
    id: str
    content_type: str
    data: Buffer
    extensions: Mapping[str, str] = field(default_factory=dict)


def to_http(event: Event) -> tuple[dict[str, str], Buffer]:
    """Headers and body of the event in binary content mode."""
    attributes = {
        "type": event.type,
        "source": event.source,
        "id": event.id,
        "datacontenttype": event.content_type,
        **event.extensions,
    }
    attributes["time"] = None  # type: ignore[assignment]  # the SDK adds a time of its own unless told not to
    headers, _ = to_binary(CloudEvent(attributes, b""), data_marshaller=lambda data: data)
    return {name: _encoded(name, value) for name, value in headers.items() if name != "ce-time"}, event.data


def from_http_request(headers: Mapping[str, str], body: Buffer) -> Event:
    """The event in a request or a reply. Raises InvalidEvent for anything that is not binary-mode CloudEvents 1.0."""
    if headers.get("content-type", "").startswith("application/cloudevents"):
        raise InvalidEvent("stages take CloudEvents in binary content mode only (attributes as ce- headers)")
    if headers.get("ce-specversion") != "1.0":
        raise InvalidEvent(f"ce-specversion must be 1.0, got {headers.get('ce-specversion')!r}")
    for name in ("ce-type", "ce-id", "ce-source"):
        if not headers.get(name):
            raise InvalidEvent(f"the attribute {name} is missing or empty")
    try:
        # the data is passed around the SDK, which would decode it
        event = from_http(headers, b"", data_unmarshaller=lambda data: data)
    except (GenericException, ValueError, TypeError, KeyError) as error:
        raise InvalidEvent(f"not a CloudEvent: {error}") from None
    attributes = event.get_attributes()
    standard = {"specversion", "id", "source", "type", "time", "datacontenttype", "subject", "dataschema"}
    return Event(
        attributes["type"],
        _decoded("source", attributes["source"]),
        _decoded("id", attributes["id"]),
        headers.get("content-type", ""),
        body,
        {name: _decoded(name, str(value)) for name, value in attributes.items() if name not in standard},
    )


def _encoded(header: str, value: str) -> str:
    """The SDK leaves percent-encoding of attributes to its users."""
    if not header.startswith("ce-"):
        return value
    return _TO_ENCODE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), value)


def _decoded(name: str, value: str) -> str:
    try:
        return unquote_to_bytes(value).decode() if "%" in value else value
    except UnicodeDecodeError:
        raise InvalidEvent(f"the attribute {name} is not percent-encoded UTF-8: {value[:80]!r}") from None
