"""How a span computes a batch of slices: packed into one pass where the model allows it, else one by one.

Which of the two is found by trying: a short packed pass must go through the attention interface once per block. Models
with attention of their own (alibi, state-space layers, ...) fail that and run exactly, one sequence at a time, over the
model's own cache class.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from torch import nn
from transformers import DynamicCache

from functions import cache_layers, paged_attention
from functions.attention import PACKED, PackedPass, Unpackable
from functions.contract.checkpoint import Checkpoint, CheckpointError
from functions.contract.errors import InvalidEvent, WrongPosition
from functions.contract.frames import Frame
from functions.contract.handover import Piece
from functions.contract.messages import Opening, Slice
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from functions.fused_blocks import FusedBlocks, Unfusible, watched_blocks
from functions.kernels import why_no_kernels
from functions.kv_cache import KvPool, Sequence, pool_rows
from functions.quantize import Quantization
from functions.span_model import SpanModel, load_span
from functions.weights import SAFETENSORS_DTYPES

_PROBE = (3, 2)  # lengths of the two sequences that the self-check runs; each fits into a page
_PACKED_ERROR = 1e-3  # by which packed linear layers may differ, of the norm of the result
_PACKED_STEPS = 16  # the same in steps of the dtype, where these are larger

_OPENING = Opening(SamplingParams(), 1)

log = structlog.get_logger()


class Runner(Protocol):
    """Computes slices; sequences stand at the start of their slice and are not moved by it."""

    model: SpanModel
    packed: bool
    kv_bytes_per_token: int

    def allocate(self, pages: int) -> None:
        """Makes room for so many pages of keys and values, before the first `run`."""
        ...

    def forget(self) -> None:
        """Gives back the memory of pages that were used; there are no sequences now."""
        ...

    def run(
        self, sequences: Items[Sequence], slices: Items[Slice], tokens: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """tokens int64 [n], hidden [n, hidden size] unless first. Returns hidden states [n, hidden size], or at the
        last stage logits [m, vocabulary] of the slices that ask for a sample."""
        ...

    def texts(self, lengths: Items[int], tokens: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """Whole texts, packed one after another, computed without leaving a trace. Returns hidden states
        [n, hidden size], at the last stage those after the final norm."""
        ...

    # keys and values that move from replica to replica

    in_rows: bool  # whether they can be taken out token by token, those of several sequences together

    def movable_tokens(self, sequence: Sequence, start: int, bytes_max: int) -> int:
        """How many tokens of a sequence, from `start` on, can be taken out in so many bytes."""
        ...

    def take_out(self, pieces: Items[tuple[Sequence, Piece]]) -> dict[str, torch.Tensor]:
        """Their keys and values, by the names that `Pieces` gives them. Nothing computed later changes them."""
        ...

    def check_pieces(self, pieces: Items[Piece], arrays: Mapping[str, Frame]) -> None:
        """Raises InvalidEvent unless `arrays` are what `take_out` would give of such pieces."""
        ...

    def put_in(self, sequence: Sequence, piece: Piece, arrays: Mapping[str, torch.Tensor], at: int) -> None:
        """A piece whose tokens begin at number `at` of all those that came. There is room for it."""
        ...


def load_runner(
    checkpoint: Checkpoint,
    span: BlockSpan,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "none",
) -> Runner:
    """Loads the span and checks it by a short run. Raises CheckpointError."""

    def load(attention: str | None = None) -> SpanModel:
        return load_span(checkpoint, span, dtype, device, attention, quantization)

    try:
        runner = PackedRunner(load(PACKED))
        try:
            packed = runner.pack_linears()
        except Unpackable as error:
            log.info("linear_layers_by_torch", reason=str(error), model_type=checkpoint.config.get("model_type"))
            runner, packed = PackedRunner(load(PACKED)), False
        if packed:
            runner.fuse_blocks()
        _tell_slow(quantization, packed)
        return runner
    except Unpackable as error:
        log.info("one_sequence_at_a_time", reason=str(error), model_type=checkpoint.config.get("model_type"))
    model = load()
    if quantization != "none":  # which is slow without the kernel
        _tell_slow(quantization, model.pack_linears([[path] for path in model.linear_paths()]))
    return SequentialRunner(model)


def _tell_slow(quantization: Quantization, packed: bool) -> None:
    if quantization != "none" and not packed:
        log.info(
            "quantised_layers_by_torch",
            reason=why_no_kernels() or "the kernel does not run on this device, or not for this model",
            effect="they save memory, but are slower than layers of floats",
        )


class PackedRunner:
    packed = True
    in_rows = True

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        with model.watched_linears() as self._linears:
            self._probed, self._probe_result = self._self_check()
        self.kv_bytes_per_token = sum(shape.items for shape in self._probed.shapes) * model.dtype.itemsize
        self._pool: KvPool | None = None

    def pack_linears(self) -> bool:
        """Packs the model's linear layers where there is a kernel for them; whether there is. Raises Unpackable if that
        changes what the model computes or fails, in which case the model is of no more use."""
        if not self.model.pack_linears(self._linears):
            return False
        with watched_blocks(self.model.blocks) as self._seen:
            _, result = self._self_check()
        error = max(_PACKED_ERROR, _PACKED_STEPS * torch.finfo(result.dtype).eps) * self._probe_result.norm()
        if not (result - self._probe_result).norm() <= error:  # nor if it is not a number
            raise Unpackable("packed linear layers compute something else")
        return True

    def fuse_blocks(self) -> None:
        """Has the blocks computed in one call of a kernel where they are what it computes, after `pack_linears`."""
        blocks = self.model.blocks
        try:
            if self.model.dtype != torch.float32:
                raise Unfusible("the kernel computes in float32")
            fused = FusedBlocks(blocks, self._seen, self._probed.hows, self._probed.shapes)
            self.model.set_blocks(nn.ModuleList([fused]))
            with fused.compared():
                self._probe(
                    [Sequence(page, _OPENING, pages=array("i", [page])) for page in range(len(_PROBE))],
                    KvPool(self._probed.shapes, len(_PROBE), self.model.dtype, self.model.device),
                )
        except Unfusible as error:
            self.model.set_blocks(blocks)
            log.info("blocks_by_modules", reason=str(error), model_type=self.model.config.model_type)

    def allocate(self, pages: int) -> None:
        self._pool = KvPool(self._probed.shapes, pages, self.model.dtype, self.model.device)
        size = max(max(shape.key_size, shape.value_size) for shape in self._probed.shapes)
        reason = paged_attention.why_torch(self.model.dtype, size)
        if reason is not None and self.model.device.type == "cpu":
            log.info("attention_by_torch", reason=reason)

    def forget(self) -> None:
        if self._pool is not None:
            self._pool.forget()

    def run(
        self, sequences: Items[Sequence], slices: Items[Slice], tokens: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        positions = np.concatenate([np.arange(s.start, s.end) for s in slices])
        ends = np.cumsum([s.length for s in slices]) - 1
        rows = torch.from_numpy(ends[[s.sample for s in slices]]).to(self.model.device)
        assert self._pool is not None  # `allocate` comes first
        with PackedPass(sequences, [s.length for s in slices], self._pool) as cache:
            return self.model.forward(tokens, hidden, torch.from_numpy(positions).to(self.model.device), cache, rows)

    def texts(self, lengths: Items[int], tokens: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        positions = torch.cat([torch.arange(length, device=self.model.device) for length in lengths])
        with PackedPass([], lengths, None) as cache:
            return self.model.states(tokens, hidden, positions, cache)

    def movable_tokens(self, sequence: Sequence, start: int, bytes_max: int) -> int:
        return max(0, min(sequence.position - start, bytes_max // max(1, self.kv_bytes_per_token)))

    def take_out(self, pieces: Items[tuple[Sequence, Piece]]) -> dict[str, torch.Tensor]:
        assert self._pool is not None  # `allocate` comes first
        return self._pool.read(np.concatenate([pool_rows(s.pages, piece.start, piece.end) for s, piece in pieces]))

    def check_pieces(self, pieces: Items[Piece], arrays: Mapping[str, Frame]) -> None:
        total, dtype = sum(piece.length for piece in pieces), SAFETENSORS_DTYPES[self.model.dtype]
        wanted = {}
        for block, shape in enumerate(self._probed.shapes):
            wanted[f"keys.{block}"] = (total, shape.kv_heads, shape.key_size)
            wanted[f"values.{block}"] = (total, shape.kv_heads, shape.value_size)
        given = {name: frame.shape for name, frame in arrays.items() if frame.dtype == dtype}
        if given != wanted or len(given) != len(arrays):
            raise InvalidEvent(
                f"keys and values of {len(self._probed.shapes)} blocks are needed, {dtype} "
                f"{list(wanted['keys.0'])}; got {[(f.dtype, list(f.shape)) for f in arrays.values()][:2]} and so on"
            )

    def put_in(self, sequence: Sequence, piece: Piece, arrays: Mapping[str, torch.Tensor], at: int) -> None:
        assert self._pool is not None  # `allocate` comes first
        self._pool.write(pool_rows(sequence.pages, piece.start, piece.end), arrays, at)

    def _self_check(self) -> tuple[PackedPass, torch.Tensor]:
        """A pass over two short texts, and its result. Raises Unpackable."""
        try:
            probed, result = self._probe()
        except Exception as error:
            raise Unpackable(f"{type(error).__name__}: {error}") from error
        if len(probed.hows) != len(self.model.span):
            found, blocks = len(probed.hows), len(self.model.span)
            raise Unpackable(f"{found} of {blocks} blocks attend through Transformers' interface")
        if self.model.ends.last and result.shape != (len(_PROBE), self.model.vocab_size):
            raise Unpackable(f"logits of two sequences have shape {list(result.shape)}")
        self._check_windows([how.window for how in probed.hows])
        return probed, result

    def _probe(self, sequences: Items[Sequence] = (), pool: KvPool | None = None) -> tuple[PackedPass, torch.Tensor]:
        tokens, hidden = _probe_input(self.model, sum(_PROBE))
        positions = torch.cat([torch.arange(length, device=self.model.device) for length in _PROBE])
        rows = torch.tensor(np.cumsum(_PROBE) - 1, device=self.model.device)
        with PackedPass(sequences, _PROBE, pool) as probed:
            return probed, self.model.forward(tokens, hidden, positions, probed, rows)

    def _check_windows(self, windows: list[int | None]) -> None:
        """A model may express a local attention by its masks alone, which packing ignores. Raises Unpackable."""
        config = self.model.config
        local = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        kinds = getattr(config, "layer_types", None) or [local] * len(windows)
        for kind, window in zip(kinds, windows, strict=True):
            if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
                raise Unpackable(f"a block of type {kind} does not tell its window to the attention function")


class SequentialRunner:
    packed = False
    in_rows = False

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        self._layers: Items[cache_layers.LayerShape | None] | None = None  # None: caches stay where they are
        self.kv_bytes_per_token = self._self_check()

    def allocate(self, pages: int) -> None:
        """Nothing: each sequence has a cache of its own, which grows as it needs."""

    def forget(self) -> None:
        """Nothing: the caches went with their sequences."""

    def run(
        self, sequences: Items[Sequence], slices: Items[Slice], tokens: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        self._start_anew([q for q, s in zip(sequences, slices, strict=True) if s.start not in (0, q.cached)])
        results, at = [], 0
        for sequence, piece in zip(sequences, slices, strict=True):
            part = slice(at, at + piece.length)
            results.append(self._one(sequence, piece, tokens[part], None if hidden is None else hidden[part]))
            at += piece.length
        # without a sample a slice adds no logits, and what it returns is of another width
        return torch.cat([r for r in results if len(r)] or results[:1])

    def texts(self, lengths: Items[int], tokens: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        pieces = [None] * len(lengths) if hidden is None else torch.split(hidden, list(lengths))
        results = []
        for part, piece in zip(torch.split(tokens, list(lengths)), pieces, strict=True):
            positions = torch.arange(len(part), device=self.model.device)
            results.append(self.model.states(part, piece, positions, DynamicCache(config=self.model.config)))
        return torch.cat(results)

    def movable_tokens(self, sequence: Sequence, start: int, bytes_max: int) -> int:
        """All of it or nothing: a layer with a window has no single tokens."""
        if self._layers is None or start or sequence.cached != sequence.position:
            return 0
        size = sum(t.numel() * t.element_size() for t in cache_layers.take_out(sequence.cache).values())
        return sequence.position if size <= bytes_max else 0

    def take_out(self, pieces: Items[tuple[Sequence, Piece]]) -> dict[str, torch.Tensor]:
        ((sequence, _),) = pieces  # one at a time
        return cache_layers.take_out(sequence.cache)

    def check_pieces(self, pieces: Items[Piece], arrays: Mapping[str, Frame]) -> None:
        if self._layers is None or len(pieces) != 1 or pieces[0].start:
            raise InvalidEvent("the caches of this architecture move whole, one at a time, or not at all")
        cache_layers.check(self._layers, arrays, pieces[0].length)

    def put_in(self, sequence: Sequence, piece: Piece, arrays: Mapping[str, torch.Tensor], at: int) -> None:
        sequence.cache = DynamicCache(config=self.model.config)
        cache_layers.put_in(sequence.cache, arrays, piece.length, self.model.device)
        sequence.cached = piece.end

    def _one(self, sequence: Sequence, piece: Slice, tokens: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        if piece.start == 0:
            sequence.cache = DynamicCache(config=self.model.config)
        device = self.model.device
        positions = torch.arange(piece.start, piece.end, device=device)
        rows = torch.tensor([piece.length - 1] if piece.sample else [], dtype=torch.long, device=device)
        sequence.cached = piece.end
        return self.model.forward(tokens, hidden, positions, sequence.cache, rows)

    @staticmethod
    def _start_anew(sequences: Items[Sequence]) -> None:
        """Recurrent state and full windows have no way back, so no such cache is shortened. Raises WrongPosition
        unless there is nothing to do."""
        for sequence in sequences:
            sequence.position = sequence.cached = 0
        if sequences:
            raise WrongPosition(
                f"sequence {sequences[0].id}: this architecture cannot go back in its cache; replay it from 0",
                {sequence.id: 0 for sequence in sequences},
            )

    def _self_check(self) -> int:
        """Runs a short sequence; returns the bytes of its cache per token. Raises CheckpointError where the model keeps
        its state in no cache that could be followed: its answers would be wrong."""
        length = 16
        sequence = Sequence(1, _OPENING)
        try:
            self.run([sequence], [Slice(1, 0, length)], *_probe_input(self.model, length))
        except Exception as error:
            raise CheckpointError(
                f"blocks {self.model.span} of this architecture cannot run by themselves "
                f"({type(error).__name__}: {error}); try other cuts, or 1 stage"
            ) from error
        self._layers = cache_layers.layer_shapes(sequence.cache)
        held = {id(t): t for layer in sequence.cache.layers for t in vars(layer).values() if torch.is_tensor(t)}
        if len(sequence.cache.layers) < len(self.model.span) or not held:
            raise CheckpointError(
                f"{self.model.config.model_type}: the state of this architecture is not in Transformers' cache class; "
                "it is not supported"
            )
        return max(1, sum(t.numel() * t.element_size() for t in held.values()) // length)


def _probe_input(model: SpanModel, n: int) -> tuple[torch.Tensor, Any]:
    tokens = torch.arange(n, device=model.device) % model.vocab_size
    if model.ends.first:
        return tokens, None
    hidden = torch.linspace(-1, 1, n * model.hidden_size, device=model.device).view(n, model.hidden_size)
    return tokens, hidden.to(model.dtype)
