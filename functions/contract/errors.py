"""What can go wrong at a stage, each with an HTTP status and whether another try can heal it.

    StageError
    ├── InvalidEvent       400  not a CloudEvent of ours, or its data breaks the contract
    ├── PlanMismatch       409  the event belongs to another plan or stage
    ├── WrongPosition      409  a gap: the step starts past what the stage has cached (names the position)
    ├── EventTooLarge      413  the body is over the stage's limit
    ├── PromptTooLong      422  a position past what the model can address
    ├── KvExhausted        429  the KV budget is used up now; later it may not be
    ├── StageFailure       500  a fault in the stage itself
    ├── ClaimsUnavailable  503  data that an event only refers to cannot be read or written now
    └── NotReady           503  still loading, or shutting down

An unknown sequence is a `WrongPosition` whose position is 0: the remedy, replay from there, is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class StageError(Exception):
    """An error that a stage answers as an error event. `str(error)` is meant for people."""

    code: ClassVar[str] = "stage_error"
    status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False

    def to_json(self) -> dict[str, Any]:
        """The data of the error event; `from_json` is the inverse."""
        return {"code": self.code, "message": str(self), "retriable": self.retriable}


class InvalidEvent(StageError):
    code = "invalid_event"
    status = 400


class PlanMismatch(StageError):
    code = "plan_mismatch"
    status = 409


class WrongPosition(StageError):
    """`positions` says how many tokens of a sequence the stage has cached, for each sequence of the step that starts
    past that: a step must start there or earlier."""

    code = "wrong_position"
    status = 409
    retriable = True

    def __init__(self, message: str, positions: Mapping[int, int]) -> None:
        super().__init__(message)
        self.positions = dict(positions)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "positions": {str(s): position for s, position in self.positions.items()}}


class EventTooLarge(StageError):
    code = "event_too_large"
    status = 413


class PromptTooLong(StageError):
    code = "prompt_too_long"
    status = 422


class KvExhausted(StageError):
    code = "kv_exhausted"
    status = 429
    retriable = True


class StageFailure(StageError):
    code = "stage_failure"
    status = 500


class ClaimsUnavailable(StageError):
    code = "claims_unavailable"
    status = 503
    retriable = True


class NotReady(StageError):
    code = "not_ready"
    status = 503
    retriable = True


_BY_CODE: dict[str, type[StageError]] = {
    kind.code: kind
    for kind in (
        InvalidEvent,
        PlanMismatch,
        WrongPosition,
        EventTooLarge,
        PromptTooLong,
        KvExhausted,
        StageFailure,
        ClaimsUnavailable,
        NotReady,
    )
}


def from_json(data: Any) -> StageError:
    """The error that a stage reported. Anything unreadable becomes a `StageFailure` that quotes it."""
    try:
        kind, message = _BY_CODE[data["code"]], str(data["message"]) or "the stage gave no reason"
        if kind is WrongPosition:
            return WrongPosition(message, {int(s): int(position) for s, position in data["positions"].items()})
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return StageFailure(f"the stage answered an error that is not one of ours: {str(data)[:200]}")
    return kind(message)
