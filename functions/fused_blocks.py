"""The blocks of a span as one call of a kernel (`fused_blocks.c`), where a model's blocks are what it computes.

Modules of Python are one thread's work between products that all threads share: a quarter of a step of 64 sequences,
and a third of a step of one. Most models have blocks of the same kind, whatever their classes are called:

    x += attention(rotary(linear(norm(x))))        norms of q and k, and after a part: where there are any
    x += linear(activation(linear(norm(x))) * linear(norm(x)))

Whether a model's are such is found by watching a short run for the order of its parts, and by computing each block both
ways: what it adds to the hidden states must be the same, but for rounding. If not, the modules stay as they are.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from functions import paged_attention
from functions.attention import PackedPass, current_pass
from functions.kernels import kernels
from functions.kv_cache import KvPool, RowShape
from functions.linears import Linear, PackedLinear, Panels
from functions.norms import FastRmsNorm
from functions.paged_attention import How

_DIFFERENCE_MAX = 1e-5  # of what a block adds, by which the two ways may differ; seen: up to 5e-7
# Floats between rows of scratch, a cache line: rows a multiple of 4 KiB apart get in each other's way in a cache.
_APART = 16
# N a norm of hidden states, n one of heads, L linear layers with the same input, A an activation
_PARTS = re.compile(r"(?P<norm>N)L(?P<heads>nn)?L(?P<post>N)?(?P<middle>N)LAL(?P<last>N)?")


# norms of the C source, and where _PARTS has them
_PLACES = (
    ("norm", "norm", 0), ("middle_norm", "middle", 0), ("attention_post", "post", 0), ("down_post", "last", 0),
    ("query_norm", "heads", 0), ("key_norm", "heads", 1),
)  # fmt: skip


class Unfusible(Exception):
    """The blocks are not of the kind that the kernel computes, or are not known to be."""


class _Block(ctypes.Structure):
    """Block of fused_blocks.c."""

    _fields_ = (
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        ("attention", paged_attention.Attention),
        *((name, ctypes.c_void_p) for name, *_ in _PLACES),
        *((f"{name}_eps", ctypes.c_float) for name, *_ in _PLACES),
    )


class _Span(ctypes.Structure):
    """Span of fused_blocks.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "pass_", "cosines", "sines", "hidden", "normed", "wide")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "middle", "normed_row", "wide_row")),
        *((name, ctypes.c_int32) for name in ("count", "rotary", "activation", "threads")),
        ("row", ctypes.c_void_p),
    )


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


# in the order of the C source
_ACTIVATIONS: Items[Callable[[torch.Tensor], torch.Tensor]] = (F.silu, _gelu_tanh)


_NOTHING = (nn.Dropout, nn.Identity)  # is what these do when a model is not trained


@dataclass(slots=True)
class Seen:
    """What one block did in a pass: its parts in their order, and the rotation that it was given."""

    parts: list[nn.Module] = field(default_factory=list)
    rotation: Any = None


