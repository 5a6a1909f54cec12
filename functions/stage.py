"""One stage at work: steps in, hidden states or samples out, caches kept straight.

Pure in the sense that it knows no HTTP and no clock; one thread at a time may call it. A step is all or nothing: it is
checked before anything changes, and if the computation fails, no sequence has moved past where the step starts.
"""

from __future__ import annotations

import numpy as np
import torch

from functions.contract.errors import InvalidEvent, PromptTooLong, WrongPosition
from functions.contract.frames import Frame
from functions.contract.messages import Int32Array, Samples, Slice, Step
from functions.kv_cache import KvStore, Sequence
from functions.runner import Runner
from functions.sampling import Draw, choose
from functions.span_model import SpanModel
from functions.weights import SAFETENSORS_DTYPES, TORCH_DTYPES


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
        self._check(step)
        tokens = token_tensor(step.tokens, self.model.device)
        hidden = None if step.hidden is None else hidden_tensor(step.hidden, self.model.device)
        sequences = self.kv.reserve(step.slices, dict(step.openings))
        result = self.runner.run(sequences, step.slices, tokens, hidden)
        self._advance(step, sequences)
        if self.model.ends.last:
            return self._samples(step.slices, sequences, result)
        return Step(step.slices, step.tokens, frame_of(result), step.openings)

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
