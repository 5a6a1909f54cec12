"""Loading a span: only its bytes, from one file or many, local or remote; complaints that name the tensor."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import functions.weights
from functions.contract.checkpoint import Checkpoint, CheckpointError, TensorInfo, open_checkpoint, read_tensor
from functions.contract.spans import BlockSpan
from functions.span_model import SpanModel, load_span

CPU = torch.device("cpu")
SPANS = ("0:1", "1:3", "3:4")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def load(checkpoint: Checkpoint, span: str, dtype: torch.dtype = torch.float32) -> SpanModel:
    return load_span(checkpoint, BlockSpan.parse(span), dtype, CPU)


def weights_of(model: SpanModel) -> dict[str, torch.Tensor]:
    """What was loaded, blocks under the numbers that they have in the checkpoint."""
    renamed = {}
    for name, tensor in model._model.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(int(parts[2]) + model.span.start)
        renamed[".".join(parts)] = tensor
    return renamed


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor's bytes were read."""
    counted: Counter[str] = Counter()

    def count(checkpoint: Checkpoint, info: TensorInfo, into: memoryview) -> None:
        counted[info.name] += 1
        read_tensor(checkpoint, info, into)

    monkeypatch.setattr(functions.weights, "read_tensor", count)
    return counted


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a random Llama of 4 blocks; `save` goes to save_pretrained, the rest to its configuration."""

    def make(save: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, **settings,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("llama")
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **(save or {}))
        return folder

    return make


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_stages_together_read_each_tensor_once(folder_of: Callable[..., Path], reads: Counter[str], tied: bool) -> None:
    checkpoint = open_checkpoint(str(folder_of(tie_word_embeddings=tied)))
    for span in SPANS:
        load(checkpoint, span)
    # the norm behind the blocks is a vector, and the same module in all stages
    shared = {NORM: len(SPANS), **({EMBEDDING: 2} if tied else {})}
    assert reads == {name: shared.get(name, 1) for name in checkpoint.tensors}


@pytest.mark.parametrize("span", SPANS)
def test_stage_reads_only_its_span(checkpoint: Checkpoint, reads: Counter[str], span: str) -> None:
    model = load(checkpoint, span)
    blocks = {block for name in reads if (block := checkpoint.tensors[name].block) is not None}
    assert blocks == set(range(model.span.start, model.span.end))
    assert (EMBEDDING in reads) == model.ends.first
    assert (HEAD in reads) == model.ends.last


def test_bytes_in_memory_are_those_of_the_tensors_read(checkpoint: Checkpoint, reads: Counter[str]) -> None:
    model = load(checkpoint, "1:3")
    assert model.weight_bytes == sum(checkpoint.tensors[name].nbytes for name in reads)


@pytest.mark.parametrize("span", ["0:4", *SPANS])
def test_weights_are_those_of_the_checkpoint(tiny_checkpoint: Path, checkpoint: Checkpoint, span: str) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    loaded = weights_of(load(checkpoint, span))
    assert loaded
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.items())


def test_sharded_checkpoint_loads_the_same(folder_of: Callable[..., Path], reads: Counter[str]) -> None:
    one, many = folder_of(), folder_of(save={"max_shard_size": "4KB"})
    assert len(list(many.glob("*.safetensors"))) > 3
    for span in SPANS:
        expected, found = (weights_of(load(open_checkpoint(str(folder)), span)) for folder in (one, many))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_stage_needs_no_shard_of_another_span(folder_of: Callable[..., Path]) -> None:
    """Headers are read from all files, data only from the span's: the others may end behind their header."""
    folder = folder_of(save={"max_shard_size": "4KB"})
    checkpoint = open_checkpoint(str(folder))
    needed = {info.file for info in checkpoint.tensors.values() if info.block in (1, 2) or info.name == NORM}
    others = {info.file for info in checkpoint.tensors.values()} - needed
    assert others
    for file in others:
        (folder / file).unlink()
    load(checkpoint, "1:3")


