"""Linear layers with weights of 8 bits: a quarter of the memory of float32, and faster on CPUs with VNNI.

    weight    int8 [out, in], one scale for each output channel; made once, when the weight is loaded
    input     each row is scaled to int8 when it comes in, by its own largest value
    product   int8 x int8 summed up in int32, exact; times both scales

A row has a scale of its own and whole numbers are summed exactly, so what these layers give a sequence depends neither
on who travels with it nor on how its prompt was chunked. Weights are quantised one by one: cuts change nothing either.

The linear layers of the blocks and the head are quantised. Embeddings are not: looking rows up gains no speed, and
their error would enter every block. Norms, biases and gates are small. Experts that Transformers packs into one tensor
are no linear layers and stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from functions.contract.checkpoint import CheckpointError

if TYPE_CHECKING:
    from functions.span_model import Cut

Quantization = Literal["none", "int8"]

_LARGEST = 127
_SCALE_MIN = 1e-30  # of rows that are all 0
_ROWS_AT_ONCE = 1024  # of a weight that is being quantised: bounds what that takes beside it
# what the kernel for CUDA asks for
_CUDA_ROWS_MIN = 32
_CUDA_MULTIPLE = 8


class Int8Linear(nn.Module):
    """Stands for a linear layer. Any weight of floats that it is given is kept as int8."""

    weight: torch.Tensor  # float on the meta device until it is loaded, then int8 [out, in]
    scale: torch.Tensor  # float32 [out]; there once the weight is

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.bias = layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        # Transformers' loader and its ties set weights as attributes, one after another
        if name == "weight" and value.is_floating_point() and not value.is_meta:
            value, scale = (nn.Parameter(part, requires_grad=False) for part in quantised(value.detach()))
            super().__setattr__("scale", scale)
        super().__setattr__(name, value)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows, scale = _scaled(states.reshape(-1, self.in_features).float())
        result = _product(rows, self.weight).mul(scale).mul_(self.scale)
        if self.bias is not None:
            result += self.bias
        return result.to(states.dtype).view(*states.shape[:-1], self.out_features)


def quantise(cut: Cut, kind: Quantization, device: torch.device, location: str) -> None:
    """Replaces the linear layers of a cut model that has no weights yet. Raises CheckpointError for a model without
    linear layers, and for layers that the kernel of a GPU does not take."""
    if kind == "none":
        return
    found = [(block, name, layer) for block in cut.blocks for name, layer in block.named_modules() if _fits(layer)]
    if not found:
        kinds = sorted({type(layer).__name__ for block in cut.blocks for layer in block.modules()})
        raise CheckpointError(
            f"{location} cannot be quantised to {kind}: its blocks have no linear layers, only {', '.join(kinds)}; "
            "serve it without --quantize"
        )
    if cut.ends.last:
        head = cut.model.get_output_embeddings()
        found += [(cut.model, name, layer) for name, layer in cut.model.named_modules() if layer is head]
    for root, name, layer in found:
        if device.type == "cuda" and (layer.in_features % _CUDA_MULTIPLE or layer.out_features % _CUDA_MULTIPLE):
            raise CheckpointError(
                f"{location} cannot be quantised to {kind} on a GPU: {name} is {layer.out_features} x "
                f"{layer.in_features}, both must be multiples of {_CUDA_MULTIPLE}; serve it without --quantize"
            )
        owner, _, attribute = name.rpartition(".")
        setattr(root.get_submodule(owner), attribute, Int8Linear(layer))


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [out, in], float32 scale [out]) of a weight [out, in]: symmetric, rounded to the nearest."""
    whole = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        whole[part], scales = _scaled(weight[part].float())
        scale[part] = scales[:, 0]
    return whole, scale


def _fits(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear


def _scaled(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [n, k] -> (int8 [n, k], float32 scale [n, 1])."""
    scale = rows.abs().amax(1, keepdim=True).div_(_LARGEST).clamp_(min=_SCALE_MIN)
    return rows.div(scale).round_().to(torch.int8), scale


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [n, k] and [m, k] -> int32 [n, m]."""
    count = len(rows)
    if rows.is_cuda and count < _CUDA_ROWS_MIN:
        rows = F.pad(rows, (0, 0, 0, _CUDA_ROWS_MIN - count))
    return torch._int_mm(rows, weight.t())[:count]
