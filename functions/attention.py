"""Attention over packed sequences, through Transformers' attention interface.

A model calls `cache.update(keys, values, block)` and then the attention function with what update returned. Here
`PackedCache.update` files each sequence's rows in its own buffers and returns its input; the attention function takes
the buffers from the cache instead. Queries arrive as [1, heads, sum of lengths, size] and are cut by slice:

    tokens      | a a a a a | b | c c |          one forward pass
    attention   | a over a's past | b over b's past | c over c's past |
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from functions.kv_cache import Sequence, file_rows

PACKED = "stagecraft_packed"

_current: ContextVar[PackedCache] = ContextVar("packed_cache")


class Unpackable(Exception):
    """The model does not attend in the way that packing needs."""


class PackedCache(Cache):  # type: ignore[misc]  # Transformers has no types
    """The caches of the sequences in one forward pass, in the order of their rows."""

    def __init__(self, sequences: Items[Sequence], lengths: Items[int]) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.sequences = sequences
        self.lengths = list(lengths)
        self.windows: list[int | None] = []  # sliding window of each attention call so far
        self._now: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> PackedCache:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Files keys and values [1, kv heads, sum of lengths, size] of block `layer_idx`; returns them unchanged."""
        keys, values = torch.split(key_states[0], self.lengths, 1), torch.split(value_states[0], self.lengths, 1)
        self._now = [
            (file_rows(s.keys, layer_idx, s, k), file_rows(s.values, layer_idx, s, v))
            for s, k, v in zip(self.sequences, keys, values, strict=True)
        ]
        self._given = key_states, value_states
        return key_states, value_states

    def take(
        self, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per sequence (keys, values) [kv heads, all tokens, size] of the block just filed.

        Raises Unpackable unless `key` and `value` are what `update` returned: a model that caches something else than
        it attends over (compressed latents) would need its own unfolding of what is filed."""
        if self._given is None or key is not self._given[0] or value is not self._given[1]:
            raise Unpackable("keys and values are changed between the cache and attention")
        self._given = None
        self.windows.append(window)
        return self._now

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly, so the length that models would count on is none."""
        return 0


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
    """query [1, heads, n, size] -> [1, n, heads, value size]; key and value are taken from the current cache."""
    cache = _current.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    pieces = torch.split(query[0], cache.lengths, 1)
    rows = []
    for piece, (keys, values) in zip(pieces, cache.take(key, value, sliding_window), strict=True):
        if softcap is None and s_aux is None:
            rows.append(_fused(piece, keys, values, scale, sliding_window))
        else:
            rows.append(_explicit(piece, keys, values, scale, sliding_window, softcap, s_aux))
    return torch.cat(rows, dim=1).transpose(0, 1)[None], None


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """query [heads, n, size], keys and values [kv heads, all, size] -> [heads, n, value size]."""
    new, total = query.shape[1], keys.shape[1]
    if new == 1 and window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    plain = new == total and (window is None or total <= window)
    mask = None if new == 1 or plain else _mask(new, total, window, query.device)
    out = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=plain and new > 1, scale=scale,
        enable_gqa=query.shape[0] != keys.shape[0],
    )  # fmt: skip
    return out[0]


def _explicit(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None,
    softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The same written out, for what the fused kernel lacks: soft-capped scores (gemma2) and sinks (gpt_oss)."""
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
    scores = query @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = _mask(query.shape[1], keys.shape[1], window, query.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is None:
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        sink = sinks.reshape(-1, 1, 1).expand(-1, query.shape[1], 1).to(scores.dtype)
        weights = F.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(values.dtype) @ values


def _mask(new: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [new, total]: the i-th new token sees all before it and itself, at most `window` of them."""
    at = torch.arange(total - new, total, device=device)[:, None]
    other = torch.arange(total, device=device)[None]
    seen = other <= at
    return seen if window is None else seen & (other > at - window)


AttentionInterface.register(PACKED, packed_attention)