def test_tied_head_of_a_last_stage_is_the_embedding(folder_of: Callable[..., Path]) -> None:
    folder = folder_of(tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(folder))
    assert HEAD not in checkpoint.tensors
    loaded = weights_of(load(checkpoint, "3:4"))
    assert torch.equal(loaded[HEAD], load_file(folder / "model.safetensors")[EMBEDDING])
    assert EMBEDDING not in loaded
    whole = load(checkpoint, "0:4")
    assert whole._model.lm_head.weight is whole._model.model.embed_tokens.weight


def test_bfloat16_checkpoint_is_exact_in_float32(folder_of: Callable[..., Path]) -> None:
    folder = folder_of(dtype=torch.bfloat16)
    saved = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    loaded = weights_of(load(open_checkpoint(str(folder)), "0:4"))
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in loaded.items())


def test_dtype_is_converted_as_transformers_does(folder_of: Callable[..., Path]) -> None:
    folder = folder_of()
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    loaded = weights_of(load(open_checkpoint(str(folder)), "0:4", torch.bfloat16))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "4KB"}], ids=["one file", "shards"])
def test_remote_location_loads_the_same_as_a_folder(folder_of: Callable[..., Path], save: dict[str, Any]) -> None:
    folder = folder_of(save=save)
    location = f"memory://{uuid.uuid4().hex}"
    for path in folder.iterdir():
        with fsspec.open(f"{location}/{path.name}", "wb") as stream:
            stream.write(path.read_bytes())
    for span in SPANS:
        local, remote = (weights_of(load(open_checkpoint(where), span)) for where in (str(folder), location))
        assert local.keys() == remote.keys()
        assert all(torch.equal(local[name], remote[name]) for name in local)


# -- broken checkpoints


def changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return open_checkpoint(str(target))


@pytest.mark.parametrize(
    ("span", "name", "named"),
    [
        ("0:4", "model.layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight"),
        ("1:3", "model.layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight"),
        ("0:2", EMBEDDING, EMBEDDING),
        ("2:4", HEAD, HEAD),
        ("2:4", NORM, NORM),
    ],
)
def test_missing_tensor_is_named(tiny_checkpoint: Path, tmp_path: Path, span: str, name: str, named: str) -> None:
    """Blocks are numbered from the first of the span, as the message says."""
    checkpoint = changed(tiny_checkpoint, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"lacks weights .*{named}"):
        load(checkpoint, span)


def test_missing_tensor_of_another_span_does_no_harm(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = changed(tiny_checkpoint, tmp_path, lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    assert len(load(checkpoint, "0:3").span) == 3


def test_many_missing_tensors_are_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"and 4 more; the checkpoint is incomplete"):
        load(changed(tiny_checkpoint, tmp_path, drop), "0:2")


def test_wrong_shape_is_named_with_both_shapes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def crop(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(CheckpointError, match=rf"{name} has shape \[31, 16\], .* \[32, 16\]"):
        load(changed(tiny_checkpoint, tmp_path, crop), "0:4")


def test_span_past_the_end_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="blocks 3:5 were asked for, the model has 4"):
        load(checkpoint, "3:5")


def test_an_absurd_number_of_blocks_is_refused_before_any_is_built(checkpoint: Checkpoint) -> None:
    absurd = Checkpoint(checkpoint.location, {**checkpoint.config, "num_hidden_layers": 10**9}, checkpoint.tensors)
    with pytest.raises(CheckpointError, match=r"speaks of 1000000000 blocks, and the weights are \d+ tensors"):
        load(absurd, "1:3")


def test_unknown_architecture_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = changed(tiny_checkpoint, tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "abacus"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="does not describe a decoder-only model"):
        load(checkpoint, "0:4")


def test_file_that_shrinks_after_its_header_was_read_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = changed(tiny_checkpoint, tmp_path, lambda tensors: None)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    last = max(checkpoint.tensors.values(), key=lambda info: info.end)
    with pytest.raises(CheckpointError, match=f"ends inside {last.name}"):
        read_tensor(checkpoint, last, memoryview(bytearray(last.nbytes)))
