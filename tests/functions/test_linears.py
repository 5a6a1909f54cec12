"""Packed linear layers give what torch gives, a row the same in any company, and hold each weight once."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from functions import linears
from functions.contract.checkpoint import Checkpoint, open_checkpoint
from functions.contract.spans import BlockSpan
from functions.kernels import NO_KERNELS, kernels
from functions.linears import Layer, PackedLinear, Panels, pack, watched_inputs
from functions.quantize import Int8Linear
from functions.runner import PackedRunner, load_runner
from functions.span_model import SpanModel

CPU = torch.device("cpu")
ROWS = (*range(1, 31), 64, 200)
SIDES = [(1, 1), (5, 33), (16, 32), (48, 31), (50, 100), (129, 64)]  # inputs, outputs

needs_kernel = pytest.mark.skipif(kernels() is None, reason="the compiled kernels are not installed")


def linear(inputs: int, outputs: int, *, bias: bool = True, int8: bool = False) -> Layer:
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    if not int8:
        return layer
    quantised = Int8Linear(nn.Linear(inputs, outputs, bias=bias, device="meta"))
    quantised.weight, quantised.bias = layer.weight, layer.bias
    return quantised.requires_grad_(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("processor")
@needs_kernel
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
def test_panels_give_what_torch_gives(inputs: int, outputs: int, bias: bool, int8: bool) -> None:
    layer = linear(inputs, outputs, bias=bias, int8=int8)
    panels = Panels([layer])
    for rows in ROWS:
        states = torch.randn(rows, inputs)
        torch.testing.assert_close(panels.product(states), layer(states), atol=1e-4, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("int8", [False, True])
def test_rows_may_lie_apart_and_have_any_shape(int8: bool) -> None:
    layer = linear(24, 40, int8=int8)
    product = Panels([layer]).product
    wide = torch.randn(7, 2, 60)
    for states in (
        wide[:, 0, :24], wide[..., 7:31], wide[:, :, :48:2], wide[:, 1, :24].t().contiguous().t(),
        wide[0, 0, :24], wide[:0, 0, :24], wide[:1, :1, :24].expand(3, 2, 24),
    ):  # fmt: skip
        found = product(states)
        assert found.shape == (*states.shape[:-1], 40)
        torch.testing.assert_close(found, layer(states), atol=1e-4, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    layer, states = linear(50, 70, int8=True), torch.randn(9, 50).to(dtype)
    found = Panels([layer]).product(states)
    assert found.dtype == dtype
    torch.testing.assert_close(found, layer(states.float()).to(dtype))


@pytest.mark.usefixtures("processor")
@needs_kernel
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_gets_the_same_bits_in_any_company_and_from_any_number_of_threads(int8: bool) -> None:
    panels, states = Panels([linear(129, 200, int8=int8)]), torch.randn(200, 129)
    with threads(1):
        together = panels.product(states)
        for first in range(0, 60, 7):
            for rows in ROWS[:-1]:
                part = slice(first, first + rows)
                assert torch.equal(panels.product(states[part]), together[part])
    for count in (2, 3):
        with threads(count):
            assert torch.equal(panels.product(states), together)
            assert torch.equal(panels.product(states[5:6]), together[5:6])


@pytest.mark.usefixtures("processor")
@needs_kernel
@pytest.mark.parametrize("int8", [False, True])
def test_many_rows_go_through_the_panels_in_blocks(int8: bool) -> None:
    layer, states = linear(1500, 70, int8=int8), torch.randn(300, 1500)  # 96 rows at a time
    panels = Panels([layer])
    together = panels.product(states)
    torch.testing.assert_close(together, layer(states), atol=1e-3, rtol=1e-4)
    for part in (slice(90, 100), slice(95, 200), slice(288, 300), slice(299, 300)):
        assert torch.equal(panels.product(states[part]), together[part])


@needs_kernel
def test_what_int8_panels_give_is_weights_times_scale() -> None:
    """Exact: whole numbers, which floats sum up without an error."""
    layer = Int8Linear(nn.Linear(64, 37, bias=False, device="meta"))
    whole, scale = torch.randint(-127, 128, (37, 64)), 2.0 ** torch.arange(-18, 19)
    whole[:, 0] = 127
    layer.weight = nn.Parameter(whole * scale[:, None], requires_grad=False)
    states = torch.randint(-50, 50, (5, 64)).float()
    assert torch.equal(Panels([layer]).product(states), (states @ whole.t().float()) * scale)


class Forks(nn.Module):
    """`a`, `b` and `c` have one input, `a` and `c` a bias or none; `again` runs twice, `copy` on an equal tensor."""

    def __init__(self, *, int8: bool = False) -> None:
        super().__init__()
        self.a, self.b = linear(20, 33, int8=int8), linear(20, 7, bias=False, int8=int8)
        self.c = linear(20, 64, int8=int8)
        self.copy = linear(20, 5, int8=int8)
        self.again = linear(5, 5, int8=int8)

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        parts = [self.a(states), self.b(states), self.c(states)]
        last = self.copy(states.clone())
        return [*parts, self.again(self.again(last))]


@pytest.mark.parametrize("int8", [False, True])
def test_layers_that_are_called_with_one_tensor_are_a_group(int8: bool) -> None:
    model = Forks(int8=int8)
    with watched_inputs(model) as groups:
        model(torch.randn(3, 20))
    assert groups == [["a", "b", "c"], ["copy"], ["again"]]
    model(torch.randn(3, 20))
    assert len(groups) == 3  # nobody watches any more


@needs_kernel
@pytest.mark.parametrize("int8", [False, True])
def test_a_group_gives_each_layer_its_part(int8: bool) -> None:
    model = Forks(int8=int8)
    with watched_inputs(model) as groups:
        model(torch.randn(1, 20))
    inputs = [torch.randn(rows, 20) for rows in (4, 1, 4)]
    expected = [model(states) for states in inputs]
    pack(model, groups)
    assert all(isinstance(module, PackedLinear) for module in model.children())
    for states, parts in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(states), parts, atol=1e-5, rtol=1e-5)


@needs_kernel
def test_a_group_of_floats_and_int8_is_two() -> None:
    model = nn.ModuleDict({"a": linear(20, 33), "b": linear(20, 40, int8=True), "c": linear(20, 8)})
    states = torch.randn(3, 20)
    expected = {name: layer(states) for name, layer in model.items()}
    pack(model, [["a", "b", "c"]])
    for name, layer in model.items():
        assert isinstance(layer, PackedLinear)
        torch.testing.assert_close(layer(states), expected[name], atol=1e-5, rtol=1e-5)


@needs_kernel
def test_a_part_is_computed_anew_for_a_new_input() -> None:
    """Even if a layer of the group is called alone, or a tensor is changed between two passes."""
    model = Forks()
    pack(model, [["a", "b", "c"]])
    first, second = torch.randn(2, 20), torch.randn(2, 20)
    a_first, c_second = model.a(first), model.c(second)
    torch.manual_seed(0)
    alone = Forks()
    torch.testing.assert_close([a_first, c_second], [alone.a(first), alone.c(second)])
    model(first)
    first.mul_(2)
    torch.testing.assert_close(model(first)[:3], alone(first)[:3])


@needs_kernel
@pytest.mark.parametrize("int8", [False, True])
def test_a_packed_layer_tells_its_shape_and_holds_its_weight_once(int8: bool) -> None:
    model = nn.ModuleDict({"a": linear(20, 33, int8=int8), "b": linear(20, 7, int8=int8)})
    before = [(name, weight.shape, weight.dtype) for name, weight in model.named_parameters()]
    held = [weakref.ref(layer.weight) for layer in model.values()]
    pack(model, [["a", "b"]])
    gc.collect()
    assert [(name, weight.shape, weight.dtype) for name, weight in model.named_parameters()] == before
    assert (model["a"].in_features, model["a"].out_features) == (20, 33)
    assert all(layer.weight.is_meta for layer in model.values())
    assert not any(weight() is not None for weight in held)


PACKING = """
import sys
import torch
from torch import nn
from functions import linears
from functions.quantize import Int8Linear

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def layer():
    made = nn.Linear(1024, 2048).requires_grad_(False)
    if sys.argv[1] == "float32":
        return made
    quantised = Int8Linear(nn.Linear(1024, 2048, device="meta"))
    quantised.weight, quantised.bias = made.weight, made.bias
    return quantised.requires_grad_(False)

