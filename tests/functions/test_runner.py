"""Which architectures run packed, which one sequence at a time, and which are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from structlog.testing import capture_logs

from functions.contract.checkpoint import CheckpointError, open_checkpoint
from functions.contract.errors import WrongPosition
from functions.contract.messages import Opening, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from functions.runner import Runner, load_runner
from functions.stage import Stage

REQUIRED = ("llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "gpt_oss", "gpt2", "opt")
ONE_BY_ONE = ("bloom", "falcon", "mpt", "deepseek_v3", "llama4_text", "falcon_h1")
FLOAT_BYTES = 4

Load = Callable[[str, str], Runner]


@pytest.fixture(scope="module")
def load(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """(architecture, '0:2') -> the runner of these blocks of a small random model."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    configurations: dict[str, dict[str, Any]] = yaml.safe_load((root / "tests" / "architectures.yaml").read_text())
    folders: dict[str, Path] = {}

    def get(name: str, span: str) -> Runner:
        if name not in folders:
            settings = {**configurations[name], "eos_token_id": None, "pad_token_id": None}
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**settings))
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
        checkpoint = open_checkpoint(str(folders[name]))
        return load_runner(checkpoint, BlockSpan.parse(span), torch.float32, torch.device("cpu"))

    return get


@pytest.mark.parametrize("span", ["0:4", "0:1", "1:3", "3:4"])
@pytest.mark.parametrize("architecture", REQUIRED)
def test_required_architectures_run_packed(architecture: str, span: str, load: Load) -> None:
    assert load(architecture, span).packed


@pytest.mark.parametrize("architecture", ONE_BY_ONE)
def test_attention_of_its_own_runs_one_sequence_at_a_time(architecture: str, load: Load) -> None:
    assert not load(architecture, "0:4").packed
    assert not load(architecture, "2:4").packed


@pytest.mark.parametrize("span", ["0:4", "0:1", "1:4"])
def test_bytes_per_token_are_those_of_the_keys_and_values_of_the_span(span: str, load: Load) -> None:
    """Admission counts on it: 2 heads of 8 for keys and as much for values, in every block of the span."""
    blocks = len(BlockSpan.parse(span))
    assert load("llama", span).kv_bytes_per_token == blocks * 2 * (2 * 8) * FLOAT_BYTES


def test_bytes_per_token_are_counted_without_packing_too(load: Load) -> None:
    """Bloom caches all 4 heads of 8."""
    assert load("bloom", "0:3").kv_bytes_per_token == 3 * 2 * (4 * 8) * FLOAT_BYTES


def test_a_stage_that_attends_by_torch_on_a_cpu_says_why_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load("llama", "0:2")
    monkeypatch.setenv("STAGECRAFT_NO_KERNELS", "1")
    with capture_logs() as lines:
        Stage(runner, 1 << 20)
    assert lines == [{"event": "attention_by_torch", "log_level": "info", "reason": "STAGECRAFT_NO_KERNELS is set"}]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "gpt_oss", "phi3"])
def test_hidden_states_by_the_kernel_and_by_torch_are_close(
    architecture: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short sequences, decode and pieces of a prompt in one step, past the windows."""
    runner = load(architecture, "0:3")
    random = np.random.default_rng(0)
    starts, new = (0, 30, 9, 64, 3), (5, 1, 2, 1, 7)
    openings = {i + 1: Opening(SamplingParams(), 3) for i in range(len(starts))}
    first = Step(
        tuple(Slice(i + 1, 0, n) for i, n in enumerate(starts) if n),
        random.integers(0, 211, sum(starts), dtype=np.int32),
        None,
        {i: opening for i, opening in openings.items() if starts[i - 1]},
    )
    second = Step(
        tuple(Slice(i + 1, start, n) for i, (start, n) in enumerate(zip(starts, new, strict=True))),
        random.integers(0, 211, sum(new), dtype=np.int32),
        None,
        {1: openings[1]},
    )

    def hidden_states() -> Any:
        stage = Stage(runner, 1 << 24)
        stage.step(first)
        return stage.step(second).hidden.numpy().copy()

    by_kernel = hidden_states()
    monkeypatch.setenv("STAGECRAFT_NO_KERNELS", "1")
    np.testing.assert_allclose(by_kernel, hidden_states(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("span", ["0:4", "0:2", "2:4"])
def test_state_that_is_in_no_cache_that_can_be_followed_is_refused(span: str, load: Load) -> None:
    """Mamba keeps its state past the blocks' cache: answers cut into slices would be wrong without anyone noticing."""
    with pytest.raises(CheckpointError) as caught:
        load("mamba", span)
    _assert_readable(str(caught.value))


@pytest.mark.parametrize("span", ["0:2", "2:4", "1:3"])
def test_blocks_that_depend_on_each_other_are_not_cut(span: str, load: Load) -> None:
    with pytest.raises(CheckpointError, match="use 1 stage") as caught:
        load("gemma3n_text", span)
    assert "hidden_size_per_layer_input" in str(caught.value)
    _assert_readable(str(caught.value))


@pytest.mark.parametrize("architecture", ["bloom", "falcon_h1"])
def test_a_repeated_step_names_all_sequences_that_must_be_replayed_at_once(architecture: str, load: Load) -> None:
    """Named one at a time, a wide lane would need more steps to recover than a sequence has attempts."""
    stage, identities = Stage(load(architecture, "0:4"), 1 << 24), range(1, 9)
    openings = {i: Opening(SamplingParams(), 3) for i in identities}
    stage.step(Step(tuple(Slice(i, 0, 3) for i in identities), np.ones(24, dtype=np.int32), None, openings))
    decode = Step(tuple(Slice(i, 3, 1) for i in identities), np.ones(8, dtype=np.int32))
    first = stage.step(decode)
    with pytest.raises(WrongPosition) as caught:
        stage.step(decode)
    assert caught.value.positions == dict.fromkeys(identities, 0)
    replay = Step(tuple(Slice(i, 0, 4) for i in identities), np.ones(32, dtype=np.int32), None, openings)
    assert [s.token for s in stage.step(replay).items] == [s.token for s in first.items]


def test_more_blocks_than_the_model_has_are_refused(load: Load) -> None:
    with pytest.raises(CheckpointError, match="blocks 2:5 were asked for, the model has 4"):
        load("llama", "2:5")


def _assert_readable(text: str) -> None:
    """One line for people: no trace, no address of an object."""
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    assert " at 0x" not in text
