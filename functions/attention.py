"""Attention over packed sequences, through Transformers' attention interface.

A model calls `cache.update(keys, values, block)` and then the attention function with what update returned. Here
`PackedPass.update` only remembers which block it is; the attention function files keys and values in the block's pages
and computes. Queries arrive as [1, heads, sum of lengths, size] and are cut by slice:

    tokens      | a | b | c c c c c c c |              one forward pass
    attention   | a over a's past | b over b's past | c over c's past |

The compiled kernel computes them all in one call and reads pages where they lie. Without it slices of one token
(decode) are computed by torch over gathered and padded rows, and each longer one (prefill) is a call of torch's own
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from functions import paged_attention
from functions.contract.messages import KV_PAGE_TOKENS
from functions.kv_cache import KvPool, RowShape, Sequence, pool_rows
from functions.paged_attention import How

PACKED = "stagecraft_packed"
_PADDING_MAX = 1.25  # sequences that are gathered together differ in length by no more than that

_current: ContextVar[PackedPass] = ContextVar("packed_pass")


def current_pass() -> PackedPass:
    """The pass that the model is in."""
    return _current.get()


class Unpackable(Exception):
    """The model does not attend in the way that packing needs."""


class PackedPass(Cache):  # type: ignore[misc]  # Transformers has no types
    """One forward pass: slices of `lengths` tokens, each from its sequence's position on, in the order of their rows.

    Without a pool nothing is filed, and every slice is a whole text."""

    def __init__(self, sequences: Items[Sequence], lengths: Items[int], pool: KvPool | None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.lengths = list(lengths)
        self.hows: list[How] = []  # of each attention call so far
        self.shapes: list[RowShape] = []  # what each of these calls was given to file
        self._given: tuple[torch.Tensor, torch.Tensor, int] | None = None
        self._rows = _starts(self.lengths)
        self.pool = pool
        self._starts = [s.position for s in sequences] if pool is not None else [0] * len(self.lengths)
        self._pages = _Pages(sequences, self._starts, self.lengths, self._rows) if pool is not None else None

    def __enter__(self) -> PackedPass:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    @property
    def kernel(self) -> paged_attention.Kernel | None:
        """The kernel for this pass, if it is filed."""
        return None if self._pages is None else self._pages.kernel

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, kv heads, sum of lengths, size] of block `layer_idx`, returned unchanged."""
        self._given = key_states, value_states, layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly, so the length that models would count on is none."""
        return 0

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """query [1, heads, n, size], key and value as given to `update` -> [n, heads, value size].

        Raises Unpackable unless `key` and `value` are what `update` returned: a model that caches something else than
        it attends over (compressed latents) would need its own unfolding of what is filed."""
        if self._given is None or key is not self._given[0] or value is not self._given[1]:
            raise Unpackable("keys and values are changed between the cache and attention")
        block = self._given[2]
        self._given = None
        self.hows.append(how)
        query, key, value = query[0], key[0], value[0]
        if self.pool is None or self._pages is None:
            self.shapes.append(RowShape(key.shape[0], key.shape[2], value.shape[2]))
            out = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
            long: Items[int] = range(len(self.lengths))
        else:
            pools = self.pool.keys[block], self.pool.values[block]
            out, long = self._pages.attend(query, key, value, pools, how)
        for index in long:
            rows = slice(self._rows[index], self._rows[index] + self.lengths[index])
            keys, values = self._past(index, block, key[:, rows], value[:, rows])
            attend = _fused if how.fusible else _explicit
            out[rows] = attend(query[:, rows], keys, values, how).transpose(0, 1)
        return out

    def _past(
        self, index: int, block: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a slice's sequence up to its end, [kv heads, tokens, size]."""
        if self._starts[index] == 0:
            return key, value
        assert self.pool is not None  # without one all slices start at 0
        assert self._pages is not None
        rows = self._pages.rows_of(index, self.pool.keys[block].device)
        keys, values = self.pool.keys[block][rows], self.pool.values[block][rows]
        return keys.transpose(0, 1), values.transpose(0, 1)