model = nn.Sequential(*(layer() for _ in range(8)))
before_bytes, seen, joined_bias = resident_bytes(), [], linears._joined_bias
linears._joined_bias = lambda *given: (seen.append(resident_bytes()), joined_bias(*given))[1]
linears.pack(model, [[str(index)] for index in range(len(model))])
print(len(seen), max(seen) - before_bytes, resident_bytes() - before_bytes, 1024 * 2048 * 4)
"""


@needs_kernel
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_the_memory_of_a_weight_is_given_back_before_the_next_is_packed(kind: str) -> None:
    # In a process of its own: in one that ran other tests, freed weights stay in the holes of its heap.
    done = subprocess.run([sys.executable, "-c", PACKING, kind], capture_output=True, text=True, check=True)
    packed, most_bytes, kept_bytes, layer_bytes = map(int, done.stdout.split())
    assert packed == 8
    assert most_bytes < 3 * layer_bytes
    assert kept_bytes < 2 * layer_bytes


@needs_kernel
def test_a_weight_that_another_module_has_stays() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(40, 16), "head": linear(16, 40), "own": linear(16, 40)})
    model["head"].weight = model["embedding"].weight
    pack(model, [["head", "own"]])
    assert model["head"].weight is model["embedding"].weight
    assert isinstance(model["own"], PackedLinear)


class Scaled(nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weight * 2)


@needs_kernel
def test_other_classes_and_dtypes_stay() -> None:
    model = nn.ModuleDict({"scaled": Scaled(8, 8), "bf16": nn.Linear(8, 8, dtype=torch.bfloat16)})
    pack(model, [["scaled", "bf16"]])
    assert [type(layer) for layer in model.values()] == [Scaled, nn.Linear]
    assert not linears.can_be_packed(model["bf16"])


def test_without_the_kernel_nothing_is_packed(monkeypatch: pytest.MonkeyPatch, llama: Checkpoint) -> None:
    monkeypatch.setenv(NO_KERNELS, "1")
    assert not linears.can_be_packed(linear(4, 4))
    runner = load(llama)
    assert isinstance(runner, PackedRunner)
    assert not packed_paths(runner.model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """2 blocks, width 32, head and embedding apart."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return open_checkpoint(str(path))


