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

SHORT_MAX = 4  # slices of so few tokens are computed here; torch's kernel is better with more rows
_SIZE_MAX = 512  # of a head: SIZE_MAX_ of the C source
_Int32 = npt.NDArray[np.int32]


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pages", "page_starts", "starts", "lengths", "rows")),
        *((name, ctypes.c_int32) for name in ("slices", "page", "short_max", "threads")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "keys", "values")),
        *((f"{name}_{of}", ctypes.c_int64) for name in ("query", "key", "value") for of in ("head", "token")),
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


class Kernel:
    """The kernel for one pass. `layout` must outlive it: the kernel reads its arrays."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pass = _Pass(
            layout.pages.ctypes.data, layout.page_starts.ctypes.data, layout.starts.ctypes.data,
            layout.lengths.ctypes.data, layout.rows.ctypes.data,
            len(layout.starts), layout.page, SHORT_MAX, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Files key and value [kv heads, n, size] in the block's pools [tokens, kv heads, size] and returns
        [n, heads, value size], whose rows of slices with more than SHORT_MAX tokens are not set. query
        [heads, n, size]."""
        library = kernels()
        assert library is not None  # `takes` has said so
        out = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
        block = _Block(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            pools[0].data_ptr(), pools[1].data_ptr(),
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            query.shape[0], key.shape[0], key.shape[2], value.shape[2], window or 0, scale, softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )  # fmt: skip
        library.paged_attention(ctypes.byref(self._pass), ctypes.byref(block))
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