class _Pages:
    """Where the slices of a pass lie in the pools, worked out once for all blocks."""

    def __init__(self, sequences: Items[Sequence], starts: Items[int], lengths: Items[int], rows: Items[int]) -> None:
        self._pages = [s.pages for s in sequences]
        self._ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        self._layout = paged_attention.Layout(
            np.frombuffer(b"".join(self._pages), dtype=np.int32),
            paged_attention.int32([*_starts([len(pages) for pages in self._pages]), sum(map(len, self._pages))]),
            paged_attention.int32(starts),
            paged_attention.int32(lengths),
            paged_attention.int32(rows),
            KV_PAGE_TOKENS,
        )
        self._lengths = lengths
        self.kernel = paged_attention.Kernel(self._layout)
        self._rows: dict[int, torch.Tensor] = {}
        self._new: torch.Tensor | None = None
        self._padded: list[_Padded] | None = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor],
        how: How,
    ) -> tuple[torch.Tensor, Items[int]]:  # fmt: skip
        """Files key and value in the block's pools and computes what is short: [n, heads, value size], and the indices
        of the slices whose rows are still to be computed."""
        if paged_attention.takes(query, key, value, pools, how.sinks):
            return self.kernel(query, key, value, pools, how), ()
        self._file(key, value, pools)
        out = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
        if self._padded is None:
            self._padded = self._groups(query.device)
        for group in self._padded:
            out[group.rows] = group.attend(query, pools, how)
        return out, [i for i, length in enumerate(self._lengths) if length > 1]

    def rows_of(self, index: int, device: torch.device) -> torch.Tensor:
        """Rows of the pools that hold a slice's sequence up to its end."""
        if index not in self._rows:
            self._rows[index] = torch.from_numpy(pool_rows(self._pages[index], 0, self._ends[index])).to(device)
        return self._rows[index]

    def _file(self, key: torch.Tensor, value: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._new is None:
            parts = [
                pool_rows(pages, end - length, end)
                for pages, end, length in zip(self._pages, self._ends, self._lengths, strict=True)
            ]
            self._new = torch.from_numpy(np.concatenate(parts)).to(key.device)
        pools[0].index_copy_(0, self._new, key.transpose(0, 1))
        pools[1].index_copy_(0, self._new, value.transpose(0, 1))

    def _groups(self, device: torch.device) -> list[_Padded]:
        """Slices of one token in groups of about the same length."""
        single = [i for i, length in enumerate(self._lengths) if length == 1]
        groups: list[list[int]] = []
        for index in sorted(single, key=lambda i: self._ends[i]):
            if not groups or self._ends[index] > self._ends[groups[-1][0]] * _PADDING_MAX:
                groups.append([])
            groups[-1].append(index)
        return [self._padded_group(group, device) for group in groups]

    def _padded_group(self, group: list[int], device: torch.device) -> _Padded:
        ends = [self._ends[i] for i in group]
        index = np.zeros((len(group), max(ends)), dtype=np.int64)
        for row, (i, end) in enumerate(zip(group, ends, strict=True)):
            index[row, :end] = pool_rows(self._pages[i], 0, end)
            index[row, end:] = index[row, 0]  # its own row: zero times another's NaN would be NaN
        rows = torch.from_numpy(self._layout.rows[group].astype(np.int64))
        return _Padded(rows.to(device), torch.from_numpy(index).to(device), torch.tensor(ends, device=device))


@dataclass(frozen=True, slots=True)
class _Padded:
    """Slices of one token each, to be computed together: their `rows` [b] in the pass, the pools' rows of their past
    `index` [b, longest], of which `ends` [b] count."""

    rows: torch.Tensor
    index: torch.Tensor
    ends: torch.Tensor

    def attend(self, query: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor], how: How) -> torch.Tensor:
        """[b, heads, value size]. Heads that share keys stand as rows of one query: nothing is repeated for them."""
        keys, values = (pool[self.index].transpose(1, 2) for pool in pools)  # [b, kv heads, longest, size]
        queries = query[:, self.rows].transpose(0, 1)
        queries = queries.reshape(len(self.rows), keys.shape[1], -1, query.shape[2])  # [b, kv heads, group, size]
        at = torch.arange(self.index.shape[1], device=query.device)
        seen = at < self.ends[:, None]
        if how.window is not None:
            seen &= at >= self.ends[:, None] - how.window
        mask = seen[:, None, None]
        if how.fusible:
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=how.scale)
        else:
            sinks = None if how.sinks is None else how.sinks.view(1, keys.shape[1], -1, 1)
            out = _weighted(queries @ keys.transpose(2, 3), mask, how, sinks) @ values
        return out.flatten(1, 2)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, n, size] -> [1, n, heads, value size], as Transformers' attention functions."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _current.get().attend(query, key, value, How(scale, sliding_window, softcap, s_aux))[None], None


def _fused(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: How) -> torch.Tensor:
    """query [heads, n, size], keys and values [kv heads, all, size] -> [heads, n, value size]."""
    new, total = query.shape[1], keys.shape[1]
    plain = new == total and (how.window is None or total <= how.window)
    mask = None if plain else _mask(new, total, how.window, query.device)
    out = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=plain, scale=how.scale,
        enable_gqa=query.shape[0] != keys.shape[0],
    )  # fmt: skip
    return out[0]


def _explicit(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: How) -> torch.Tensor:
    """The same written out, for what the fused kernel lacks: soft-capped scores (gemma2) and sinks (gpt_oss)."""
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
    mask = _mask(query.shape[1], keys.shape[1], how.window, query.device)
    sinks = None if how.sinks is None else how.sinks.view(-1, 1, 1)
    return _weighted(query @ keys.transpose(1, 2), mask, how, sinks) @ values


def _weighted(products: torch.Tensor, mask: torch.Tensor, how: How, sinks: torch.Tensor | None) -> torch.Tensor:
    """Products of queries and keys [..., n, all] -> weights of the values. `sinks` is [..., 1, 1] or [..., n, 1]."""
    scores = products * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is None:
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(products.dtype)
    sinks = sinks.expand(*scores.shape[:-1], 1).to(scores.dtype)
    weights = F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(products.dtype)


def _mask(new: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [new, total]: the i-th new token sees all before it and itself, at most `window` of them."""
    at = torch.arange(total - new, total, device=device)[:, None]
    other = torch.arange(total, device=device)[None]
    seen = other <= at
    return seen if window is None else seen & (other > at - window)


def _starts(lengths: Items[int]) -> list[int]:
    """Where each of these runs starts when they lie one after another."""
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    return starts


AttentionInterface.register(PACKED, packed_attention)
