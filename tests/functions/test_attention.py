"""Packed attention equals softmax(Q K^T) V of each sequence alone, however its tokens came: by the compiled kernel, and
by torch as where there is none."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functions import kernels, paged_attention
from functions.attention import PackedPass, Unpackable, packed_attention
from functions.contract.messages import KV_PAGE_TOKENS, Opening, Slice
from functions.contract.sampling import SamplingParams
from functions.kv_cache import KvPool, KvStore, RowShape
from tests.functions import processors

TOLERANCE = 1e-5
OPENING = Opening(SamplingParams(), 1)
CPU = torch.device("cpu")
BUILT = paged_attention.why_torch(torch.float32, 8) is None
needs_kernel = pytest.mark.skipif(not BUILT, reason="the kernel is not built: no C compiler?")
TORCH = "torch"
WAYS = [*(pytest.param(*kind.values, marks=[*kind.marks, needs_kernel]) for kind in processors.KINDS), TORCH]


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """The kernel for a kind of processor, or torch as on a machine without a compiler."""
    if way == TORCH:
        with patch.dict(os.environ, {kernels.NO_KERNELS: "1"}):
            yield
    else:
        with processors.computed_as_on(way):
            yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Shape:
    """One way to attend. `window`, `softcap` and `sinks` as in sliding-window, gemma2 and gpt_oss models."""

    kv_heads: int
    groups: int
    size: int
    value_size: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scaling: float | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    def some_sinks(self) -> torch.Tensor | None:
        return torch.randn(self.heads) if self.sinks else None


SHAPES = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3) | st.sampled_from([16, 17, 33]),
    size=st.sampled_from([2, 5, 8, 16, 24, 64]),
    value_size=st.sampled_from([3, 8, 33, 64]),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.sampled_from([0.5, 5.0, 50.0]),
    sinks=st.booleans(),
    scaling=st.none() | st.sampled_from([0.3, 1.0]),
)
# per sequence the lengths of its chunks: one that decodes has ones at the end; up to 4 tokens are short to the kernel
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

    def __len__(self) -> int:
        return self.queries.shape[1]

    def part(self, start: int, end: int) -> Rows:
        return Rows(self.queries[:, start:end], self.keys[:, start:end], self.values[:, start:end])


def reference(rows: Rows, shape: Shape, sinks: torch.Tensor | None, first: int = 0) -> torch.Tensor:
    """The definition in double precision, of the tokens from `first` on -> [n, heads, value size]."""
    queries, keys, values = (tensor.double() for tensor in (rows.queries, rows.keys, rows.values))
    scale = shape.size**-0.5 if shape.scaling is None else shape.scaling
    out = torch.zeros(len(rows) - first, shape.heads, shape.value_size, dtype=torch.float64)
    for token in range(first, len(rows)):
        seen = slice(0 if shape.window is None else max(0, token + 1 - shape.window), token + 1)
        for head in range(shape.heads):
            group = head // shape.groups
            scores = keys[group, seen] @ queries[head, token] * scale
            if shape.softcap is not None:
                scores = torch.tanh(scores / shape.softcap) * shape.softcap
            weights = scores.exp()
            total = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0.0)
            out[token - first, head] = (weights / total) @ values[group, seen]
    return out.float()


class Cache:
    """Sequences of one block of `shape`, attended to pass by pass."""

    def __init__(self, shape: Shape, sinks: torch.Tensor | None = None, pages: int = 400) -> None:
        self.shape = shape
        self.sinks = sinks
        self.store = KvStore(1, pages * KV_PAGE_TOKENS)
        row = RowShape(shape.kv_heads, shape.size, shape.value_size)
        self.pool = KvPool([row], pages, torch.float32, CPU)

    def attend(self, parts: Sequence[tuple[int, int, Rows]], how: Shape | None = None) -> list[torch.Tensor]:
        """One packed pass over (sequence, start, rows) as a model makes it -> per slice [n, heads, value size]."""
        shape = how or self.shape
        slices = [Slice(sequence, start, len(rows)) for sequence, start, rows in parts]
        # as a projection leaves them: a view of [1, n, heads, size]
        query, key, value = (
            torch.cat([getattr(rows, name) for _, _, rows in parts], dim=1).transpose(0, 1).contiguous().transpose(0, 1)
            for name in ("queries", "keys", "values")
        )
        sequences = self.store.reserve(slices, {piece.sequence: OPENING for piece in slices})
        lengths = [piece.length for piece in slices]
        with PackedPass(sequences, lengths, self.pool) as cache:
            key, value = cache.update(key[None], value[None], 0)
            out, weights = packed_attention(
                torch.nn.Module(), query[None], key, value, None, shape.scaling,
                sliding_window=shape.window, softcap=shape.softcap, s_aux=self.sinks,
            )  # fmt: skip
        assert weights is None
        assert [how.window for how in cache.hows] == [shape.window]
        for piece, sequence in zip(slices, sequences, strict=True):
            sequence.position = piece.end
        return list(torch.split(out[0], lengths))


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=TOLERANCE)


# -- the definition


@pytest.mark.parametrize("way", WAYS)
@given(SHAPES, CHUNKS, st.integers(0, 1 << 31))
def test_equals_the_definition_for_any_shape_and_any_chunks(
    way: str, shape: Shape, chunks: list[list[int]], seed: int
) -> None:
    torch.manual_seed(seed)
    sequences = [Rows.random(shape, sum(lengths)) for lengths in chunks]
    sinks = shape.some_sinks()
    cache = Cache(shape, sinks)
    results: list[list[torch.Tensor]] = [[] for _ in sequences]
    # the n-th pass holds the n-th chunk of every sequence that has one: prefill beside decode
    for turn in range(max(map(len, chunks))):
        present = [index for index, lengths in enumerate(chunks) if turn < len(lengths)]
        spans = [(sum(chunks[index][:turn]), sum(chunks[index][: turn + 1])) for index in present]
        parts = [(i + 1, start, sequences[i].part(start, end)) for i, (start, end) in zip(present, spans, strict=True)]
        with computed_by(way):
            out = cache.attend(parts)
        for index, piece in zip(present, out, strict=True):
            results[index].append(piece)
    for rows, pieces in zip(sequences, results, strict=True):
        assert_close(torch.cat(pieces), reference(rows, shape, sinks))


PLAIN = Shape(kv_heads=2, groups=2, size=8, value_size=8)
KINDS = {
    "plain": PLAIN,
    "window shorter than a chunk of the kernel": replace(PLAIN, window=100),
    "window longer than that": replace(PLAIN, window=200),
    "window of one": replace(PLAIN, window=1),
    "softcap": replace(PLAIN, softcap=2.0),
    "sinks and window": replace(PLAIN, sinks=True, window=130),
    "one head": Shape(1, 1, 8, 8),
    "16 heads a group": Shape(1, 16, 8, 8),
    "more heads than a round": Shape(1, 20, 8, 8),
    "heads of 64": Shape(1, 2, 64, 64),
    "heads of 96": Shape(1, 2, 96, 96),
    "heads of 128": Shape(1, 2, 128, 128),
    "heads of 512": Shape(1, 2, 512, 512),
    "heads of 7": Shape(2, 2, 7, 7),
    "values of another size": Shape(2, 2, 64, 40),
    "keys of 128, values of 64": Shape(1, 2, 128, 64),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("lengths", "new", "seed"),
    [
        # before and after the bounds of pages (8) and of the kernel's chunks (128); slices of 1 to 5 tokens
        ([0, 1, 7, 8, 9, 63, 127, 128, 129, 300, 40, 500], [1, 1, 1, 2, 1, 3, 1, 1, 4, 1, 5, 1], 1),
        # before and after the bounds of the kernel's tiles (32 tokens, 64 keys), at the start and further on
        ([0, 0, 1, 63, 64, 150], [5, 65, 31, 32, 33, 70], 4),
    ],
    ids=["decode", "prefill"],
)
@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_sequences_of_very_different_lengths_go_together(
    shape: Shape, lengths: list[int], new: list[int], seed: int, way: str
) -> None:
    torch.manual_seed(seed)
    sinks = shape.some_sinks()
    cache = Cache(shape, sinks)
    sequences = [Rows.random(shape, past + n) for past, n in zip(lengths, new, strict=True)]
    cut = [(i + 1, past, rows) for i, (past, rows) in enumerate(zip(lengths, sequences, strict=True))]
    with computed_by(way):
        cache.attend([(i, 0, rows.part(0, past)) for i, past, rows in cut if past])
        out = cache.attend([(i, past, rows.part(past, len(rows))) for i, past, rows in cut])
    for (_, past, rows), result in zip(cut, out, strict=True):
        assert_close(result, reference(rows, shape, sinks, past))


@pytest.mark.parametrize("way", WAYS)
def test_pages_may_lie_in_any_order(way: str) -> None:
    torch.manual_seed(2)
    cache = Cache(PLAIN)
    others = [Rows.random(PLAIN, 24) for _ in range(4)]
    with computed_by(way):
        cache.attend([(i + 1, 0, rows) for i, rows in enumerate(others)])
        cache.store.release([3])
        cache.store.release([1])
        rows = Rows.random(PLAIN, 60)
        cache.attend([(9, 0, rows.part(0, 20))])
        cache.store.release([2])
        cache.attend([(9, 20, rows.part(20, 59))])
        (result,) = cache.attend([(9, 59, rows.part(59, 60))])
        more = Rows.random(PLAIN, 1)
        (other,) = cache.attend([(4, 24, more)])
    sequence = cache.store.get(9)
    assert sequence is not None
    assert list(sequence.pages) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert_close(result, reference(rows, PLAIN, None, 59))
    whole = Rows(*(torch.cat([getattr(part, name) for part in (others[3], more)], 1)
                   for name in ("queries", "keys", "values")))  # fmt: skip
    assert_close(other, reference(whole, PLAIN, None, 24))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("again", [1, 3, 6])
def test_a_sequence_taken_back_is_attended_as_if_it_had_not_gone_further(way: str, again: int) -> None:
    torch.manual_seed(0)
    rows, cache = Rows.random(PLAIN, 12), Cache(PLAIN)
    with computed_by(way):
        cache.attend([(1, 0, rows.part(0, 6))])
        cache.attend([(1, 6, Rows.random(PLAIN, 30))])  # forgotten again
        (result,) = cache.attend([(1, 6, rows.part(6, 6 + again))])
    assert_close(result, reference(rows.part(0, 6 + again), PLAIN, None, 6))


@pytest.mark.parametrize("way", WAYS)
def test_what_another_sequence_has_broken_reaches_no_other(way: str) -> None:
    """Nothing times infinity is NaN, so it must not even be looked at: others' pages, and what a page held before."""
    torch.manual_seed(0)
    cache, rows, short = Cache(PLAIN), Rows.random(PLAIN, 21), Rows.random(PLAIN, 18)
    broken = Rows.random(PLAIN, 21)
    for part in (broken.queries, broken.keys, broken.values):
        part.fill_(torch.inf)
    with computed_by(way):
        cache.attend([(1, 0, broken.part(0, 20)), (2, 0, rows.part(0, 20)), (3, 0, short.part(0, 17))])
        together = [(1, 20, broken.part(20, 21)), (2, 20, rows.part(20, 21)), (3, 17, short.part(17, 18))]
        _, beside, also = cache.attend(together)
        cache.store.release([1])
        after, after_too = cache.attend(together[1:])
    for result in (beside, after):
        assert_close(result, reference(rows, PLAIN, None, 20))
    for result in (also, after_too):
        assert_close(result, reference(short, PLAIN, None, 17))


