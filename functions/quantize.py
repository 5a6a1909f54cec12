"""Linear layers with weights of 8 bits: a quarter of the memory of float32, and of what a step reads of it.

    weight    int8 [out, in], one scale for each output channel; made once, when the weight is loaded
    input     stays as it is
    product   of floats: weights become floats again when they are multiplied

Where there is a kernel (`functions/linears.py`) it takes the place of these layers once they are loaded, and converts
weights in the processor's registers; float32 sums are multiplied by the scale. What it gives a row does not depend on
who travels with it. The layer here makes floats of a part of the weights before each product, which costs more than it
saves. It is for GPUs, and for installations without the kernel.

Weights are quantised one by one: cuts change nothing.

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
_ROWS_AT_ONCE = 1024  # of a weight that is converted: bounds what that takes beside it


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
        # a CPU is slow at products of halves, and the kernel computes in float32 too
        rows = states if states.is_cuda else states.float()
        parts = zip(torch.split(self.weight, _ROWS_AT_ONCE), torch.split(self.scale, _ROWS_AT_ONCE), strict=True)
        products = [F.linear(rows, (weight * scale[:, None]).to(rows.dtype)) for weight, scale in parts]
        result = torch.cat(products, dim=-1)
        if self.bias is not None:
            result += self.bias
        return result.to(states.dtype)


def quantise(cut: Cut, kind: Quantization, location: str) -> None:
    """Replaces the linear layers of a cut model that has no weights yet. Raises CheckpointError for a model without
    linear layers."""
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
        owner, _, attribute = name.rpartition(".")
        setattr(root.get_submodule(owner), attribute, Int8Linear(layer))


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [out, in], float32 scale [out]) of a weight [out, in]: symmetric, rounded to the nearest."""
    whole = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        rows = weight[part].float()
        scale[part] = rows.abs().amax(1).div_(_LARGEST).clamp_(min=_SCALE_MIN)
        whole[part] = rows.div(scale[part, None]).round_().to(torch.int8)
    return whole, scale


def _fits(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear
