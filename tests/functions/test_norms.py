"""RMS norms by the kernel: the numbers of the modules that they replace, and no replacement for anything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from functions import kernels
from functions.norms import FastRmsNorm, replace_norms

pytestmark = pytest.mark.skipif(kernels.kernels() is None, reason="the kernels are not built: no C compiler?")


class LikeRMSNorm(nn.Module):
    """As in most architectures; `plus` 1.0 as in gemma, `halved` as in none."""

    def __init__(self, size: int, eps: float = 1e-6, plus: float = 0.0, halved: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * 0.2 + (0.0 if plus else 1.0))
        self.eps = eps
        self._plus, self._part = plus, 0.5 if halved else 1.0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * (self.weight + self._plus) * self._part


class Other(LikeRMSNorm):
    """A name that says nothing."""


def replaced(module: nn.Module) -> Any:
    model = nn.Sequential(module)
    with torch.inference_mode():
        replace_norms(model)
    return model[0]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("size", [1, 7, 16, 33, 768])
@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_it_equals_what_it_replaces(size: int, plus: float, eps: float) -> None:
    module = LikeRMSNorm(size, eps, plus)
    fast = replaced(module)
    assert isinstance(fast, FastRmsNorm)
    for shape in ((1, 5, size), (3, size), (2, 2, 4, size)):
        states = torch.randn(shape) * 10
        torch.testing.assert_close(fast(states), module(states), rtol=1e-5, atol=1e-5)


def test_rows_need_not_lie_one_after_another() -> None:
    module = LikeRMSNorm(8)
    fast = replaced(module)
    wide, turned = torch.randn(6, 24)[:, 8:16], torch.randn(8, 6).T
    for states in (wide, turned):
        torch.testing.assert_close(fast(states), module(states), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("processor")
def test_a_row_does_not_depend_on_its_company() -> None:
    fast = replaced(LikeRMSNorm(100))
    rows = torch.randn(9, 100)
    alone = torch.cat([fast(row[None]) for row in rows])
    assert torch.equal(fast(rows), alone)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(LikeRMSNorm(16, halved=True), id="computes something else"),
        pytest.param(Other(16), id="another name"),
        pytest.param(LikeRMSNorm(16).half(), id="another dtype"),
        pytest.param(nn.LayerNorm(16), id="another norm"),
    ],
)
def test_everything_else_stays(module: nn.Module) -> None:
    assert replaced(module) is module
