"""RMS norms in float32 on a CPU as one call of a kernel, in place of the six or seven of Transformers' modules.

Every architecture has a class of its own for them. One is replaced only if it gives, for numbers tried out, what the
kernel gives: with its weight, or with its weight plus one (gemma).
"""

from __future__ import annotations

import torch
from torch import nn

from functions.kernels import kernels

_TOLERANCE = 1e-5
_ROWS_TRIED = 3


class FastRmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * factors, over the last dimension."""

    def __init__(self, norm: nn.Module, factors: torch.Tensor, eps: float) -> None:
        super().__init__()
        library = kernels()
        assert library is not None  # see `replace_norms`
        self._library = library
        self.weight = norm.weight
        self.factors = factors
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """float32 [..., size] -> the same shape."""
        rows = states.reshape(-1, states.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        result = torch.empty(states.shape)
        self._library.rms_norm(
            rows.data_ptr(), self.factors.data_ptr(), result.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0),
            self.eps,
        )  # fmt: skip
        return result


def replace_norms(model: nn.Module) -> None:
    """Puts the kernel in the place of every RMS norm that it equals."""
    for path, module in list(model.named_modules()):
        replacement = _replacement(module)
        if replacement is not None:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, replacement)


def _replacement(module: nn.Module) -> FastRmsNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
        return None
    if weight.dim() != 1 or weight.dtype != torch.float32:
        return None
    states = torch.linspace(-2, 3, _ROWS_TRIED * len(weight)).view(_ROWS_TRIED, len(weight))
    expected = module(states)
    # weights are small numbers about 0 where one is added to them, so the two are told apart
    for factors in (weight.detach(), weight.detach() + 1):
        candidate = FastRmsNorm(module, factors, eps)
        if torch.allclose(candidate(states), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return candidate
    return None