@contextmanager
def watched_blocks(blocks: nn.ModuleList) -> Iterator[list[Seen]]:
    """Around a pass of the model. Afterwards the list holds what each of its blocks did."""
    seen = [Seen() for _ in blocks]

    def note_part(index: int, module: nn.Module) -> None:
        seen[index].parts.append(module)

    def note_block(index: int, given: dict[str, Any]) -> None:
        seen[index].rotation = given.get("position_embeddings")

    hooks = []
    for index, block in enumerate(blocks):
        hooks.append(
            block.register_forward_pre_hook(
                lambda _, __, given, index=index: note_block(index, given), with_kwargs=True
            )
        )
        for module in block.modules():
            if not any(module.children()):
                hooks.append(module.register_forward_pre_hook(lambda part, _, index=index: note_part(index, part)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class FusedBlocks(nn.Module):
    """Stands for all blocks of a span, as one of them. Over texts that are not cached the blocks run themselves, and
    where there is no kernel any more."""

    def __init__(self, blocks: nn.ModuleList, seen: Items[Seen], hows: Items[How], shapes: Items[RowShape]) -> None:
        """`seen`, `hows` and `shapes` of a pass, for each block. Raises Unfusible."""
        super().__init__()
        library = kernels()
        if library is None or not seen:
            raise Unfusible("there is no kernel")
        if any(one.rotation is not seen[0].rotation for one in seen):
            raise Unfusible("blocks turn queries and keys by different angles")
        self._library = library
        self.blocks = blocks
        self._parts = [_Parts(one, how, shape) for one, how, shape in zip(seen, hows, shapes, strict=True)]
        if len({parts.alike for parts in self._parts}) > 1:
            raise Unfusible("blocks differ in their sizes")
        first = self._parts[0]
        self._array = (_Block * len(seen))(*(parts.c_block() for parts in self._parts))
        self._width, self._middle = first.width, first.middle
        self._rows = first.width + _APART, max(first.qkv.outputs, first.gate_up.outputs) + _APART
        self._activation = first.activation
        self._pool: KvPool | None = None
        # from what the modules compute, beside what a block adds; while they are looked for
        self._differences: list[tuple[float, float]] | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, n, width] -> the same."""
        cache = current_pass()
        if self._differences is not None:
            return self._compare(self._differences, cache, hidden_states, *args, **kwargs)
        if cache.pool is None or kernels() is None:
            for block in self.blocks:
                hidden_states = block(hidden_states, *args, **kwargs)
            return hidden_states
        return self._run(cache, hidden_states, kwargs["position_embeddings"], 0, len(self._parts))

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Around a pass that is filed. Raises Unfusible unless each block computes the same both ways."""
        self._differences = []
        try:
            yield
            for difference, added in self._differences:
                if not difference <= _DIFFERENCE_MAX * added:  # nor if it is not a number
                    by = difference / added if added else math.inf
                    raise Unfusible(f"a block computes something else (by {by:.1g} of what it adds)")
        finally:
            self._differences = None

    def _compare(
        self, differences: list[tuple[float, float]], cache: PackedPass, hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        for index, block in enumerate(self.blocks):
            result = block(hidden, *args, **kwargs)
            if not isinstance(result, torch.Tensor):
                raise Unfusible("blocks return more than hidden states")
            fused = self._run(cache, hidden, kwargs["position_embeddings"], index, 1)
            differences.append((float((fused - result).norm()), float((result - hidden).norm())))
            hidden = result
        return hidden

    def _run(
        self,
        cache: PackedPass,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        first: int,
        count: int,
    ) -> torch.Tensor:
        kernel, pool = cache.kernel, cache.pool
        assert kernel is not None  # `forward` has asked
        assert pool is not None
        if pool is not self._pool:
            self._pool = pool
            for block, keys, values in zip(self._array, pool.keys, pool.values, strict=True):
                block.attention.keys, block.attention.values = keys.data_ptr(), values.data_ptr()
        rows = hidden.shape[1]
        result = hidden.clone(memory_format=torch.contiguous_format)
        normed, wide = (hidden.new_empty((rows, row)) for row in self._rows)
        cosines, sines = (_angles(part, rows) for part in rotation)
        span = _Span(
            ctypes.addressof(self._array) + first * ctypes.sizeof(_Block), ctypes.addressof(kernel.c_pass),
            cosines.data_ptr(), sines.data_ptr(), result.data_ptr(), normed.data_ptr(), wide.data_ptr(),
            rows, self._width, self._middle, *self._rows,
            count, cosines.shape[1], self._activation, torch.get_num_threads(),
        )  # fmt: skip
        self._library.fused_blocks(ctypes.byref(span))
        return result


class _Parts:
    """The parts of one block by what they are for."""

    def __init__(self, seen: Seen, how: How, shape: RowShape) -> None:
        """Raises Unfusible."""
        self._how, self._shape = how, shape
        size = shape.key_size
        self.width = next((part.factors.shape[0] for part in seen.parts if isinstance(part, FastRmsNorm)), 0)
        letters, parts = self._spelt(seen.parts)
        order = _PARTS.fullmatch(letters)
        if order is None:
            raise Unfusible(f"a block's parts are {letters}")
        self._norms = {
            name: parts[order.start(group) + offset] if order[group] else None for name, group, offset in _PLACES
        }
        self.qkv, self.out, self.gate_up, self.down = (part for part in parts if isinstance(part, Panels))
        self.activation = next(part for part in parts if isinstance(part, int))
        self.middle, heads = self.down.inputs, self.out.inputs // size
        sizes = (self.qkv.inputs, self.qkv.outputs, self.out.inputs, self.out.outputs)
        if (
            sizes != (self.width, (heads + 2 * shape.kv_heads) * size, heads * size, self.width)
            or (self.gate_up.inputs, self.gate_up.outputs) != (self.width, 2 * self.middle)
            or (self.down.outputs, shape.value_size) != (self.width, size)
            or any(len(norm.factors) != size for norm in (self._norms["query_norm"], self._norms["key_norm"]) if norm)
        ):
            raise Unfusible("linear layers have other sizes")
        if paged_attention.why_torch(torch.float32, size) or (
            how.sinks is not None and how.sinks.dtype != torch.float32
        ):
            raise Unfusible("attention is not computed by the kernel")

    @property
    def alike(self) -> tuple[int, ...]:
        """What all blocks of a span must have in common."""
        return self.width, self.middle, self.qkv.outputs, self.activation

    def c_block(self) -> _Block:
        how, shape = self._how, self._shape
        attention = paged_attention.Attention(
            heads=self.out.inputs // shape.key_size, kv_heads=shape.kv_heads, key_size=shape.key_size,
            value_size=shape.value_size, window=how.window or 0, scale=how.scale, softcap=how.softcap or 0.0,
            sinks=None if how.sinks is None else how.sinks.data_ptr(),
        )  # fmt: skip
        block = _Block(self.qkv.c_linear, self.out.c_linear, self.gate_up.c_linear, self.down.c_linear, attention)
        for name, norm in self._norms.items():
            if norm is not None:
                setattr(block, name, norm.factors.data_ptr())
                setattr(block, f"{name}_eps", norm.eps)
        return block

    def _spelt(self, modules: Items[nn.Module]) -> tuple[str, list[Any]]:
        """The letters of _PARTS, and for each the norm, the panels, or the number of the activation. Layers that share
        panels count once."""
        letters = ""
        parts: list[Any] = []
        for module in modules:
            if isinstance(module, FastRmsNorm):
                letters += "N" if len(module.factors) == self.width else "n"
                parts.append(module)
            elif isinstance(module, PackedLinear):
                if module.panels not in parts:
                    letters += "L"
                    parts.append(module.panels)
            elif isinstance(module, _NOTHING):
                continue
            elif next(module.parameters(), None) is None:
                letters += "A"
                parts.append(_activation_of(module))
            else:
                raise Unfusible(f"a block has a {type(module).__name__}")
        return letters, parts


def _activation_of(module: nn.Module) -> int:
    tried = torch.linspace(-8, 8, 257)
    result = module(tried)
    for number, activation in enumerate(_ACTIVATIONS):
        if isinstance(result, torch.Tensor) and torch.allclose(result, activation(tried), rtol=1e-6, atol=1e-7):
            return number
    raise Unfusible(f"the activation is {type(module).__name__}")


def _angles(part: torch.Tensor, rows: int) -> torch.Tensor:
    """[1, n, rotary] -> [n, rotary]."""
    if part.dim() != 3 or part.shape[:2] != (1, rows):
        raise Unfusible(f"angles of {rows} tokens have shape {list(part.shape)}")
    return part[0].float().contiguous()
