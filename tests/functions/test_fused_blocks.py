"""Blocks in one call of a kernel: which models' are, and that they compute what the modules do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn

from functions.contract.checkpoint import Checkpoint, open_checkpoint
from functions.contract.messages import Opening, Slice
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from functions.fused_blocks import FusedBlocks
from functions.kernels import NO_KERNELS, kernels
from functions.kv_cache import KvStore
from functions.runner import PackedRunner, Runner, load_runner

pytestmark = pytest.mark.skipif(kernels() is None, reason="the kernels are not built: no C compiler?")

CPU = torch.device("cpu")
FUSED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
BY_MODULES = {
    "granite": "a block computes something else (by 1 of what it adds)",  # it multiplies by a number of its own
    "gemma3_text": "blocks turn queries and keys by different angles",
    "olmo2": "a block's parts are LNnLNLALN",
    "gpt2": "a block has a LayerNorm",
    "mixtral": "a block has a MixtralTopKRouter",
}
LENGTHS = st.integers(1, 6) | st.sampled_from([31, 32, 33, 64, 70])  # about a tile's 32

Load = Callable[[str, str], Runner]
Make = Callable[[str], Any]  # Transformers has no types


@pytest.fixture(scope="module")
def make(root: Path) -> Make:
    """A small model of an architecture, with weights so large that each part counts."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    configurations: dict[str, dict[str, Any]] = yaml.safe_load((root / "tests" / "architectures.yaml").read_text())

    def get(name: str) -> Any:
        torch.manual_seed(0)
        configuration = {**configurations[name], "eos_token_id": None, "pad_token_id": None}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**configuration))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return model

    return get


