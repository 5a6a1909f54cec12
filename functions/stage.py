"""One stage at work: steps in, hidden states or samples out, caches kept straight.

Pure in the sense that it knows no HTTP and no clock; one thread at a time may call it. Steps that wait at the same time
are computed in one pass. A step is all or nothing: it is checked before anything changes, and if the computation fails,
no sequence has moved past where the step starts.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from functions.contract.errors import InvalidEvent, PromptTooLong, StageError, WrongPosition
from functions.contract.frames import Frame
from functions.contract.messages import Int32Array, Samples, Slice, Step
from functions.kv_cache import KvStore, Sequence
from functions.runner import Runner
from functions.sampling import Draw, choose
from functions.span_model import SpanModel
from functions.weights import SAFETENSORS_DTYPES, TORCH_DTYPES

Outcome = Step | Samples | Exception


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A step that may be computed: its place among those that came together, and its sequences at their starts."""

    index: int
    step: Step
    sequences: list[Sequence]


class Stage:
    def __init__(self, runner: Runner, kv_bytes_max: int) -> None:
        self.model = runner.model
        self.kv = KvStore(runner.kv_bytes_per_token, kv_bytes_max)
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
        return [outcomes[index] for index in range(len(steps))]

    def release(self, sequences: Items[int]) -> list[int]:
        """Frees their caches; with the last one, the memory of all pages. Returns those that were known."""
        released = self.kv.release(sequences)
        if released and not len(self.kv):
            self.runner.forget()
        return released

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
        for piece in step.slices:
            if piece.end > self.model.max_positions:
                raise PromptTooLong(
                    f"sequence {piece.sequence} would reach {piece.end} tokens; the model takes at most "
                    f"{self.model.max_positions}"
                )
        self._check_positions(step)

    def _check_positions(self, step: Step) -> None:
        have = {piece.sequence: self.kv.position(piece.sequence) for piece in step.slices}
        gaps = [piece for piece in step.slices if piece.start > have[piece.sequence]]
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
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < model.vocab_size):
        raise InvalidEvent(f"token ids must be in 0..{model.vocab_size - 1}")
    if model.ends.first:
        if hidden is not None:
            raise InvalidEvent("the first stage takes tokens only, the event brings hidden states")
        return
    dtype = SAFETENSORS_DTYPES[model.dtype]
    if hidden is None:
        raise InvalidEvent("this stage needs the hidden states of the stage before it")
    if hidden.dtype != dtype or hidden.shape[1] != model.hidden_size:
        raise InvalidEvent(f"hidden must be {dtype} [n, {model.hidden_size}], got {hidden.dtype} {list(hidden.shape)}")


def token_tensor(tokens: Int32Array, device: torch.device) -> torch.Tensor:
    """int64 [n]."""
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def hidden_tensor(hidden: Frame, device: torch.device) -> torch.Tensor:
    """The frame's bytes without a copy, on a CPU."""
    flat = torch.frombuffer(hidden.data, dtype=TORCH_DTYPES[hidden.dtype])
    return flat.view(hidden.shape).to(device)


def frame_of(hidden: torch.Tensor) -> Frame:
    """The tensor's bytes without a copy (after one to the host, for a GPU)."""
    host = hidden.contiguous().cpu()
    return Frame(SAFETENSORS_DTYPES[host.dtype], tuple(host.shape), host.view(torch.uint8).numpy().reshape(-1).data)
