"""Transformers' own cache of one sequence, taken apart into arrays and put together again, bit for bit.

Only layers that consist of nothing but keys and values, as they are after some tokens, can be moved so. Recurrent state
and caches of an architecture's own are left to a replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from functions.contract.errors import InvalidEvent
from functions.contract.frames import Frame
from functions.weights import SAFETENSORS_DTYPES


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's keys [1, heads, tokens, key_size] and values likewise; of a `sliding` one only the last tokens."""

    dtype: torch.dtype
    heads: int
    key_size: int
    value_size: int
    sliding: bool


def layer_shapes(cache: Any) -> Items[LayerShape | None] | None:
    """Of a cache that holds some tokens; None for a layer that holds none. None if the cache cannot be moved."""
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    return [_shape(layer) if layer.is_initialized else None for layer in cache.layers]


def take_out(cache: Any) -> dict[str, torch.Tensor]:
    """`keys.B` and `values.B` of each layer B that holds any."""
    filled = [(number, layer) for number, layer in enumerate(cache.layers) if layer.is_initialized]
    return {f"{name}.{number}": getattr(layer, name) for number, layer in filled for name in ("keys", "values")}


def put_in(cache: Any, arrays: Mapping[str, torch.Tensor], tokens: int, device: torch.device) -> None:
    """Fills a fresh cache with what `take_out` gave of one that held so many tokens."""
    for number, layer in enumerate(cache.layers):
        if f"keys.{number}" not in arrays:
            continue
        keys, values = (arrays[f"{name}.{number}"].to(device) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens


def check(shapes: Items[LayerShape | None], arrays: Mapping[str, Frame], tokens: int) -> None:
    """Raises InvalidEvent unless these are arrays of such layers that hold so many tokens."""
    filled = {number: shape for number, shape in enumerate(shapes) if shape is not None}
    if set(arrays) != {f"{name}.{number}" for number in filled for name in ("keys", "values")}:
        raise InvalidEvent(f"keys and values of {len(filled)} blocks are needed, got {len(arrays)} arrays")
    for number, shape in filled.items():
        count = arrays[f"keys.{number}"].shape[2:3]
        for name, size in (("keys", shape.key_size), ("values", shape.value_size)):
            frame = arrays[f"{name}.{number}"]
            wanted = (1, shape.heads, *count, size)
            right = frame.dtype == SAFETENSORS_DTYPES[shape.dtype] and frame.shape == wanted
            if not right or not (0 < count[0] <= tokens if shape.sliding else count[0] == tokens):
                raise InvalidEvent(
                    f"{name}.{number} must be {SAFETENSORS_DTYPES[shape.dtype]} [1, {shape.heads}, {tokens}, {size}], "
                    f"got {frame.dtype} {list(frame.shape)}"
                )


def _shape(layer: Any) -> LayerShape:
    _, heads, _, key_size = layer.keys.shape
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    return LayerShape(layer.keys.dtype, heads, key_size, layer.values.shape[3], sliding)
