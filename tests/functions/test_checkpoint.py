"""Reading a checkpoint's headers: names, shapes and places of tensors, and what a broken one is told."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from functions.contract.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    exists,
    open_checkpoint,
    read_tensor,
)

TENSORS = {
    "model.embed.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "model.layers.0.w": np.arange(6, dtype=np.float16).reshape(2, 3),
    "model.layers.11.w": np.arange(2, dtype=np.int64),
    "scalar": np.array(3, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 12}')
    save_file(TENSORS, tmp_path / SINGLE_FILE, {"format": "pt"})
    return tmp_path


def read(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.tensors[name]
    into = bytearray(info.nbytes)
    read_tensor(checkpoint, info, memoryview(into))
    return bytes(into)


def to_memory(folder: Path) -> str:
    """A copy of the folder at a location that fsspec opens."""
    location = f"memory://{uuid.uuid4().hex}"
    for path in folder.iterdir():
        with fsspec.open(f"{location}/{path.name}", "wb") as stream:
            stream.write(path.read_bytes())
    return location


@pytest.mark.parametrize("place", [str, to_memory], ids=["folder", "remote"])
def test_tensors_are_found_with_shape_and_bytes(folder: Path, place: Callable[[Path], str]) -> None:
    checkpoint = open_checkpoint(place(folder))
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert checkpoint.tensors[name].shape == array.shape
        assert read(checkpoint, name) == array.tobytes()


def test_slash_at_the_end_of_the_location_does_not_count(folder: Path) -> None:
    assert open_checkpoint(f"{folder}/").location == str(folder)


@pytest.fixture
def amounts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes asked for in each read of a remote file, filled as they happen."""
    from fsspec.implementations.memory import MemoryFile

    amounts: list[int] = []
    original = MemoryFile.readinto

    def counted(self: Any, into: Any) -> int:
        amounts.append(len(into))
        return int(original(self, into))

    monkeypatch.setattr(MemoryFile, "readinto", counted, raising=False)
    return amounts


def test_remote_tensor_is_read_by_its_range_alone(folder: Path, amounts: list[int]) -> None:
    checkpoint = open_checkpoint(to_memory(folder))
    read(checkpoint, "model.layers.0.w")
    assert amounts == [12]


