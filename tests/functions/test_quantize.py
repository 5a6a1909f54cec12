"""Weights of 8 bits: cuts and company change nothing, inputs stay as they are, memory shrinks, errors say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import functions.quantize
import functions.weights
from functions.contract.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from functions.contract.messages import Samples, Step
from functions.contract.spans import BlockSpan
from functions.kernels import NO_KERNELS
from functions.quantize import Int8Linear, quantised
from functions.runner import load_runner
from functions.span_model import SpanModel, load_span
from functions.stage import Stage

CPU = torch.device("cpu")
PROMPTS = ([7, 1, 200], [9, 9, 4, 3, 8, 100, 2], [5])
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 blocks and width 64 whose head shares the embedding's matrix."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, attention_bias=True,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tied")
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tied(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def load(checkpoint: Checkpoint, span: str) -> SpanModel:
    return load_span(checkpoint, BlockSpan.parse(span), torch.float32, CPU, quantization="int8")


def greedy(
    checkpoint: Checkpoint, spans: tuple[str, ...], prompts: tuple[list[int], ...], step_of: Callable[..., Step]
) -> list[list[int]]:
    """What a chain of quantised stages answers to prompts that travel together."""
    stages = [
        Stage(load_runner(checkpoint, BlockSpan.parse(span), torch.float32, CPU, "int8"), 1 << 24) for span in spans
    ]
    texts, sent = [list(prompt) for prompt in prompts], [0] * len(prompts)
    for _ in range(NEW_TOKENS):
        found: Step | Samples = step_of(
            *((i, at, text[at:]) for i, (at, text) in enumerate(zip(sent, texts, strict=True), 1))
        )
        sent = [len(text) for text in texts]
        for stage in stages:
            assert isinstance(found, Step)
            found = stage.step(found)
        assert isinstance(found, Samples)
        for item in found.items:
            texts[item.sequence - 1].append(item.token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def dequantised(checkpoint: Checkpoint, folder: Path) -> LlamaForCausalLM:
    """The model with the weights that int8 stands for, in Transformers' own linear layers."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            whole, scale = quantised(module.weight.detach())
            module.weight = nn.Parameter(whole.float() * scale[:, None])
    return model


@pytest.mark.parametrize("spans", [("0:2", "2:4"), ("0:1", "1:3", "3:4")])
def test_cuts_change_nothing(tied: Checkpoint, spans: tuple[str, ...], step_of: Callable[..., Step]) -> None:
    assert greedy(tied, spans, PROMPTS, step_of) == greedy(tied, ("0:4",), PROMPTS, step_of)


def test_company_changes_nothing(tied: Checkpoint, step_of: Callable[..., Step]) -> None:
    together = greedy(tied, ("0:4",), PROMPTS, step_of)
    assert [greedy(tied, ("0:4",), (prompt,), step_of)[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_weights_are_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    layer, states = int8_layer(48, 80), torch.randn(2, 5, 48).to(dtype)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    expected = states.double() @ weight.T + layer.bias.double()
    assert layer(states).dtype == dtype
    torch.testing.assert_close(
        layer(states).double(), expected, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
    )


def test_weights_of_many_rows_become_floats_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    layer, states = int8_layer(16, 7), torch.randn(3, 16)
    expected = layer(states)
    monkeypatch.setattr(functions.quantize, "_ROWS_AT_ONCE", 3)
    torch.testing.assert_close(layer(states), expected)


def test_rounding_is_to_the_nearest_of_255_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions.quantize, "_ROWS_AT_ONCE", 2)
    weight = torch.tensor([[1.27, -0.014, 0.0], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.02]])
    whole, scale = quantised(weight)
    assert whole.tolist() == [[127, -1, 0], [0, 0, 0], [-127, 50, 1]]
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([0.01, 0.02]))


def test_only_linear_layers_and_the_head_become_int8(tied: Checkpoint) -> None:
    """The tied head becomes a matrix of its own; the embedding stays as it was."""
    model = load(tied, "0:4")._model
    names = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.int8}
    assert len(names) == 4 * 7 + 1
    assert "lm_head.weight" in names
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    kept = LlamaForCausalLM.from_pretrained(tied.location).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, kept)


def test_a_last_stage_takes_its_head_from_the_embedding(tied: Checkpoint) -> None:
    assert torch.equal(load(tied, "2:4")._model.lm_head.weight, load(tied, "0:4")._model.lm_head.weight)


def test_memory_of_the_weights_shrinks(tied: Checkpoint) -> None:
    full = load_span(tied, BlockSpan(1, 3), torch.float32, CPU).weight_bytes
    assert 0.25 * full < load(tied, "1:3").weight_bytes < 0.3 * full


@pytest.mark.parametrize("kernel", [True, False])
def test_logits_are_those_of_the_whole_model_with_such_weights(
    tied: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.setenv(NO_KERNELS, "1")
    tokens = torch.arange(20)
    model = dequantised(tied, folder)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
        runner = load_runner(tied, BlockSpan(0, 4), torch.float32, CPU, "int8")
        found = runner.model.logits(runner.texts([20], tokens, None))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_the_sum_of_the_weights(tied: Checkpoint, dtype: torch.dtype) -> None:
    packed = load_runner(tied, BlockSpan(0, 4), dtype, CPU, "int8").model
    assert packed.weight_bytes == load_span(tied, BlockSpan(0, 4), dtype, CPU, quantization="int8").weight_bytes


def test_the_slow_way_is_told(tied: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_KERNELS, "1")
    with structlog.testing.capture_logs() as lines:
        load_runner(tied, BlockSpan(0, 1), torch.float32, CPU, "int8")
        load_runner(tied, BlockSpan(0, 1), torch.float32, CPU)
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("quantised_layers_by_torch", f"{NO_KERNELS} is set")
    ]


def test_one_tensor_is_read_after_another(tied: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that never more than one of them is there in full."""
    waiting: list[torch.Size] = []
    read = functions.weights.LazyTensor.__getitem__
    keep = functions.quantize.quantised

    def counted(self: functions.weights.LazyTensor, key: object) -> torch.Tensor:
        found = read(self, key)
        if len(found.shape) == 2:
            waiting.append(found.shape)
        assert len(waiting) <= 2  # an embedding stays
        return found

    def done(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        waiting.remove(weight.shape)
        return keep(weight)

    monkeypatch.setattr(functions.weights.LazyTensor, "__getitem__", counted)
    monkeypatch.setattr(functions.quantize, "quantised", done)
    load(tied, "0:3")


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks have no linear layers, only Conv1D, .*without --quantize"):
        load(open_checkpoint(str(tmp_path)), "0:2")


def int8_layer(width: int, out: int) -> Int8Linear:
    layer = Int8Linear(nn.Linear(width, out, device="meta"))
    layer.weight = nn.Parameter(torch.randn(out, width))
    layer.bias = nn.Parameter(torch.randn(out))
    return layer.requires_grad_(False)
