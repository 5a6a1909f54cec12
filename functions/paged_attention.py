"""Attention over paged keys and values on a CPU: the kernel of `paged_attention.c`.

Without it (see `functions.kernels`), on another device or in another dtype `functions.attention` computes the same with
torch, slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from functions.kernels import kernels, why_no_kernels

_SIZE_MAX = 512  # of a head: SIZE_MAX_ of the C source
_TILE_TOKENS = 32  # TILE_TOKENS of kernels.h
_Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class How:
    """One block's kind of attention. `sinks` [heads] are scores without a value (gpt_oss)."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def fusible(self) -> bool:
        """Whether torch's own function computes it."""
        return self.softcap is None and self.sinks is None


class Pass(ctypes.Structure):
    """Pass of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pages", "page_starts", "starts", "lengths", "rows")),
        *((name, ctypes.c_void_p) for name in ("tile_slices", "tile_firsts")),
        *((name, ctypes.c_int32) for name in ("slices", "tiles", "page", "threads")),
    )


class Attention(ctypes.Structure):
    """Attention of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "keys", "values")),
        *((f"{name}_{of}", ctypes.c_int64) for name in ("query", "key", "value") for of in ("head", "token")),
        ("out_token", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "key_size", "value_size", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("sinks", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the slices of a pass lie, all int32: slice i brings `lengths[i]` tokens from position `starts[i]` on, in
    the rows from `rows[i]` on; its pages are `pages[page_starts[i] : page_starts[i + 1]]`, of `page` tokens each."""

    pages: _Int32
    page_starts: _Int32
    starts: _Int32
    lengths: _Int32
    rows: _Int32
    page: int

    def tiles(self) -> tuple[_Int32, _Int32]:
        """Slices cut into tiles of up to 32 tokens: of which slice, and from which of its tokens on."""
        counts = -(-self.lengths // _TILE_TOKENS)
        slices = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        before = np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)
        return slices, (np.arange(len(slices), dtype=np.int32) - before) * np.int32(_TILE_TOKENS)


class Kernel:
    """The kernel for one pass."""

    def __init__(self, layout: Layout) -> None:
        slices, firsts = layout.tiles()
        self._read = layout, slices, firsts  # by the kernel, so they must live as long
        self.c_pass = Pass(
            layout.pages.ctypes.data, layout.page_starts.ctypes.data, layout.starts.ctypes.data,
            layout.lengths.ctypes.data, layout.rows.ctypes.data, slices.ctypes.data, firsts.ctypes.data,
            len(layout.starts), len(slices), layout.page, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        how: How,
    ) -> torch.Tensor:
        """Files key and value [kv heads, n, size] in the block's pools [tokens, kv heads, size] and returns
        [n, heads, value size]. query [heads, n, size]."""
        library = kernels()
        assert library is not None  # `takes` has said so
        out = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
        attention = Attention(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            pools[0].data_ptr(), pools[1].data_ptr(),
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            out.stride(0), query.shape[0], key.shape[0], key.shape[2], value.shape[2], how.window or 0, how.scale,
            how.softcap or 0.0, None if how.sinks is None else how.sinks.data_ptr(),
        )  # fmt: skip
        library.paged_attention(ctypes.byref(self.c_pass), ctypes.byref(attention))
        return out


def takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    sinks: torch.Tensor | None,
) -> bool:
    """Whether the kernel is there, and made for such tensors."""
    tensors = (query, key, value, *pools) if sinks is None else (query, key, value, *pools, sinks)
    return (
        query.device.type == "cpu"
        and all(tensor.dtype == torch.float32 and tensor.stride(-1) == 1 for tensor in tensors)
        and max(key.shape[-1], value.shape[-1]) <= _SIZE_MAX
        and kernels() is not None
    )


def why_torch(dtype: torch.dtype, size: int) -> str | None:
    """Why a model of such numbers and heads of `size` attends by torch on a CPU; None where the kernel does it."""
    if dtype != torch.float32:
        return f"the kernel computes in float32, the model in {str(dtype).removeprefix('torch.')}"
    if size > _SIZE_MAX:
        return f"the kernel takes heads of up to {_SIZE_MAX}, the model has {size}"
    return why_no_kernels()


def int32(values: Items[int]) -> _Int32:
    return np.array(values, dtype=np.int32)
