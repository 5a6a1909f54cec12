"""Packed attention equals softmax(Q K^T) V of each sequence alone, however its tokens came."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functions.attention import PackedCache, Unpackable, packed_attention
from functions.contract.messages import Opening, Slice
from functions.contract.sampling import SamplingParams
from functions.kv_cache import KvStore

TOLERANCE = 1e-5
OPENING = Opening(SamplingParams(), 1)


@dataclass(frozen=True)
class Shape:
    """One way to attend. `window`, `softcap` and `sinks` as in sliding-window, gemma2 and gpt_oss models."""

    kv_heads: int
    groups: int
    size: int
    value_size: int
    window: int | None
    softcap: float | None
    sinks: bool
    scaling: float | None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups


SHAPES = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.sampled_from([2, 5, 8]),
    value_size=st.sampled_from([3, 8]),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.sampled_from([0.5, 5.0, 50.0]),
    sinks=st.booleans(),
    scaling=st.none() | st.sampled_from([0.3, 1.0]),
)
# per sequence the lengths of its chunks: one that decodes has ones at the end
CHUNKS = st.lists(st.lists(st.integers(1, 9) | st.just(1), min_size=1, max_size=5), min_size=1, max_size=4)


@dataclass(frozen=True)
class Rows:
    """Queries [heads, n, size], keys [kv heads, n, size] and values [kv heads, n, value size] of one sequence."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, n: int) -> Rows:
        return cls(
            torch.randn(shape.heads, n, shape.size),
            torch.randn(shape.kv_heads, n, shape.size),
            torch.randn(shape.kv_heads, n, shape.value_size),
        )

    def part(self, start: int, end: int) -> Rows:
        return Rows(self.queries[:, start:end], self.keys[:, start:end], self.values[:, start:end])


def reference(rows: Rows, shape: Shape, sinks: torch.Tensor | None) -> torch.Tensor:
    """The definition, token by token and head by head in double precision -> [n, heads, value size]."""
    queries, keys, values = (tensor.double() for tensor in (rows.queries, rows.keys, rows.values))
    scale = shape.size**-0.5 if shape.scaling is None else shape.scaling
    out = torch.zeros(queries.shape[1], shape.heads, shape.value_size, dtype=torch.float64)
    for token in range(queries.shape[1]):
        first = 0 if shape.window is None else max(0, token + 1 - shape.window)
        for head in range(shape.heads):
            seen = slice(first, token + 1)
            group = head // shape.groups
            scores = keys[group, seen] @ queries[head, token] * scale
            if shape.softcap is not None:
                scores = torch.tanh(scores / shape.softcap) * shape.softcap
            weights = scores.exp()
            total = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0.0)
            out[token, head] = (weights / total) @ values[group, seen]
    return out.float()


def attend(rows: list[Rows], lengths: list[int], store: KvStore, slices: list[Slice], shape: Shape,
           sinks: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    """One packed pass as a model makes it -> [sum of lengths, heads, value size]."""
    query, key, value = (
        torch.cat([getattr(part, name) for part in rows], dim=1)[None] for name in ("queries", "keys", "values")
    )
    openings = {piece.sequence: OPENING for piece in slices}
    with PackedCache(store.reserve(slices, openings), lengths) as cache:
        key, value = cache.update(key, value, 0)
        out, weights = packed_attention(
            torch.nn.Module(), query, key, value, None, shape.scaling,
            sliding_window=shape.window, softcap=shape.softcap, s_aux=sinks,
        )  # fmt: skip
    assert weights is None
    assert cache.windows == [shape.window]
    for piece in slices:
        sequence = store.get(piece.sequence)
        assert sequence is not None
        sequence.position = piece.end
    return out[0]


@given(SHAPES, CHUNKS, st.integers(0, 1 << 31))
def test_equals_the_definition_for_any_shape_and_any_chunks(shape: Shape, chunks: list[list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    sequences = [Rows.random(shape, sum(lengths)) for lengths in chunks]
    sinks = torch.randn(shape.heads) if shape.sinks else None
    store = KvStore(1, 1, 1 << 20)
    results: list[list[torch.Tensor]] = [[] for _ in sequences]
    # the n-th pass holds the n-th chunk of every sequence that has one: prefill beside decode
    for turn in range(max(map(len, chunks))):
        present = [index for index, lengths in enumerate(chunks) if turn < len(lengths)]
        spans = [(sum(chunks[index][:turn]), sum(chunks[index][: turn + 1])) for index in present]
        slices = [Slice(i + 1, start, end - start) for i, (start, end) in zip(present, spans, strict=True)]
        parts = [sequences[i].part(start, end) for i, (start, end) in zip(present, spans, strict=True)]
        lengths = [piece.length for piece in slices]
        out = attend(parts, lengths, store, slices, shape, sinks)
        for index, piece in zip(present, torch.split(out, lengths), strict=True):
            results[index].append(piece)
    for rows, pieces in zip(sequences, results, strict=True):
        torch.testing.assert_close(torch.cat(pieces), reference(rows, shape, sinks), atol=TOLERANCE, rtol=TOLERANCE)


PLAIN = Shape(1, 2, 4, 4, None, None, False, None)


def test_a_sequence_taken_back_is_attended_as_if_it_had_not_gone_further() -> None:
    torch.manual_seed(0)
    rows, store = Rows.random(PLAIN, 8), KvStore(1, 1, 1 << 20)
    first = attend([rows.part(0, 5)], [5], store, [Slice(1, 0, 5)], PLAIN, None)
    attend([Rows.random(PLAIN, 3)], [3], store, [Slice(1, 5, 3)], PLAIN, None)  # forgotten again
    again = attend([rows.part(5, 8)], [3], store, [Slice(1, 5, 3)], PLAIN, None)
    result = torch.cat([first, again])
    torch.testing.assert_close(result, reference(rows, PLAIN, None), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("changed", ["key", "value", "both"])
def test_keys_and_values_must_be_those_that_the_cache_returned(changed: str) -> None:
    """A model that unfolds them after the cache would be served wrongly, so it is told apart."""
    with PackedCache(KvStore(1, 1, 1 << 20).reserve([Slice(1, 0, 3)], {1: OPENING}), [3]) as cache:
        key, value = cache.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), 0)
        wrong = {"key": (key.clone(), value), "value": (key, value + 0), "both": (key.clone(), value.clone())}
        with pytest.raises(Unpackable):
            cache.take(*wrong[changed], None)


def test_keys_and_values_are_taken_once() -> None:
    """Two attentions over one update would be two kinds of attention in one block."""
    with PackedCache(KvStore(1, 1, 1 << 20).reserve([Slice(1, 0, 3)], {1: OPENING}), [3]) as cache:
        key, value = cache.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), 0)
        assert len(cache.take(key, value, None)) == 1
        with pytest.raises(Unpackable):
            cache.take(key, value, None)


def test_nothing_is_taken_before_an_update() -> None:
    with (
        PackedCache(KvStore(1, 1, 1 << 20).reserve([Slice(1, 0, 3)], {1: OPENING}), [3]) as cache,
        pytest.raises(Unpackable),
    ):
        cache.take(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), None)
