"""Gives a cut model its weights: only the tensors of its span are read, each by its byte range.

Transformers' own loader does the renaming and merging that a checkpoint may need (experts stacked, keys of older
releases, prefixes); this module only decides which tensors it gets to see, and under which block number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from functions.contract.checkpoint import Checkpoint, CheckpointError, TensorInfo, read_tensor

if TYPE_CHECKING:
    from functions.span_model import Cut

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


class LazyTensor:
    """A tensor of a checkpoint that is read when sliced with [...], as Transformers' loader does."""

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo) -> None:
        self._checkpoint = checkpoint
        self._info = info

    def __getitem__(self, key: Any) -> torch.Tensor:
        raw = torch.empty(self._info.nbytes, dtype=torch.uint8)  # aligned as torch likes it, filled in place
        if self._info.nbytes:
            read_tensor(self._checkpoint, self._info, raw.numpy().data)
        return raw.view(TORCH_DTYPES[self._info.dtype]).view(self._info.shape)[key]

    def get_dtype(self) -> str:
        return self._info.dtype

    def get_shape(self) -> list[int]:
        return list(self._info.shape)


def load_weights(
    cut: Cut, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, one_by_one: bool = False
) -> None:
    """Fills the cut model on `device`. Raises CheckpointError that names missing or misshapen tensors.

    With `one_by_one` a tensor is read when the one before is in its place: for layers that keep less than they get."""
    model = cut.model
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    tensors = {name: LazyTensor(checkpoint, tensor) for name, tensor in _wanted(cut, checkpoint)}
    with _no_reading_ahead() if one_by_one else nullcontext():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    if info.conversion_errors:
        raise CheckpointError(f"{checkpoint.location}: cannot convert {'; '.join(map(str, info.conversion_errors))}")
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys, key=str)[0]
        raise CheckpointError(
            f"{checkpoint.location}: {_original(cut, name)} has shape {list(found)}, the configuration asks for "
            f"{list(expected)}"
        )
    _finish(cut, checkpoint, info.missing_keys, device)


@contextmanager
def _no_reading_ahead() -> Iterator[None]:
    """Transformers' loader has threads that read ahead as far as they come, unless this variable is set."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


def _wanted(cut: Cut, checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """(name for the cut model, tensor): the span's blocks renumbered from 0, and what stands beside the blocks."""
    for name, info in checkpoint.tensors.items():
        block = info.block
        if block is not None:
            if block in cut.span:
                yield _renumbered(name, block, block - cut.span.start), info
        elif cut.tied_head and _same(name, cut.tied_head[0]):
            # a last stage without the embedding still needs its matrix, as the head
            yield cut.tied_head[1], info
        elif not any(_same(name, other) for other in cut.elsewhere):
            yield name, info


def _same(checkpoint_name: str, model_name: str) -> bool:
    """Whether both name one weight: checkpoints may leave out the outer modules' names."""
    return f".{model_name}".endswith(f".{checkpoint_name}") or f".{checkpoint_name}".endswith(f".{model_name}")


def _renumbered(name: str, old: int, new: int) -> str:
    return re.sub(rf"(?<=\.){old}(?=\.)|^{old}(?=\.)", str(new), name, count=1)


def _original(cut: Cut, name: str) -> str:
    """The name of a weight of the cut model as the whole model numbers it."""
    block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    return name if block is None else _renumbered(name, block, block + cut.span.start)


def _finish(cut: Cut, checkpoint: Checkpoint, missing: set[str], device: torch.device) -> None:
    """Ties, checks that nothing is left out, and computes the buffers that no checkpoint holds (rotary tables)."""
    model = cut.model
    if cut.ends.whole:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        missing = missing - set(model.all_tied_weights_keys)
        if not model.get_input_embeddings().weight.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.location} has only the head where embedding and head share a matrix, so it cannot be "
                "quantised; serve it without --quantize"
            )
    missing = {name for name in missing if not _ignorable(model, name)}
    if missing:
        shown = ", ".join(_original(cut, name) for name in sorted(missing)[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{checkpoint.location} lacks weights that blocks {cut.span} need: {shown}{more}; the checkpoint is "
            "incomplete or of another architecture"
        )
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = torch.empty_like(buffer, device=device)
    model.initialize_weights()  # touches only what was not loaded


def _ignorable(model: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())
