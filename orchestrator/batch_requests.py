"""Request events of batches read, and their result events made. Pure.

All that a result holds comes out of the request event: ids, seed and `created` too. So a request that is delivered
twice has one result, whoever computes it and whenever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

from functions.contract.sampling import SEED_BOUND
from knative.eventing.event import CloudEvent, InvalidEvent
from orchestrator.batches.events import CANCEL, REQUEST, RESULT
from orchestrator.batches.lines import CANCELLED, CHAT, COMPLETIONS, CUSTOM_ID_CHARACTERS_MAX, error_output
from orchestrator.generation import GenerationError
from orchestrator.openai_requests import invalid, parse_json

_TIMES = ("time", "knativearrivaltime")  # said by the sender; else by the broker that took it in


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """`line` is a line of OpenAI's batch input; of its members only custom_id has been checked."""

    source: str
    id: str
    batch: str  # "" where the event belongs to none
    custom_id: str
    created_s: int  # Unix time
    line: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """The same for every delivery of the request."""
        return self.source, self.id

    @property
    def digest(self) -> str:
        """Names the request to those outside: 128 bits in hexadecimal."""
        return hashlib.sha256(f"{self.source}\n{self.id}".encode()).hexdigest()[:32]

    @property
    def request_id(self) -> str:
        return f"req_{self.digest}"


def check_known(event: CloudEvent) -> None:
    """Raises InvalidEvent for a type that is not taken."""
    if event.type not in (REQUEST, CANCEL):
        raise InvalidEvent(f"events of type {event.type!r} are not taken here; known are {REQUEST} and {CANCEL}")


def read_request(event: CloudEvent, arrived_s: float) -> BatchRequest:
    """`arrived_s` counts where the event has no time. Raises InvalidEvent where no answer could be addressed."""
    line = _data(event)
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_CHARACTERS_MAX:
        raise InvalidEvent(
            f"the data of the event needs a custom_id, a text of 1 to {CUSTOM_ID_CHARACTERS_MAX} characters"
        )
    request = BatchRequest(
        event.source, event.id, event.attributes.get("batch", ""), custom_id, _created_s(event, arrived_s), line
    )
    _result(request, "", b"")  # raises where the custom_id cannot be the attribute of an event
    return request


def read_cancel(event: CloudEvent) -> str:
    """The batch. Raises InvalidEvent."""
    batch = _data(event).get("batch")
    if not isinstance(batch, str) or not batch:
        raise InvalidEvent('the data of a cancel event is {"batch": ID}')
    return batch


def question(request: BatchRequest) -> tuple[str, dict[str, Any]]:
    """COMPLETIONS or CHAT, and the body of a request there. Raises GenerationError (400).

    A request without a seed gets one of its own, so that its text does not depend on who computes it when."""
    url, body = request.line.get("url"), request.line.get("body")
    if request.line.get("method") != "POST":
        raise invalid(f"method must be POST, got {_short(request.line.get('method'))}", "method", "invalid_method")
    if url not in (COMPLETIONS, CHAT):
        raise invalid(f"url must be {COMPLETIONS} or {CHAT}, got {_short(url)}", "url", "invalid_url")
    if not isinstance(body, dict):
        raise invalid(f"body must be a JSON object, got {_short(body)}", "body", "invalid_type")
    if body.get("stream"):
        raise invalid("requests of a batch are not streamed", "stream", "unsupported_parameter")
    seed = body.get("seed")
    return url, {**body, "seed": int(request.digest, 16) % SEED_BOUND if seed is None else seed}


def is_result(error: GenerationError) -> bool:
    """Whether the error is the answer; else another try may heal it."""
    return 400 <= error.status < 500 and error.status not in (408, 409, 429)


def answered(request: BatchRequest, model: str, status: int, body: Mapping[str, Any]) -> CloudEvent:
    """The result event of what the endpoint answered."""
    response = {"status_code": status, "request_id": request.request_id, "body": body}
    line = {"id": _line_id(request), "custom_id": request.custom_id, "response": response, "error": None}
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    # half of a surrogate pair is no UTF-8; backslashes make it a JSON escape
    return _result(request, model, text.encode(errors="backslashreplace"))


def unanswered(request: BatchRequest, model: str, code: str, message: str) -> CloudEvent:
    """The result event of a request that is not tried again."""
    return _result(request, model, error_output(_line_id(request), request.custom_id, code, message))


def cancelled(request: BatchRequest, model: str) -> CloudEvent:
    return unanswered(request, model, CANCELLED, f"the batch {request.batch} was cancelled")


def _result(request: BatchRequest, model: str, line: bytes) -> CloudEvent:
    attributes = {
        "specversion": "1.0",
        "type": RESULT,
        "source": f"/stagecraft/{quote(model, safe='')}",
        "id": f"{request.id}.result",
        "datacontenttype": "application/json",
        "customid": request.custom_id,
        "requestid": request.id,
    }
    return CloudEvent.build({**attributes, **({"batch": request.batch} if request.batch else {})}, line)


def _line_id(request: BatchRequest) -> str:
    return f"batch_req_{request.digest}"


def _data(event: CloudEvent) -> dict[str, Any]:
    try:
        return parse_json(event.data or b"")
    except GenerationError as error:
        raise InvalidEvent(f"the data of the event cannot be read: {error}") from None


def _created_s(event: CloudEvent, arrived_s: float) -> int:
    for name in _TIMES:
        try:
            return int(datetime.fromisoformat(event.attributes[name].upper()).timestamp())
        except (KeyError, ValueError, OverflowError):
            continue
    return int(arrived_s)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