def test_large_remote_tensor_is_read_in_pieces(
    folder: Path, amounts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec reads into memory of its own first: read at once, a tensor would take its size twice."""
    monkeypatch.setattr("functions.contract.checkpoint._PIECE_BYTES", 5)
    checkpoint = open_checkpoint(to_memory(folder))
    assert read(checkpoint, "model.layers.0.w") == TENSORS["model.layers.0.w"].tobytes()
    assert amounts == [5, 5, 2]


@pytest.mark.parametrize(
    ("name", "block"), [("model.layers.11.w", 11), ("h.3.attn.0.w", 3), ("model.embed.weight", None), ("w2.x", None)]
)
def test_block_is_the_first_number_of_the_name(name: str, block: int | None) -> None:
    assert TensorInfo(name, "F32", (1,), "f", 0, 4).block == block


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_number_of_blocks(key: str) -> None:
    assert Checkpoint("/x", {key: 7}, {}).block_count == 7
    assert Checkpoint("/x", {"text_config": {key: 7}, "num_hidden_layers": 3}, {}).block_count == 7


@pytest.mark.parametrize("config", [{}, {"n_layer": 0}, {"n_layer": "7"}, {"n_layer": True}, {"n_layer": -1}], ids=str)
def test_number_of_blocks_that_is_not_told(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"/x/config\.json does not say how many blocks"):
        _ = Checkpoint("/x", config, {}).block_count


# -- shards


def shard(folder: Path, weight_map: Any) -> None:
    (folder / SINGLE_FILE).unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_joined_by_their_index(folder: Path) -> None:
    shard(folder, {"scalar": "a.safetensors", "empty": "b.safetensors", "model.embed.weight": "b.safetensors"})
    save_file({"scalar": TENSORS["scalar"]}, folder / "a.safetensors")
    save_file({name: TENSORS[name] for name in ("empty", "model.embed.weight")}, folder / "b.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert {name: info.file for name, info in checkpoint.tensors.items()} == {
        "scalar": "a.safetensors",
        "empty": "b.safetensors",
        "model.embed.weight": "b.safetensors",
    }
    assert read(checkpoint, "model.embed.weight") == TENSORS["model.embed.weight"].tobytes()


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder, {"a": "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "sub/a.safetensors", 3, None, ["a"]], ids=str)
def test_shard_outside_the_folder_is_refused(folder: Path, name: Any) -> None:
    shard(folder, {"a": name})
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("index", [[], {}, {"weight_map": None}, {"weight_map": ["a"]}, 3], ids=str)
def test_index_without_weight_map_is_refused(folder: Path, index: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(str(folder))


# -- broken files


def cut(folder: Path) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:30])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None  # type: ignore[func-returns-value]


def header(entry: Any) -> bytes:
    text = json.dumps({"w": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


BROKEN = {
    "no config": (no_config, r"holds no config\.json"),
    "no weights": (no_weights, "holds neither model.safetensors nor"),
    "config of no JSON": (write("config.json", b"{"), r"config\.json is not JSON"),
    "config of no UTF-8": (write("config.json", b"\xff\xff\xff"), r"config\.json is not JSON"),
    "config of a list": (write("config.json", b"[]"), "must hold a JSON object"),
    "config nested without end": (write("config.json", b"[" * 100_000), r"config\.json is not JSON"),
    "index of no JSON": (write(INDEX_FILE, b"{"), "is not JSON"),
    "weights of no bytes": (write(SINGLE_FILE, b""), "is not a safetensors file"),
    "weights of a pickle": (write(SINGLE_FILE, b"\x80\x04" + b"x" * 30), "is not a safetensors file"),
    "weights of a pointer": (write(SINGLE_FILE, b"version https://git-lfs.example"), "is not a safetensors file"),
    "huge header length": (write(SINGLE_FILE, b"\xff" * 8), "is not a safetensors file"),
    "weights cut short": (cut, "is cut short"),
    "header cut short": (cut_header, "has a broken header"),
    "unknown dtype": (write(SINGLE_FILE, header({"dtype": "X", "shape": [], "data_offsets": [0, 0]})), "dtype"),
    "wrong size": (write(SINGLE_FILE, header({"dtype": "U8", "shape": [9], "data_offsets": [0, 8]})), "takes 9 bytes"),
    "no entry": (write(SINGLE_FILE, header(3)), "broken header"),
}


@pytest.mark.parametrize(("break_it", "hint"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoint_is_told_what_is_wrong(folder: Path, break_it: Callable[[Path], None], hint: str) -> None:
    break_it(folder)
    with pytest.raises(CheckpointError, match=hint) as caught:
        open_checkpoint(str(folder))
    assert str(folder) in str(caught.value)


def test_nothing_at_the_location(tmp_path: Path) -> None:
    for location in (str(tmp_path / "nowhere"), "memory://nowhere"):
        with pytest.raises(CheckpointError, match=r"holds no config\.json; a checkpoint is a folder"):
            open_checkpoint(location)


def test_protocol_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open nothing://x/config\.json"):
        open_checkpoint("nothing://x")


def test_location_that_is_a_file(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(folder / SINGLE_FILE))


@pytest.mark.parametrize("place", [str, to_memory], ids=["folder", "remote"])
def test_exists(folder: Path, place: Callable[[Path], str]) -> None:
    location = place(folder)
    assert exists(location, SINGLE_FILE)
    assert not exists(location, INDEX_FILE)


def test_file_that_shrank_is_named(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    (folder / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends inside model\.layers\.0\.w"):
        read(checkpoint, "model.layers.0.w")


def test_safetensors_reads_the_same(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    for name, array in load_file(folder / SINGLE_FILE).items():
        assert read(checkpoint, name) == array.tobytes()
