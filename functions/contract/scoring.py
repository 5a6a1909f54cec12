"""Scoring: whole texts pass the stages once, from event to event, with nobody in between but a broker.

    score(stage 0: tokens) -> score(stage 1: tokens, hidden) -> ... -> result

Each stage replies with the event for the next one, the last stage with a result event: a line of OpenAI's batch output.
`docs/scoring.md` describes the events for readers of other languages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import quote

import numpy as np

from functions.contract.errors import InvalidEvent
from functions.contract.events import PREFIX, Event
from functions.contract.frames import Buffer, Frame, Frames, pack
from functions.contract.messages import Int32Array, read_frames

SCORE = f"{PREFIX}.score.v1"
RESULT = "dev.stagecraft.batch.result.v1"
SPENT_PATH = "/spent"  # of a stage: takes results, so that the claims behind them can go

Want = Literal["logprobs", "embedding"]
Pooling = Literal["mean", "last"]

# extensions that a stage sets anew for the next one, or that are a broker's own; all others are passed along
_OWN = frozenset(("plan", "stage", "dataref", "usedref", "requestid"))
_BROKER = "knative"


@dataclass(frozen=True, slots=True)
class Ask:
    """What the last stage answers: log-probabilities of the tokens, or one vector a text."""

    want: Want = "logprobs"
    pooling: Pooling = "mean"  # of an embedding: the mean over all tokens, or the last token's

    def to_text(self) -> str:
        members = {"want": self.want} if self.want == "logprobs" else {"want": self.want, "pooling": self.pooling}
        return json.dumps(members, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Ask:
        """Raises InvalidEvent."""
        try:
            data = json.loads(text)
            ask = cls(**data)
        except (ValueError, TypeError, RecursionError):
            raise InvalidEvent('ask must be {"want": "logprobs"}, or {"want": "embedding", "pooling": ...}') from None
        if ask.want not in get_args(Want) or ask.pooling not in get_args(Pooling):
            raise InvalidEvent(
                f"want is {' or '.join(get_args(Want))}, pooling {' or '.join(get_args(Pooling))}; got {text[:100]}"
            )
        return ask


@dataclass(frozen=True, slots=True)
class Texts:
    """Whole texts, packed one after another: `tokens` int32 [sum of lengths], `hidden` [sum of lengths, hidden size] as
    they left the stage before; None for the first stage."""

    lengths: tuple[int, ...]
    tokens: Int32Array
    hidden: Frame | None = None
    ask: Ask = Ask()

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise InvalidEvent("lengths must name at least one text, and each has at least one token")
        if self.tokens.shape != (total,):
            raise InvalidEvent(f"the texts have {total} tokens, tokens has shape {list(self.tokens.shape)}")
        if self.hidden is not None and (len(self.hidden.shape) != 2 or self.hidden.shape[0] != total):
            raise InvalidEvent(f"hidden must be [{total}, hidden size] like the tokens, got {list(self.hidden.shape)}")

    def to_body(self) -> list[Buffer]:
        """Safetensors bytes, in parts."""
        arrays = {"lengths": Frame.of(np.array(self.lengths, dtype=np.int32)), "tokens": Frame.of(self.tokens)}
        if self.hidden is not None:
            arrays["hidden"] = self.hidden
        return pack(Frames(arrays, {"ask": self.ask.to_text()}))

    @classmethod
    def from_body(cls, body: Buffer) -> Texts:
        """Views into `body`. Raises InvalidEvent."""
        frames = read_frames(body, required={"lengths": "I32", "tokens": "I32"}, optional={"hidden"})
        lengths = frames.arrays["lengths"].numpy()
        if lengths.ndim != 1:
            raise InvalidEvent(f"lengths must be int32 [n], got {list(lengths.shape)}")
        return cls(
            tuple(lengths.tolist()),
            frames.arrays["tokens"].numpy(),
            frames.arrays.get("hidden"),
            Ask.from_text(frames.metadata.get("ask", "{}")),
        )


def next_id(event: Event) -> str:
    """The id of the score event that answers `event`, and the name of its claim: the same for every delivery."""
    return hashlib.sha256(f"{event.source}\n{event.id}".encode()).hexdigest()[:32]


def next_event(event: Event, plan: str, stage: int, model: str, data: Buffer, dataref: str | None) -> Event:
    """The score event for stage `stage`, made by the stage before it out of `event`."""
    more = {"plan": plan, "stage": str(stage), **({} if dataref is None else {"dataref": dataref})}
    source = f"/stagecraft/{quote(model, safe='')}/stages/{stage - 1}"
    return Event(SCORE, source, next_id(event), event.content_type, data, {**_inherited(event), **more})


def result_event(event: Event, model: str, status: int, body: Mapping[str, Any]) -> Event:
    """The result of the request that `event` belongs to: `body` is what an endpoint would have answered with `status`.

    Without `customid` the request's id stands for it."""
    extensions = _inherited(event)
    request = extensions["requestid"]
    custom_id = extensions.setdefault("customid", request)
    digest = hashlib.sha256(f"{extensions.get('batch', '')}\n{request}".encode()).hexdigest()[:32]
    response = {"status_code": status, "request_id": f"req_{digest}", "body": body}
    line = {"id": f"batch_req_{digest}", "custom_id": custom_id, "response": response, "error": None}
    # half of a surrogate pair is no UTF-8; backslashes make it a JSON escape
    data = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
    source = f"/stagecraft/{quote(model, safe='')}"
    return Event(RESULT, source, f"{request}.result", "application/json", data, extensions)


def _inherited(event: Event) -> dict[str, str]:
    """What every event of a request carries, from the first to the result. `usedref` is the claim of the one before."""
    passed = {
        name: value for name, value in event.extensions.items() if name not in _OWN and not name.startswith(_BROKER)
    }
    passed["requestid"] = event.extensions.get("requestid", event.id)
    if dataref := event.extensions.get("dataref"):
        passed["usedref"] = dataref
    return passed