def load(checkpoint: Checkpoint) -> PackedRunner:
    runner = load_runner(checkpoint, BlockSpan(0, 2), torch.float32, CPU)
    assert isinstance(runner, PackedRunner)
    return runner


def packed_paths(model: SpanModel) -> list[str]:
    return [path for path, module in model._model.named_modules() if isinstance(module, PackedLinear)]


@needs_kernel
def test_the_blocks_of_llama_have_four_products_each(llama: Checkpoint) -> None:
    model = load(llama).model
    layers = [module for module in model._model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 2 * 7 + 1
    assert sorted(panels.outputs for panels in {layer.panels for layer in layers}) == sorted(
        [64, 32, 96, 32] * 2 + [64]
    )


def _fails(*_: object) -> None:
    raise RuntimeError("no such product")


def _wrong(panels: Panels, states: torch.Tensor) -> torch.Tensor:
    return states.new_ones(*states.shape[:-1], panels.outputs)


def _not_a_number(panels: Panels, states: torch.Tensor) -> torch.Tensor:
    return states.new_full((*states.shape[:-1], panels.outputs), torch.nan)


@needs_kernel
@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (_fails, "RuntimeError: no such product"),
        (_wrong, "packed linear layers compute something else"),
        (_not_a_number, "packed linear layers compute something else"),
    ],
)
def test_a_model_that_packing_breaks_runs_by_torch(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch, product: Callable[..., torch.Tensor], reason: str
) -> None:
    monkeypatch.setattr(Panels, "product", product)
    with structlog.testing.capture_logs() as lines:
        runner = load(llama)
    assert [(line["event"], line["reason"]) for line in lines] == [("linear_layers_by_torch", reason)]
    assert not packed_paths(runner.model)
    assert runner.texts([3], torch.arange(3), None).shape == (3, 32)
