"""The steps of a lane that are on their way through the stages, oldest first. No I/O and no clock.

    step 3   stage 0 | stage 1 | .......       a step enters a stage when the one before it has left that stage
    step 4           | stage 0 | stage 1       answers are booked in the order of the steps

When one fails, nothing more is sent, those behind it go no further, and those before it come to their end and are
booked. Then all that were not are as if they had never been sent: a stage computes a repeated step anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from functions.contract.messages import Sampled, Step
from orchestrator import lanes
from orchestrator.generation import Token
from orchestrator.lanes import Sequence


@dataclass(slots=True, eq=False)
class Flight:
    """A step on its way. `sequences` are those of its slices, in their order. Once it has ended it has samples or an
    error, or neither where it was stopped on its way."""

    step: Step
    sequences: Items[Sequence]
    asks: bool  # for a sample
    passed: int = 0  # stages that have answered it
    ended: bool = False
    samples: Items[Sampled] | None = None
    error: Exception | None = None


class Window:
    """As many steps as there are stages to keep busy (`spread`), each in another. One more may wait between stages, so
    that a stage which is done early need not wait for the slowest; but not where a sequence waits for its token, which
    would then be a step further away."""

    def __init__(self, spread: int) -> None:
        self._spread = spread
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def takes_more(self) -> bool:
        """Whether another step may follow: all went well so far, and the first stage is free."""
        if not self._flights:
            return True
        if self._flights[-1].passed == 0 or any(flight.error for flight in self._flights):
            return False
        ahead = self._spread > 1 and not any(flight.asks for flight in self._flights)
        return len(self._flights) < self._spread + ahead

    def send(self, sequences: Items[Sequence], tokens_max: int) -> Flight | None:
        """The lane's next step, from now on on its way. None if there is none to be sent now."""
        planned = lanes.next_step(sequences, tokens_max, self._spread, beside_others=bool(self._flights))
        if planned is None:
            return None
        step, chosen = planned
        flight = Flight(step, chosen, asks=any(piece.sample for piece in step.slices))
        for sequence, piece in zip(flight.sequences, flight.step.slices, strict=True):
            sequence.sent = piece.start + piece.length
            sequence.in_flight += 1
        self._flights.append(flight)
        return flight

    def stops(self, flight: Flight) -> bool:
        """Whether a step goes no further because one before it has failed."""
        for other in self._flights:
            if other is flight:
                return False
            if other.error is not None:
                return True
        return False

    def book(self) -> list[tuple[Sequence, Token]] | None:
        """Books the oldest step if it has been answered; its new tokens."""
        if not self._flights or self._flights[0].samples is None:
            return None
        flight = self._flights[0]
        assert flight.samples is not None  # see above
        try:
            tokens = lanes.progress(flight.sequences, flight.step, flight.samples)
        except ValueError as error:
            flight.samples, flight.error = None, error
            return None
        self._flights.popleft()
        for sequence in flight.sequences:
            sequence.in_flight -= 1
        return tokens

    def clear(self) -> tuple[Flight, ...]:
        """After a failure, once every step has ended: what could not be booked, the one that failed first at the front.
        Its sequences are where the last booked step has left them. Empty as long as there is nothing to clear."""
        if not self._flights or self._flights[0].error is None or not all(flight.ended for flight in self._flights):
            return ()
        cleared = tuple(self._flights)
        self._flights.clear()
        for flight in cleared:
            for sequence in flight.sequences:
                sequence.in_flight -= 1
                sequence.sent = sequence.cached
        return cleared