@pytest.mark.parametrize("way", WAYS)
def test_scores_that_are_far_apart_or_huge_stay_finite(way: str) -> None:
    torch.manual_seed(0)
    cache, rows = Cache(PLAIN), Rows.random(PLAIN, 200)
    rows.queries.mul_(100)
    with computed_by(way):
        cache.attend([(1, 0, rows.part(0, 199))])
        (result,) = cache.attend([(1, 199, rows.part(199, 200))])
    scores = rows.keys.double()[0] @ rows.queries.double()[0, 199] * PLAIN.size**-0.5
    expected = scores.softmax(0) @ rows.values.double()[0]
    torch.testing.assert_close(result[0, 0].double(), expected, atol=1e-4, rtol=1e-4)


# -- the kernel


def test_where_there_is_a_compiler_the_kernel_is_built() -> None:
    """Without this nobody would notice that all tests of it are left out."""
    assert BUILT or not shutil.which("gcc"), paged_attention.why_torch(torch.float32, 8)


@pytest.mark.usefixtures("processor")
@needs_kernel
@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_a_sequence_gets_the_same_bits_in_any_company_and_with_any_threads(shape: Shape) -> None:
    torch.manual_seed(3)
    sinks, past = shape.some_sinks(), 203
    rows = Rows.random(shape, past + 2)
    others = [Rows.random(shape, n) for n in (2, 90, 257, 33, 6)]

    def other(index: int, *, last: bool) -> tuple[int, int, Rows]:
        """The last token of another sequence, or all before it."""
        end = len(others[index]) - 1
        return (
            (index + 1, end, others[index].part(end, end + 1)) if last else (index + 1, 0, others[index].part(0, end))
        )

    def results(count: int, before: Sequence[int], after: Sequence[int], together: bool) -> torch.Tensor:
        """Two tokens of the sequence, between tokens of others, in pages that lie elsewhere."""
        cache = Cache(shape, sinks)
        with threads(count):
            cache.attend([*(other(i, last=False) for i in (*before, *after)), (9, 0, rows.part(0, past))])
            cuts = [(past, past + 2)] if together else [(past, past + 1), (past + 1, past + 2)]
            found = []
            for start, end in cuts:
                one, two = ([other(i, last=True) for i in some] for some in (before, after))
                found.append(cache.attend([*one, (9, start, rows.part(start, end)), *two])[len(before)])
        return torch.cat(found)

    alone = results(1, [], [], together=False)
    for count, before, after in [(1, [0, 1], [2]), (2, [], []), (2, [2, 3, 4], [1]), (5, [1], [0, 2, 3, 4])]:
        assert torch.equal(results(count, before, after, together=False), alone)
        assert torch.equal(results(count, before, after, together=True), alone), "and however its tokens are cut"


