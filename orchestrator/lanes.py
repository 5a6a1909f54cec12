"""What a lane sends next and what its answers mean. No I/O and no clock.

A sequence keeps its whole history (prompt and answer). `cached` says how much of it the stages hold, and `sent`, which
runs ahead of it, how much is with them or on its way; so one rule covers prefill, decode and replay: send what has not
been sent yet, and ask for a sample when that reaches the end of the history. Losing a cache is setting both back.

With work on its way a prompt goes on with its next chunk; an answer waits for the token that comes next in it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from functions.contract.messages import Opening, Sampled, Slice, Step
from orchestrator.generation import FinishReason, GenerationRequest, Token

# a chunk costs a pass over the weights and a hop for each stage, so it is not made shorter than this
_CHUNK_TOKENS_MIN = 64
# c chunks take (c + stages - 1) / c of the time that one stage needs for all of them: 1/4 more at the most
_CHUNKS_PER_STAGE = 4


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation on its way. `history` is prompt and answer so far."""

    id: int
    request: GenerationRequest
    history: list[int] = field(default_factory=list)
    cached: int = 0
    sent: int = 0
    in_flight: int = 0  # steps on their way that it takes part in
    failures: int = 0  # steps in a row without progress
    cancelled: bool = False
    key: str = field(default="", repr=False)  # of its lane

    def __post_init__(self) -> None:
        self.history = list(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.history) - len(self.request.prompt)

    @property
    def opening(self) -> Opening:
        return Opening(self.request.params, len(self.request.prompt), self.key)

    @property
    def pending(self) -> int:
        """Tokens that have yet to be sent."""
        return len(self.history) - self.sent

    @property
    def is_batch(self) -> bool:
        """Whether interactive sequences go first."""
        return self.request.priority == "batch"

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.generated > 0

    def take_back(self, position: int) -> None:
        """The stages hold only `position` tokens (or fewer than was thought): the rest is sent again. Nothing of the
        sequence may be on its way."""
        self.cached = self.sent = max(0, min(self.cached, position))

    def accept(self, sampled: Sampled) -> Token:
        """Appends the sampled token and says whether it ends the sequence."""
        self.history.append(sampled.token)
        return Token(sampled.token, sampled.logprob, sampled.top, self._finish(sampled.token))

    def _finish(self, token: int) -> FinishReason | None:
        if token in self.request.stop_ids:
            return "stop"
        return "length" if self.generated >= self.request.max_tokens else None


def next_step(
    sequences: Items[Sequence], tokens_max: int, spread: int = 1, *, beside_others: bool = False
) -> tuple[Step, list[Sequence]] | None:
    """The next pass of a lane, with the sequences of its slices: every decoding sequence's one token, then prefill
    chunks (`chunk_tokens`), oldest first, until `tokens_max` tokens are reached; in both, interactive sequences before
    those of batches. At least one sequence gets a slice. None if nothing is to be sent.

    `beside_others`: steps of the lane are on their way already. Then only one with prefill is worth sending: answers
    are better off together, and meet in the first step after it."""
    decoding, prefilling = [], []
    for sequence in sequences:
        pending = len(sequence.history) - sequence.sent
        if pending == 1 and len(sequence.history) > len(sequence.request.prompt):
            decoding.append(sequence)
        elif pending:
            prefilling.append(sequence)
    if not prefilling and (beside_others or not decoding):
        return None
    room = max(1, tokens_max - bool(prefilling))  # a prompt gets on by a token at least
    if len(decoding) > room:
        # those with the shortest answers first: nobody waits for ever
        decoding = sorted(decoding, key=lambda s: (s.is_batch, s.generated))[:room]
    slices = [Slice(s.id, s.sent, 1) for s in decoding]
    tokens = [s.history[-1] for s in decoding]
    chosen, openings = decoding, {}
    for sequence in sorted(prefilling, key=lambda s: s.is_batch):
        if len(tokens) >= tokens_max:
            break
        start, whole = sequence.sent, len(sequence.history)
        length = min(tokens_max - len(tokens), whole - start, chunk_tokens(whole, tokens_max, spread))
        slices.append(Slice(sequence.id, start, length, start + length == whole))
        tokens += sequence.history[start : start + length]
        chosen.append(sequence)
        if start == 0:
            openings[sequence.id] = sequence.opening
    return Step(tuple(slices), np.array(tokens, dtype=np.int32), None, openings), chosen


def chunk_tokens(text_tokens: int, tokens_max: int, spread: int) -> int:
    """The longest chunk of a text of so many tokens: short enough to have `spread` stages at work on it at once."""
    if spread == 1:
        return tokens_max
    return min(tokens_max, max(_CHUNK_TOKENS_MIN, -(-text_tokens // (_CHUNKS_PER_STAGE * spread))))


def progress(sequences: Items[Sequence], step: Step, samples: Items[Sampled]) -> list[tuple[Sequence, Token]]:
    """Books an answered step of these sequences, in the order of its slices: what is cached now, and the new tokens.
    Raises ValueError for an answer to another step, before anything is booked."""
    asking = [(s, piece) for s, piece in zip(sequences, step.slices, strict=True) if piece.sample]
    asked = [(piece.sequence, piece.start + piece.length) for _, piece in asking]
    if [(sampled.sequence, sampled.position) for sampled in samples] != asked:
        raise ValueError(f"{len(samples)} samples came back that are not the {len(asked)} asked for")
    for sequence, piece in zip(sequences, step.slices, strict=True):
        sequence.cached = piece.start + piece.length
        sequence.failures = 0
    return [(sequence, sequence.accept(sampled)) for (sequence, _), sampled in zip(asking, samples, strict=True)]


@dataclass(frozen=True, slots=True)
class LaneRule:
    """How lanes are filled. `spread` is the number of stages that compute at once: as many lanes keep them all busy."""

    spread: int
    width: int  # sequences
    lanes_max: int = 0  # 0: no bound
    age_s: float = 5.0  # 0: lanes do not grow old


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
    young = [not rule.age_s or state.age_s < rule.age_s for state in states]
    may_open = may_open and (rule.lanes_max == 0 or len(states) < rule.lanes_max)
    open_to_all = [i for i, state in enumerate(states) if state.fits and state.sequences < rule.width]
    room = [i for i in open_to_all if young[i]]
    emptiest = min(room, key=lambda i: states[i].sequences, default=None)
    if may_open and sum(young) < rule.spread and (emptiest is None or states[emptiest].sequences > 0):
        return len(states)
    if emptiest is not None:
        return emptiest
    return len(states) if may_open else min(open_to_all, key=lambda i: states[i].sequences, default=None)
