"""How a span computes a batch of slices: packed into one pass where the model allows it, else one by one.

Which of the two is found by trying: a short packed pass must go through the attention interface once per block. Models
with attention of their own (alibi, state-space layers, ...) fail that and run exactly, one sequence at a time, over the
model's own cache class.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from transformers import DynamicCache

from functions.attention import PACKED, PackedCache
from functions.contract.checkpoint import Checkpoint, CheckpointError
from functions.contract.errors import WrongPosition
from functions.contract.messages import Opening, Slice
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from functions.kv_cache import Sequence
from functions.span_model import SpanModel, load_span

# Architectures whose attention calls the interface but needs more than it is given. Each was found by comparing with
# the whole model (tests/functions/test_architectures.py).
NOT_PACKABLE = frozenset({"diffllama", "jetmoe"})
_PROBE = (3, 2)  # lengths of the two sequences that the self-check runs

log = structlog.get_logger()


class Runner(Protocol):
    """Computes slices; sequences stand at the start of their slice and are not moved by it."""

    model: SpanModel
    packed: bool
    kv_bytes_per_token: int

    def run(
        self, sequences: Items[Sequence], slices: Items[Slice], tokens: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """tokens int64 [n], hidden [n, hidden size] unless first. Returns hidden states [n, hidden size], or at the
        last stage logits [m, vocabulary] of the slices that ask for a sample."""
        ...


def load_runner(checkpoint: Checkpoint, span: BlockSpan, dtype: torch.dtype, device: torch.device) -> Runner:
    """Loads the span and checks it by a short run. Raises CheckpointError."""
    if checkpoint.config.get("model_type") not in NOT_PACKABLE:
        try:
            return PackedRunner(load_span(checkpoint, span, dtype, device, PACKED))
        except (Unpackable, CheckpointError) as error:
            # a checkpoint that is really broken fails below once more, with its own message
            log.info("one_sequence_at_a_time", reason=str(error), model_type=checkpoint.config.get("model_type"))
    return SequentialRunner(load_span(checkpoint, span, dtype, device))


class Unpackable(Exception):
    """The model does not attend through the interface that packing needs."""


class PackedRunner:
    packed = True

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        self.kv_bytes_per_token = self._self_check()

    def run(
        self, sequences: Items[Sequence], slices: Items[Slice], tokens: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        positions = np.concatenate([np.arange(s.start, s.end) for s in slices])
        ends = np.cumsum([s.length for s in slices]) - 1
        rows = torch.from_numpy(ends[[s.sample for s in slices]]).to(self.model.device)
        with PackedCache(sequences, [s.length for s in slices]) as cache:
            result = self.model.forward(tokens, hidden, torch.from_numpy(positions).to(self.model.device), cache, rows)
        self._attended = cache.attended
        return result

    def _self_check(self) -> int:
        """Runs two short sequences; returns the bytes of KV cache per token. Raises Unpackable."""
        blocks = len(self.model.span)
        sequences = [_blank(i, blocks) for i in range(len(_PROBE))]
        slices = [Slice(i + 1, 0, length) for i, length in enumerate(_PROBE)]
        try:
            self.run(sequences, slices, *_probe_input(self.model, sum(_PROBE)))
        except Exception as error:
            raise Unpackable(f"{type(error).__name__}: {error}") from error
        buffers = [b for b in (*sequences[0].keys, *sequences[0].values) if b is not None]
        if self._attended != blocks or len(buffers) != 2 * blocks:
            raise Unpackable(f"{self._attended} of {blocks} blocks attend through Transformers' interface")
        return sum(b[:, :1].numel() * b.element_size() for b in buffers)


class SequentialRunner:
    packed = False

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        self.kv_bytes_per_token = self._self_check()

    def run(
        self, sequences: Items[Sequence], slices: Items[Slice], tokens: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        results, at = [], 0
        for sequence, piece in zip(sequences, slices, strict=True):
            part = slice(at, at + piece.length)
            results.append(self._one(sequence, piece, tokens[part], None if hidden is None else hidden[part]))
            at += piece.length
        return torch.cat(results)

    def _one(self, sequence: Sequence, piece: Slice, tokens: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        if piece.start == 0:
            sequence.cache = DynamicCache(config=self.model.config)
        elif sequence.cached > piece.start:
            self._take_back(sequence, piece.start)
        device = self.model.device
        positions = torch.arange(piece.start, piece.end, device=device)
        rows = torch.tensor([piece.length - 1] if piece.sample else [], dtype=torch.long, device=device)
        sequence.cached = piece.end
        return self.model.forward(tokens, hidden, positions, sequence.cache, rows)

    def _take_back(self, sequence: Sequence, position: int) -> None:
        """Shortens the model's own cache. Recurrent state has no way back: the sequence starts anew."""
        if all(getattr(layer, "is_croppable", False) for layer in sequence.cache.layers):
            sequence.cache.crop(position)
            return
        sequence.position = sequence.cached = 0
        raise WrongPosition(
            f"sequence {sequence.id}: this architecture cannot go back to position {position}; replay it from 0",
            sequence=sequence.id,
            position=0,
        )

    def _self_check(self) -> int:
        length = 16
        sequence = _blank(0, 0)
        self.run([sequence], [Slice(1, 0, length)], *_probe_input(self.model, length))
        held = {id(t): t for layer in sequence.cache.layers for t in vars(layer).values() if torch.is_tensor(t)}
        return max(1, sum(t.numel() * t.element_size() for t in held.values()) // length)


def _blank(index: int, blocks: int) -> Sequence:
    return Sequence(index + 1, Opening(SamplingParams(), 1), keys=[None] * blocks, values=[None] * blocks)


def _probe_input(model: SpanModel, n: int) -> tuple[torch.Tensor, Any]:
    tokens = torch.zeros(n, dtype=torch.long, device=model.device)
    if model.ends.first:
        return tokens, None
    return tokens, torch.zeros((n, model.hidden_size), dtype=model.dtype, device=model.device)
