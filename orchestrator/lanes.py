"""What a lane sends next and what its answers mean. No I/O and no clock.

A sequence keeps its whole history (prompt and answer). `cached` says how much of it the stages hold, so one rule covers
prefill, decode and replay: send what is not cached yet, and ask for a sample when that reaches the end of the history.
Losing a cache is setting `cached` back.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from functions.contract.messages import Opening, Sampled, Slice, Step
from orchestrator.generation import FinishReason, GenerationRequest, Token


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation on its way. `history` is prompt and answer so far."""

    id: int
    request: GenerationRequest
    history: list[int] = field(default_factory=list)
    cached: int = 0
    failures: int = 0  # steps in a row without progress
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.history = list(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.history) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that the stages have yet to see."""
        return len(self.history) - self.cached

    @property
    def is_batch(self) -> bool:
        """Whether interactive sequences go first."""
        return self.request.priority == "batch"

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.generated > 0

    def take_back(self, position: int) -> None:
        """The stages hold only `position` tokens (or fewer than was thought): the rest is sent again."""
        self.cached = max(0, min(self.cached, position))

    def accept(self, sampled: Sampled) -> Token:
        """Appends the sampled token and says whether it ends the sequence."""
        self.history.append(sampled.token)
        return Token(sampled.token, sampled.logprob, sampled.top, self._finish(sampled.token))

    def _finish(self, token: int) -> FinishReason | None:
        if token in self.request.stop_ids:
            return "stop"
        return "length" if self.generated >= self.request.max_tokens else None


def next_step(sequences: Items[Sequence], tokens_max: int) -> Step:
    """The next pass of a lane: every decoding sequence's one token, then prefill chunks, oldest first, until
    `tokens_max` tokens are reached; in both, interactive sequences before those of batches. At least one sequence gets
    a slice."""
    # those with the shortest answers first: if not all fit, none waits for ever
    decoding = sorted((s for s in sequences if s.decoding), key=lambda s: (s.is_batch, s.generated))
    prefilling = len(decoding) < len(sequences)
    chosen = decoding[: max(1, tokens_max - prefilling)]  # a prompt gets on by a token at least
    left = tokens_max - len(chosen)
    slices = [Slice(s.id, s.cached, 1) for s in chosen]
    for sequence in sorted(sequences, key=lambda s: s.is_batch):
        if left <= 0:
            break
        if not sequence.decoding:
            length = min(left, sequence.pending)
            slices.append(Slice(sequence.id, sequence.cached, length, length == sequence.pending))
            chosen.append(sequence)
            left -= length
    tokens = [t for s, piece in zip(chosen, slices, strict=True) for t in s.history[piece.start : piece.end]]
    openings = {s.id: Opening(s.request.params, len(s.request.prompt)) for s in chosen if s.cached == 0}
    return Step(tuple(slices), np.array(tokens, dtype=np.int32), None, openings)


def progress(sequences: Items[Sequence], step: Step, samples: Items[Sampled]) -> list[tuple[Sequence, Token]]:
    """Books an answered step: what is cached now, and the new tokens. Raises ValueError for an answer to another
    step, before anything is booked."""
    asked = [(piece.sequence, piece.end) for piece in step.slices if piece.sample]
    if [(sampled.sequence, sampled.position) for sampled in samples] != asked:
        raise ValueError(f"{len(samples)} samples came back that are not the {len(asked)} asked for")
    by_id = {s.id: s for s in sequences}
    for piece in step.slices:
        by_id[piece.sequence].cached = piece.end
        by_id[piece.sequence].failures = 0
    return [(by_id[sampled.sequence], by_id[sampled.sequence].accept(sampled)) for sampled in samples]


@dataclass(frozen=True, slots=True)
class LaneRule:
    """How lanes are filled. `spread` is the number of stages: as many lanes keep all of them busy."""

    spread: int
    width: int  # sequences
    lanes_max: int = 0  # 0: no bound
    age_s: float = 5.0


@dataclass(frozen=True, slots=True)
class LaneState:
    """A lane as a new sequence finds it: `age_s` since it was opened, `fits` if the replicas it is tied to have the
    memory."""

    sequences: int
    age_s: float = 0.0
    fits: bool = True


def place(states: Items[LaneState], rule: LaneRule, *, may_open: bool = True) -> int | None:
    """The lane a new sequence joins: an index into `states`, their number for a lane yet to be opened, None to wait.

    Lanes fill the pipeline first, then they are packed, then there are more of them. One that has grown old takes
    nobody, so that it ends and its successor finds the replicas that have come since; only where no lane may be opened
    (`lanes_max`, or `may_open` is false for want of memory) is an old lane better than waiting."""
    young = [state.age_s < rule.age_s for state in states]
    may_open = may_open and (rule.lanes_max == 0 or len(states) < rule.lanes_max)
    open_to_all = [i for i, state in enumerate(states) if state.fits and state.sequences < rule.width]
    room = [i for i in open_to_all if young[i]]
    emptiest = min(room, key=lambda i: states[i].sequences, default=None)
    if may_open and sum(young) < rule.spread and (emptiest is None or states[emptiest].sequences > 0):
        return len(states)
    if emptiest is not None:
        return emptiest
    return len(states) if may_open else min(open_to_all, key=lambda i: states[i].sequences, default=None)