@pytest.mark.usefixtures("processor")
@needs_kernel
@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_a_long_slice_too(shape: Shape) -> None:
    torch.manual_seed(5)
    sinks, past, new = shape.some_sinks(), 40, 45
    rows = Rows.random(shape, past + new)
    others = [Rows.random(shape, n) for n in (1, 33, 70)]

    def result(count: int, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
        cache = Cache(shape, sinks)
        one, two = ([(i + 1, 0, others[i]) for i in some] for some in (before, after))
        with threads(count):
            cache.attend([(9, 0, rows.part(0, past))])
            return cache.attend([*one, (9, past, rows.part(past, past + new)), *two])[len(before)]

    alone = result(1, [], [])
    for count, before, after in [(1, [0, 1], [2]), (2, [], []), (2, [2, 1], [0]), (5, [1], [0, 2])]:
        assert torch.equal(result(count, before, after), alone)


@needs_kernel
def test_threads_and_numbers_stay_torchs_own() -> None:
    """One libgomp, the one that torch brings; and no flag of the processor that rounds tiny numbers to zero, which a
    library linked with -ffast-math would set for the whole process."""
    code = """
import torch
from functions import kernels, paged_attention
assert paged_attention.why_torch(torch.float32, 8) is None
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
print(float(torch.tensor([1e-40]) * 1) != 0)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    libraries, tiny = done.stdout.splitlines()
    assert tiny == "True"
    assert len(libraries.split()) == 1
    brought = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    assert not brought.exists() or Path(libraries).samefile(brought)


@needs_kernel
@pytest.mark.parametrize("changed", ["query", "key", "value", "pools", "sinks"])
def test_the_kernel_is_given_no_other_numbers_than_float32(changed: str) -> None:
    given: dict[str, Any] = {name: torch.zeros(2, 3, 8) for name in ("query", "key", "value")}
    given |= {"pools": (torch.zeros(8, 2, 8), torch.zeros(8, 2, 8)), "sinks": torch.zeros(2)}
    assert paged_attention.takes(**given)
    given[changed] = (given["pools"][0], given["pools"][1].half()) if changed == "pools" else given[changed].half()
    assert not paged_attention.takes(**given)


@pytest.mark.parametrize(
    ("dtype", "size", "environment", "reason"),
    [
        (torch.bfloat16, 64, {}, "the kernel computes in float32, the model in bfloat16"),
        (torch.float32, 513, {}, "the kernel takes heads of up to 512, the model has 513"),
        (torch.float32, 64, {kernels.NO_KERNELS: "1"}, "STAGECRAFT_NO_KERNELS is set"),
    ],
)
def test_why_torch_attends(dtype: torch.dtype, size: int, environment: dict[str, str], reason: str) -> None:
    with patch.dict(os.environ, environment):
        assert paged_attention.why_torch(dtype, size) == reason


@pytest.mark.parametrize(
    ("beside", "reason"), [(None, "not built.*`python tools/build_kernels.py`"), ("no library", "cannot be loaded: ")]
)
def test_a_kernel_that_is_not_there_or_does_not_load_leaves_the_work_to_torch(
    beside: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkout without a compiler: a copy of the module with nothing, or with rubbish, beside it."""
    if beside is not None:
        (tmp_path / "_kernels.so").write_text(beside)
    spec = importlib.util.spec_from_file_location("copied", shutil.copy(kernels.__file__, tmp_path))
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied", copied)
    spec.loader.exec_module(copied)
    assert copied.kernels() is None
    assert re.search(reason, copied.why_no_kernels())


# -- what cannot be packed


def one_pass(length: int = 3) -> PackedPass:
    cache = Cache(Shape(1, 1, 4, 4))
    return PackedPass(cache.store.reserve([Slice(1, 0, length)], {1: OPENING}), [length], cache.pool)


def some_rows() -> torch.Tensor:
    return torch.randn(1, 1, 3, 4)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return packed_attention(torch.nn.Module(), query, key, value, None)[0]


@pytest.mark.parametrize("changed", ["key", "value", "both"])
def test_keys_and_values_must_be_those_that_the_cache_returned(changed: str) -> None:
    """A model that unfolds them after the cache would be served wrongly, so it is told apart."""
    with one_pass() as cache:
        key, value = cache.update(some_rows(), some_rows(), 0)
        wrong = {"key": (key.clone(), value), "value": (key, value + 0), "both": (key.clone(), value.clone())}
        with pytest.raises(Unpackable):
            attend(some_rows(), *wrong[changed])


def test_keys_and_values_are_taken_once() -> None:
    """Two attentions over one update would be two kinds of attention in one block."""
    with one_pass() as cache:
        key, value = cache.update(some_rows(), some_rows(), 0)
        assert attend(some_rows(), key, value).shape == (1, 3, 1, 4)
        with pytest.raises(Unpackable):
            attend(some_rows(), key, value)


def test_nothing_is_taken_before_an_update() -> None:
    with one_pass(), pytest.raises(Unpackable):
        attend(some_rows(), some_rows(), some_rows())


def test_whole_texts_are_attended_without_a_pool() -> None:
    """As scoring does; the shapes of what would be filed are told."""
    torch.manual_seed(0)
    shape = Shape(2, 2, 8, 5, window=3)
    texts = [Rows.random(shape, n) for n in (1, 6, 20)]
    query, key, value = (
        torch.cat([getattr(t, name) for t in texts], 1)[None] for name in ("queries", "keys", "values")
    )
    with PackedPass([], [len(text) for text in texts], None) as cache:
        key, value = cache.update(key, value, 0)
        out, _ = packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=3)
    assert ([how.window for how in cache.hows], cache.shapes) == ([3], [RowShape(2, 8, 5)])
    for text, result in zip(texts, torch.split(out[0], [1, 6, 20]), strict=True):
        assert_close(result, reference(text, shape, None))
