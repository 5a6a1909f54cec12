"""What a checkpoint holds, from its headers alone: names, shapes and byte ranges of tensors, never their values.

A checkpoint is a Hugging Face folder: config.json and safetensors files (one, or sharded with an index). The folder
may be a local path or any location that fsspec opens by URL (s3://, gs://, hf://, http://, memory://).
Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, data).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, cast

from functions.contract.frames import check_entry, parse_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PIECE_BYTES = 64 << 20  # of a tensor read at once: long enough for a request over a network to be worth it
FILE_HEADER_BYTES_MAX = 100 << 20  # the limit of the safetensors package


class CheckpointError(Exception):
    """The checkpoint cannot be used; the text says which file or tensor and what to do."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes lie: start <= byte < end of `file` (a name in the checkpoint's folder)."""

    name: str
    dtype: str  # in safetensors' words, such as BF16
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def block(self) -> int | None:
        """The block the tensor belongs to: the first number in its name (model.layers.3.mlp... -> 3)."""
        return next((int(part) for part in self.name.split(".") if part.isdecimal()), None)


@dataclass(frozen=True)
class Checkpoint:
    location: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the configuration that describes the decoder (multi-modal files nest it)."""
        return cast(Mapping[str, Any], self.config.get("text_config", self.config))

    @property
    def block_count(self) -> int:
        """Number of transformer blocks, from the configuration. Raises CheckpointError."""
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            value = self.text_config.get(key)
            if type(value) is int and value > 0:
                return value
        raise CheckpointError(f"{self.location}/config.json does not say how many blocks the model has")


def open_checkpoint(location: str) -> Checkpoint:
    """Reads config.json and the headers of the safetensors files. Raises CheckpointError."""
    config = _read_json(location, "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{location}/config.json must hold a JSON object")
    tensors = {info.name: info for file in _weight_files(location) for info in _read_header(location, file)}
    return Checkpoint(location.rstrip("/"), config, tensors)


def read_tensor(checkpoint: Checkpoint, info: TensorInfo, into: memoryview) -> None:
    """Fills `into` (writable bytes, `info.nbytes` long) with the tensor's bytes and reads nothing else.

    Raises CheckpointError when the file ends before its header said."""
    with open_file(checkpoint.location, info.file) as stream:
        stream.seek(info.start)
        at = 0
        while at < info.nbytes:
            # in pieces: a remote file is read into memory of its own first, up to twice over
            count = stream.readinto(into[at : at + _PIECE_BYTES])  # type: ignore[attr-defined]  # raw files have it, IO[bytes] does not say so
            if not count:
                raise CheckpointError(f"{info.file} ends inside {info.name}; copy or download it again")
            at += count


def exists(location: str, file: str) -> bool:
    """Whether the checkpoint's folder holds `file`."""
    if "://" not in location:
        return os.path.isfile(os.path.join(location, file))
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(_join(location, file))
    return bool(filesystem.exists(path))


def open_file(location: str, file: str) -> IO[bytes]:
    """A file of the checkpoint, for reading. Raises CheckpointError when it is not there."""
    try:
        if "://" not in location:
            # unbuffered: tensors are read straight into their memory
            return open(os.path.join(location, file), "rb", buffering=0)
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(_join(location, file))
        # without read-ahead: what is read are byte ranges far apart
        return cast(IO[bytes], filesystem.open(path, "rb", cache_type="none"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{location} holds no {file}; a checkpoint is a folder in Hugging Face format "
            "(config.json, *.safetensors, tokenizer.json)"
        ) from None
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"cannot open {location}/{file}: {error}") from None


def _join(location: str, file: str) -> str:
    return f"{location.rstrip('/')}/{file}"


def _read_json(location: str, file: str) -> Any:
    with open_file(location, file) as stream:
        try:
            return json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{location}/{file} is not JSON: {error}") from None


def _weight_files(location: str) -> list[str]:
    if exists(location, INDEX_FILE):
        index = _read_json(location, INDEX_FILE)
        try:
            files = sorted(set(index["weight_map"].values()))
        except (TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{location}/{INDEX_FILE} has no weight_map") from None
        # a name with a separator would reach outside the checkpoint
        if not all(isinstance(file, str) and file == os.path.basename(file) for file in files):
            raise CheckpointError(f"{location}/{INDEX_FILE}: weight_map must name files in the same folder")
        return files
    if exists(location, SINGLE_FILE):
        return [SINGLE_FILE]
    raise CheckpointError(
        f"{location} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors weights are read "
        "(convert others with save_pretrained of Transformers)"
    )


def _read_header(location: str, file: str) -> Iterator[TensorInfo]:
    with open_file(location, file) as stream:
        prefix = stream.read(8)
        (size,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if not 2 <= size <= FILE_HEADER_BYTES_MAX:
            raise CheckpointError(f"{location}/{file} is not a safetensors file (header length {size})")
        text = stream.read(size)
        total = stream.seek(0, os.SEEK_END)
    try:
        header = parse_header(text)
        header.pop("__metadata__", None)
        entries = {name: check_entry(name, entry) for name, entry in header.items()}
    except ValueError as error:
        raise CheckpointError(f"{location}/{file} has a broken header: {error}") from None
    for name, (dtype, shape, start, end) in entries.items():
        if 8 + size + end > total:
            raise CheckpointError(
                f"{location}/{file} is cut short: {name} ends at byte {8 + size + end}, the file has {total}; "
                "copy or download it again"
            )
        yield TensorInfo(name, dtype, shape, file, 8 + size + start, 8 + size + end)
