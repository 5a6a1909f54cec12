"""For which processor the kernels compute, and that torch's variable decides it for both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from functions import kernels
from functions.norms import FastRmsNorm
from tests.functions.processors import KINDS, computed_as_on

pytestmark = pytest.mark.skipif(kernels.kernels() is None, reason="the kernels are not built: no C compiler?")

ROWS = torch.linspace(-1, 1, 64 * 1001).reshape(64, 1001) ** 3


def normed() -> torch.Tensor:
    """Each row by the sum of its squares, whose last bits show the order in which they are added."""
    norm = torch.nn.RMSNorm(1001, eps=1e-6).requires_grad_(False)
    return FastRmsNorm(norm, norm.weight, 1e-6)(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_variable_is_that_of_the_kernels(kind: str, root: Path) -> None:
    code = "import torch, functions.kernels as k; print(k.processor(), torch.backends.cpu.get_cpu_capability().lower())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": kind}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().split() == [kind, kind]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_code_of_its_own(kind: str) -> None:
    """Its registers are longer than those of the kind before it, so sums are taken in another order."""
    with computed_as_on(kind):
        assert kernels.processor() == kind
        its = normed()
        assert torch.equal(its, normed())
    for other in kernels.PROCESSORS[: kernels.PROCESSORS.index(kind)]:
        with computed_as_on(other):
            torch.testing.assert_close(normed(), its, rtol=1e-5, atol=1e-5)
            assert not torch.equal(normed(), its)
