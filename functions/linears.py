"""Linear layers of float32 or int8 weights on a CPU, packed for the kernel of `packed_linear.c`; those with the same
input are one.

    q_proj(x), k_proj(x), v_proj(x)    three layers, one product: the first computes all, the others return their part
    gate_proj(x), up_proj(x)           likewise

Which layers share their input is found by watching a short run, not by their names. The kernel gives a row the same
results, to the last bit, whatever rows are beside it. It computes in float32: inputs in other dtypes, which only int8
weights have, are converted and results converted back. Where it is missing (no C compiler at installation), on a GPU
and for weights in other dtypes the layers stay as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from functions.kernels import kernels
from functions.quantize import Int8Linear

Layer = nn.Linear | Int8Linear

_PANEL = 32  # outputs: PANEL of the C source
_PACKED = (torch.float32, torch.int8)  # dtypes of weights


class Linear(ctypes.Structure):
    """Linear of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "panels", "scale", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "x_row", "y_row")),
        ("threads", ctypes.c_int32),
    )


class Panels:
    """The weights of one layer, or of several with the same input and of the same dtype, one after another."""

    def __init__(self, layers: Items[Layer]) -> None:
        library = kernels()
        assert library is not None  # see `can_be_packed`
        self._library = library
        self.inputs = layers[0].in_features
        self.outputs = sum(layer.out_features for layer in layers)
        panels = -(-self.outputs // _PANEL)
        self._panels = torch.empty((panels, self.inputs, _PANEL), dtype=layers[0].weight.dtype)
        self._panels[-1].zero_()  # it may be filled in part only
        self._scale = _joined_scale(layers, panels * _PANEL)
        self._bias = _joined_bias(layers, panels * _PANEL)
        self.c_linear = Linear(
            panels=self._panels.data_ptr(), scale=None if self._scale is None else self._scale.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            inputs=self.inputs, outputs=self.outputs, y_row=self.outputs,
        )  # fmt: skip
        first = 0
        for layer in layers:
            self._fill(layer.weight.detach().contiguous(), first)
            first += layer.out_features

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs], computed in float32. For one thread at a time."""
        rows = states.reshape(-1, self.inputs)
        if rows.stride(-1) != 1 or rows.dtype != torch.float32:
            rows = rows.float().contiguous()
        result = rows.new_empty((rows.shape[0], self.outputs))
        call = self.c_linear
        call.x, call.y, call.rows, call.x_row = rows.data_ptr(), result.data_ptr(), rows.shape[0], rows.stride(0)
        call.threads = torch.get_num_threads()
        self._library.packed_linear(ctypes.byref(call))
        return result.to(states.dtype).view(*states.shape[:-1], self.outputs)

    def _fill(self, weight: torch.Tensor, first: int) -> None:
        fill = self._library.pack_linear_int8 if weight.dtype == torch.int8 else self._library.pack_linear
        fill(weight.data_ptr(), self._panels.data_ptr(), self.inputs, weight.shape[0], first, torch.get_num_threads())


class _Shared:
    """Panels of several layers that are called one after another with the very same tensor."""

    def __init__(self, panels: Panels) -> None:
        self._panels = panels
        self._states: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def part(self, states: torch.Tensor, first: int, end: int) -> torch.Tensor:
        if states is not self._states or self._result is None:
            self._states, self._result = states, self._panels.product(states)
        result = self._result
        if end == self._panels.outputs:  # the last one: nobody asks for this input again
            self._states = self._result = None
        return result[..., first:end]


class PackedLinear(nn.Module):
    """Stands for a linear layer whose weights are in panels. `weight` tells shape and dtype and holds nothing."""

    def __init__(self, layer: Layer, panels: Panels, shared: _Shared | None = None, first: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)
        self.bias = layer.bias
        if isinstance(layer, Int8Linear):
            self.scale = layer.scale
        self.panels = panels
        self._shared = shared
        self._first = first

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self._shared is None:
            return self.panels.product(states)
        return self._shared.part(states, self._first, self._first + self.out_features)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, not one of a class derived from it."""
    return type(module) in (nn.Linear, Int8Linear)


@contextmanager
def watched_inputs(model: nn.Module) -> Iterator[list[list[str]]]:
    """Around a pass of the model. Afterwards the list holds the paths of its linear layers, those together that were
    called one after another with the very same tensor."""
    groups: list[list[str]] = []
    held: list[torch.Tensor] = []  # all inputs, so that none is taken for another that came to lie in its place

    def note(path: str, states: torch.Tensor) -> None:
        if path in (seen for group in groups for seen in group):
            return  # one that runs again stays where its first run put it: `_Shared` looks at the tensor each time
        if held and states is held[-1]:
            groups[-1].append(path)
        else:
            held.append(states)
            groups.append([path])

    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: note(path, args[0]))
        for path, module in model.named_modules()
        if is_linear(module)
    ]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()


def can_be_packed(model: nn.Module) -> bool:
    """Whether there is a kernel for this model's layers."""
    weights = list(model.parameters())
    return (
        kernels() is not None
        and bool(weights)
        and all(weight.device.type == "cpu" for weight in weights)
        and any(weight.dtype in _PACKED for weight in weights)
    )


def pack(model: nn.Module, groups: Items[Items[str]]) -> None:
    """Puts the linear layers in panels, each group into the same, and lets go of their weights one by one. A weight
    that another module has too (an embedding that is also the head) stays."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    for group in groups:
        for dtype in _PACKED:
            layers = {path: model.get_submodule(path) for path in group}
            fitting = {
                path: layer
                for path, layer in layers.items()
                if is_linear(layer) and layer.weight.dtype == dtype and owners[id(layer.weight)] == 1
            }
            if fitting:
                _pack_group(model, fitting)


def _pack_group(model: nn.Module, layers: dict[str, Any]) -> None:
    panels = Panels(list(layers.values()))
    shared = _Shared(panels) if len(layers) > 1 else None
    first = 0
    for path, layer in layers.items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, PackedLinear(layer, panels, shared, first))
        first += layer.out_features


def _joined_scale(layers: Items[Layer], length: int) -> torch.Tensor | None:
    """float32 [length], of all outputs and what fills the last panel."""
    parts = [layer.scale.detach() for layer in layers if isinstance(layer, Int8Linear)]
    if not parts:
        return None
    scale = torch.cat(parts)
    return torch.cat([scale, scale.new_zeros(length - len(scale))])


def _joined_bias(layers: Items[Layer], length: int) -> torch.Tensor | None:
    """float32 [length], likewise."""
    if all(layer.bias is None for layer in layers):
        return None
    parts = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    bias = torch.cat(parts).float()
    return torch.cat([bias, bias.new_zeros(length - len(bias))])
