"""One stage at work: steps in, hidden states or samples out, caches kept straight.

Pure in the sense that it knows no HTTP, and no clock but the one it is given; one thread at a time may call it. Steps
that wait at the same time are computed in one pass. A step is all or nothing: it is checked before anything changes,
and if the computation fails, no sequence has moved past where the step starts.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from functions.contract.errors import InvalidEvent, PromptTooLong, StageError, WrongPosition
from functions.contract.frames import Frame
from functions.contract.handover import Export, Piece, Pieces
from functions.contract.messages import Int32Array, Samples, Slice, Step
from functions.kv_cache import KvStore, Sequence
from functions.leases import Clock, Leases
from functions.runner import Runner
from functions.sampling import Draw, choose
from functions.span_model import SpanModel
from functions.weights import SAFETENSORS_DTYPES, TORCH_DTYPES

Outcome = Step | Samples | Exception

_PIECES_MAX = 128  # of one answer to an export: their openings share its header


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A step that may be computed: its place among those that came together, and its sequences at their starts."""

    index: int
    step: Step
    sequences: list[Sequence]


class Stage:
    def __init__(self, runner: Runner, kv_bytes_max: int, lease_s: float = 0.0, clock: Clock = time.monotonic) -> None:
        self.model = runner.model
        self.kv = KvStore(runner.kv_bytes_per_token, kv_bytes_max)
        self.leases = Leases(lease_s, clock)
        self.runner = runner
        runner.allocate(self.kv.pages_max)

    def step(self, step: Step) -> Step | Samples:
        """Computes the slices. The answer is the step with this stage's hidden states, or the samples at the end.

        Steps may repeat: a slice that starts before what is cached is computed anew from there. Raises InvalidEvent,
        WrongPosition, PromptTooLong, KvExhausted."""
        (outcome,) = self.steps([step])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def steps(self, steps: Items[Step]) -> list[Outcome]:
        """Several steps in one pass, in which no sequence occurs twice. What would be wrong with one of them alone is
        that one's outcome, and the others go on."""
        outcomes: dict[int, Outcome] = {}
        accepted = []
        for index, step in enumerate(steps):
            try:
                self._check(step)
                accepted.append(_Accepted(index, step, self.kv.reserve(step.slices, dict(step.openings))))
            except StageError as error:
                outcomes[index] = error
        if accepted:
            outcomes |= self._computed(accepted)
            self.leases.touch([sequence.id for one in accepted for sequence in one.sequences])
        return [outcomes[index] for index in range(len(steps))]

    def release(self, sequences: Items[int]) -> list[int]:
        """Frees their caches; with the last one, the memory of all pages. Returns those that were known."""
        released = self.kv.release(sequences)
        self.leases.forget(released)
        if released and not len(self.kv):
            self.runner.forget()
        return released

    def expire(self) -> list[int]:
        """Frees what nobody has touched for the time of a lease, and returns it."""
        return self.release(self.leases.expired())

    def export(self, asked: Export) -> Pieces:
        """Keys and values of what was asked for, in its order, as much as fits; nothing of sequences that are unknown,
        were opened with another key, or cannot be moved."""
        pieces: list[tuple[Sequence, Piece]] = []
        room = asked.bytes_max
        for identity, start in asked.starts.items():
            sequence = self.kv.get(identity)
            if sequence is None or not hmac.compare_digest(sequence.opening.key, asked.key):
                continue
            if (length := self.runner.movable_tokens(sequence, start, room)) == 0:
                continue
            pieces.append((sequence, Piece(identity, start, length, sequence.position)))
            room -= length * self.kv.bytes_per_token
            if not self.runner.in_rows or start + length < sequence.position or len(pieces) == _PIECES_MAX:
                break
        if not pieces:
            return Pieces((), np.empty(0, dtype=np.int32), {}, {})
        self.leases.touch([sequence.id for sequence, _ in pieces])
        tokens = [token for sequence, piece in pieces for token in sequence.tokens[piece.start : piece.end]]
        return Pieces(
            tuple(piece for _, piece in pieces),
            np.array(tokens, dtype=np.int32),
            {piece.sequence: sequence.opening for sequence, piece in pieces if piece.start == 0},
            {name: frame_of(tensor) for name, tensor in self.runner.take_out(pieces).items()},
        )

    def install(self, given: Pieces) -> None:
        """Takes over what another replica of this stage has computed. A sequence that has got as far by itself is left
        as it is. Raises InvalidEvent, WrongPosition and KvExhausted; the pieces before have been taken over then."""
        check_tokens(self.model, given.tokens)
        self.runner.check_pieces(given.pieces, given.arrays)
        arrays = {name: tensor_of(frame) for name, frame in given.arrays.items()}
        at = 0
        for piece in given.pieces:
            if self.kv.position(piece.sequence) < piece.end:
                step = Slice(piece.sequence, piece.start, piece.length)
                self._check_positions((step,))
                (sequence,) = self.kv.reserve((step,), dict(given.openings))
                self.runner.put_in(sequence, piece, arrays, at)
                sequence.tokens.extend(given.tokens[at : at + piece.length].tolist())
                sequence.position = piece.end
                self.leases.touch((piece.sequence,))
            at += piece.length

    def _computed(self, accepted: Items[_Accepted]) -> dict[int, Outcome]:
        try:
            results = self._run(accepted)
        except Exception as error:
            if len(accepted) == 1:
                return {accepted[0].index: error}
            # one of them breaks the pass: each by itself, so that only that one fails
            return {index: outcome for one in accepted for index, outcome in self._computed([one]).items()}
        return {one.index: self._answer(one, result) for one, result in zip(accepted, results, strict=True)}

    def _run(self, accepted: Items[_Accepted]) -> Items[torch.Tensor]:
        """One pass over all of them; each one's hidden states, or logits at the last stage."""
        device = self.model.device
        tokens = torch.cat([token_tensor(one.step.tokens, device) for one in accepted])
        arrived = [hidden_tensor(one.step.hidden, device) for one in accepted if one.step.hidden is not None]
        hidden = arrived[0] if len(arrived) == 1 else torch.cat(arrived) if arrived else None
        slices = [piece for one in accepted for piece in one.step.slices]
        result = self.runner.run([q for one in accepted for q in one.sequences], slices, tokens, hidden)
        if len(accepted) == 1:
            return [result]
        last = self.model.ends.last
        counts = [sum(p.sample if last else p.length for p in one.step.slices) for one in accepted]
        return torch.split(result, counts)

    def _answer(self, one: _Accepted, result: torch.Tensor) -> Step | Samples:
        self._advance(one.step, one.sequences)
        if self.model.ends.last:
            return self._samples(one.step.slices, one.sequences, result)
        return Step(one.step.slices, one.step.tokens, frame_of(result), one.step.openings)

    def _check(self, step: Step) -> None:
        check_input(self.model, step.tokens, step.hidden)
        self._check_positions(step.slices)

    def _check_positions(self, slices: Items[Slice]) -> None:
        """Raises PromptTooLong and WrongPosition."""
        for piece in slices:
            if piece.end > self.model.max_positions:
                raise PromptTooLong(
                    f"sequence {piece.sequence} would reach {piece.end} tokens; the model takes at most "
                    f"{self.model.max_positions}"
                )
        have = {piece.sequence: self.kv.position(piece.sequence) for piece in slices}
        gaps = [piece for piece in slices if piece.start > have[piece.sequence]]
        if gaps:
            first = gaps[0]
            raise WrongPosition(
                f"sequence {first.sequence}: the slice starts at {first.start}, this stage has "
                f"{have[first.sequence]} tokens" + (f" (and {len(gaps) - 1} more sequences)" if gaps[1:] else ""),
                {piece.sequence: have[piece.sequence] for piece in gaps},
            )

    def _advance(self, step: Step, sequences: list[Sequence]) -> None:
        at = 0
        for piece, sequence in zip(step.slices, sequences, strict=True):
            sequence.tokens.extend(step.tokens[at : at + piece.length].tolist())
            sequence.position = piece.end
            at += piece.length

    def _samples(self, slices: tuple[Slice, ...], sequences: list[Sequence], logits: torch.Tensor) -> Samples:
        draws = [
            Draw(s.sequence, s.end, sequence.opening.params, sequence.tokens, sequence.opening.prompt_length)
            for s, sequence in zip(slices, sequences, strict=True)
            if s.sample
        ]
        return Samples(choose(logits, draws) if draws else ())


def check_input(model: SpanModel, tokens: Int32Array, hidden: Frame | None) -> None:
    """Raises InvalidEvent for what the blocks of `model` cannot be given."""
    check_tokens(model, tokens)
    if model.ends.first:
        if hidden is not None:
            raise InvalidEvent("the first stage takes tokens only, the event brings hidden states")
        return
    dtype = SAFETENSORS_DTYPES[model.dtype]
    if hidden is None:
        raise InvalidEvent("this stage needs the hidden states of the stage before it")
    if hidden.dtype != dtype or hidden.shape[1] != model.hidden_size:
        raise InvalidEvent(f"hidden must be {dtype} [n, {model.hidden_size}], got {hidden.dtype} {list(hidden.shape)}")


def check_tokens(model: SpanModel, tokens: Int32Array) -> None:
    """Raises InvalidEvent."""
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < model.vocab_size):
        raise InvalidEvent(f"token ids must be in 0..{model.vocab_size - 1}")


def token_tensor(tokens: Int32Array, device: torch.device) -> torch.Tensor:
    """int64 [n]."""
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def hidden_tensor(hidden: Frame, device: torch.device) -> torch.Tensor:
    """The frame's bytes without a copy, on a CPU."""
    return tensor_of(hidden).to(device)


def tensor_of(frame: Frame) -> torch.Tensor:
    """The frame's bytes without a copy."""
    return torch.frombuffer(frame.data, dtype=TORCH_DTYPES[frame.dtype]).view(frame.shape)


def frame_of(hidden: torch.Tensor) -> Frame:
    """The tensor's bytes without a copy (after one to the host, for a GPU)."""
    host = hidden.contiguous().cpu()
    return Frame(SAFETENSORS_DTYPES[host.dtype], tuple(host.shape), host.view(torch.uint8).numpy().reshape(-1).data)