@pytest.fixture(scope="module")
def load(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """(architecture, '0:2') -> the runner of these blocks."""
    folders: dict[str, Path] = {}
    loaded: dict[tuple[str, str], Runner] = {}

    def get(name: str, span: str) -> Runner:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            make(name).save_pretrained(folders[name])
        if (name, span) not in loaded:
            checkpoint = open_checkpoint(str(folders[name]))
            loaded[name, span] = load_runner(checkpoint, BlockSpan.parse(span), torch.float32, CPU)
        return loaded[name, span]

    return get


def fused(runner: Runner) -> FusedBlocks | None:
    found = runner.model.blocks[0]
    return found if isinstance(found, FusedBlocks) else None


@pytest.mark.parametrize("span", ["0:4", "1:3", "3:4"])
@pytest.mark.parametrize("architecture", FUSED)
def test_blocks_of_the_usual_kind_are_fused(architecture: str, span: str, load: Load) -> None:
    runner = load(architecture, span)
    found = fused(runner)
    assert found is not None
    assert len(found.blocks) == len(BlockSpan.parse(span))
    assert runner.model.weight_bytes == sum(p.numel() * p.element_size() for p in runner.model._model.parameters())


@pytest.mark.parametrize(("architecture", "reason"), BY_MODULES.items())
def test_others_stay_as_they_are_and_the_log_says_why(architecture: str, reason: str, load: Load) -> None:
    with capture_logs() as lines:
        runner = load(architecture, "1:3")
    assert fused(runner) is None
    assert len(runner.model.blocks) == 2
    assert [line["reason"] for line in lines if line["event"] == "blocks_by_modules"] == [reason]


class Filed:
    """A runner and its sequences."""

    def __init__(self, runner: Runner) -> None:
        assert isinstance(runner, PackedRunner)
        self.runner = runner
        self.store = KvStore(runner.kv_bytes_per_token, 1 << 21)
        runner.allocate(self.store.pages_max)

    def step(self, pieces: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """(sequence, start, length) each; tokens or hidden states are made up for each sequence and position."""
        slices = [Slice(sequence, start, length, sample=True) for sequence, start, length in pieces]
        sequences = self.store.reserve(slices, {s.sequence: Opening(SamplingParams(), 1) for s in slices})
        made = [torch.Generator().manual_seed(1000 * s.sequence + s.start) for s in slices]
        sizes = [s.length for s in slices]
        tokens = torch.cat([torch.randint(0, 200, (n,), generator=g) for n, g in zip(sizes, made, strict=True)])
        width = self.runner.model.hidden_size
        hidden = torch.cat([torch.randn(n, width, generator=g) for n, g in zip(sizes, made, strict=True)])
        hidden = None if self.runner.model.ends.first else hidden
        result = self.runner.run(sequences, slices, tokens, hidden)
        for sequence, piece in zip(sequences, slices, strict=True):
            sequence.position = piece.end
        return result


@pytest.mark.parametrize("span", ["0:4", "1:3"])
@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.usefixtures("processor")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(chunks=st.lists(st.lists(LENGTHS, min_size=1, max_size=3), min_size=1, max_size=4))
def test_they_compute_what_the_modules_do(architecture: str, span: str, load: Load, chunks: list[list[int]]) -> None:
    """Prompts in pieces and decode side by side, past the windows."""
    runner = load(architecture, span)
    results = []
    for by_modules in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if by_modules:
                patch.setenv(NO_KERNELS, "1")
            filed = Filed(runner)
            steps = []
            for turn in range(max(map(len, chunks))):
                cut = [(i + 1, sum(of[:turn]), of[turn]) for i, of in enumerate(chunks) if turn < len(of)]
                steps.append(filed.step(cut))
            results.append(torch.cat(steps))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("processor")
def test_a_sequence_gets_the_same_bits_in_any_company_and_with_any_threads(load: Load) -> None:
    runner = load("qwen3", "1:3")

    def last(company: Sequence[tuple[int, int, int]], threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            filed = Filed(runner)
            filed.step([(9, 0, 40)])
            for piece in company:
                if piece[1]:
                    filed.step([(piece[0], 0, piece[1])])
            return filed.step([(9, 40, 1), *company])[:1]
        finally:
            torch.set_num_threads(before)

    alone = last([], 1)
    for threads in (1, 2, 3):
        assert torch.equal(last([(1, 0, 70), (2, 33, 1), (3, 5, 2)], threads), alone)


def test_texts_that_are_not_cached_go_through_the_modules(load: Load) -> None:
    runner = load("llama", "0:2")
    tokens = torch.arange(40)
    filed = Filed(runner)
    slices = [Slice(1, 0, 40, sample=True)]
    sequences = filed.store.reserve(slices, {1: Opening(SamplingParams(), 1)})
    torch.testing.assert_close(runner.texts([40], tokens, None), runner.run(sequences, slices, tokens, None))


def test_a_block_that_adds_nothing_is_fused(make: Make, tmp_path: Path) -> None:
    """As those that are to be trained yet."""
    model = make("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).weight.data.zero_()
    model.save_pretrained(tmp_path)
    assert fused(load_runner(open_checkpoint(str(tmp_path)), BlockSpan(0, 2), torch.float32, CPU)) is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda result: result * 1.001, "a block computes something else (by 0.00"),
        (lambda result: result * torch.nan, "a block computes something else (by nan"),
        (lambda result: (result,), "blocks return more than hidden states"),
    ],
)
def test_a_block_that_does_something_besides_is_refused(
    checkpoint: Checkpoint, change: Callable[[torch.Tensor], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the right parts in the right order, and then there is something else."""
    real = FusedBlocks.__init__

    def changed(self: FusedBlocks, blocks: nn.ModuleList, *rest: Any) -> None:
        real(self, blocks, *rest)
        blocks[-1].register_forward_hook(lambda block, given, result: change(result))

    monkeypatch.setattr(FusedBlocks, "__init__", changed)
    with capture_logs() as lines:
        runner = load_runner(checkpoint, BlockSpan(0, 2), torch.float32, CPU)
    assert fused(runner) is None
    assert lines[0]["reason"].startswith(reason)
