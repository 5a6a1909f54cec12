"""The floor of a stage: nothing but the linear layers of its span, on random rows, each in the fastest form found.

`python -m benchmarks.peer_linear CONFIG START:END HEAD` with the checkpoint's config.json; HEAD is 1 where the span
ends in the head. Reads {"passes": [[rows, sampled, count], ...]} lines (so many passes of `rows` rows, of which
`sampled` go through the head) and answers each with {"seconds": S}. Before a number of rows is timed for the first time
the forms are tried: torch's own `linear`, a product with transposed weights, and the weights packed for MKL and for
oneDNN; query, key and value (gate and up) each by itself, and merged.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

TRIES = 3

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Widths:
    """Of a Llama's block."""

    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Widths:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["num_attention_heads"] * size,
            config["num_key_value_heads"] * size,
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def groups(self) -> list[tuple[int, tuple[int, ...]]]:
        """(features in, features out of each product) of what may be merged."""
        return [
            (self.hidden, (self.queries, self.keys, self.keys)),
            (self.queries, (self.hidden,)),
            (self.hidden, (self.inner, self.inner)),
            (self.inner, (self.hidden,)),
        ]


class Floor:
    def __init__(self, widths: Widths, blocks: int, *, head: bool) -> None:
        self._widths = widths
        self._blocks = blocks
        self._head = head

    def seconds(self, passes: Sequence[tuple[int, int, int]]) -> float:
        prepared = [(self._products(rows), self._head_products(sampled), count) for rows, sampled, count in passes]
        started_s = time.perf_counter()
        for products, head, count in prepared:
            for _ in range(count):
                for product, rows in products:
                    product(rows)
                for product, rows in head:
                    product(rows)
        return time.perf_counter() - started_s

    @cache  # noqa: B019  one of them lives as long as the process
    def _products(self, rows: int) -> list[tuple[Product, torch.Tensor]]:
        """All products of the span with their input, block by block."""
        groups = [fastest_group(wide, outs, rows, self._blocks) for wide, outs in self._widths.groups]
        return [one for block in range(self._blocks) for group in groups for one in group[block]]

    @cache  # noqa: B019  one of them lives as long as the process
    def _head_products(self, rows: int) -> list[tuple[Product, torch.Tensor]]:
        if not self._head or not rows:
            return []
        (products,) = fastest_group(self._widths.hidden, (self._widths.vocabulary,), rows, 1)
        return products


def fastest_group(wide: int, outs: tuple[int, ...], rows: int, blocks: int) -> list[list[tuple[Product, torch.Tensor]]]:
    """For each block the products from `wide` features to each of `outs`, or the merged one where that is faster."""
    merged, merged_s = fastest(wide, sum(outs), rows, blocks)
    if len(outs) == 1:
        return [[one] for one in merged]
    single = [fastest(wide, out, rows, blocks) for out in outs]
    if sum(taken_s for _, taken_s in single) < merged_s:
        return [list(products) for products in zip(*(found for found, _ in single), strict=True)]
    return [[one] for one in merged]


def fastest(wide: int, out: int, rows: int, blocks: int) -> tuple[list[tuple[Product, torch.Tensor]], float]:
    """The same product for each block (each with weights of its own, as caches see them in a real pass), in the form
    that takes the least time, and that time in seconds."""
    states = torch.randn(rows, wide)
    weights = [torch.randn(out, wide) * 0.02 for _ in range(blocks)]
    best: tuple[list[Product], float] = ([], float("inf"))
    for form in FORMS:
        try:
            products = [form(weight, rows) for weight in weights]
            taken_s = min(_time(products, states) for _ in range(TRIES))
        except (RuntimeError, AttributeError):  # a build of torch without it
            continue
        if taken_s < best[1]:
            best = (products, taken_s)
    return [(product, states) for product in best[0]], best[1]


def _time(products: Sequence[Product], states: torch.Tensor) -> float:
    started_s = time.perf_counter()
    for product in products:
        product(states)
    return time.perf_counter() - started_s


def _plain(weight: torch.Tensor, rows: int) -> Product:
    return lambda states: linear(states, weight)


def _transposed(weight: torch.Tensor, rows: int) -> Product:
    turned = weight.t().contiguous()
    return lambda states: torch.mm(states, turned)


def _mkl(weight: torch.Tensor, rows: int) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    run = torch.ops.mkl._mkl_linear
    return lambda states: run(states, packed, weight, None, rows)


def _onednn(weight: torch.Tensor, rows: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda states: run(states, packed, None, "none", [], "")


FORMS = (_plain, _transposed, _mkl, _onednn)


def main(config: str, span: str, head: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    start, _, end = span.partition(":")
    floor = Floor(Widths.of(json.loads(Path(config).read_text())), int(end) - int(start), head=head == "1")
    with torch.inference_mode():
        for line in sys.stdin:
            passes = [(rows, sampled, count) for rows, sampled, count in json.loads(line)["passes"]]
            print(json.dumps({"seconds": floor.seconds(passes)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
