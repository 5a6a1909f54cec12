"""What int8 and bfloat16 cost: the tool's figures add up on a small model, and wrong questions are answered."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tools.quantize_quality import common, main

TOOL = Path(__file__).parents[2] / "tools" / "quantize_quality.py"


def test_each_kind_is_beside_float32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quality of mercy is not strained. " * 10)
    small = ["--window", 64, "--windows", 3, "--continuations", 2, "--prompt", 8, "--new-tokens", 5]
    command = [sys.executable, TOOL, tiny_checkpoint, "--text", text, *small, "--json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    reference, int8 = found[:2]
    assert [one["kind"] for one in found] == ["float32", "float32, int8 weights", "bfloat16", "bfloat16, int8 weights"]
    assert (reference["kl"], reference["same_top"], reference["prefix"], reference["identical"]) == (0, 1, 5, 1)
    assert 0 < int8["kl"] < 0.01
    assert int8["weight_bytes"] < reference["weight_bytes"]
    assert all(0 <= one["prefix"] <= 5 for one in found)


@pytest.fixture
def own_log() -> Iterator[None]:
    """The tool says where log lines go; afterwards they go where they went."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("own_log")
def test_a_text_that_is_too_short_is_told(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("Short.")
    assert main([str(tiny_checkpoint), "--text", str(text)]) == 1
    assert "--window 512 must be at least --prompt 32, and at most the 6 tokens of" in capsys.readouterr().err


@pytest.mark.parametrize(("ours", "length"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([4, 2, 3], 0)])
def test_the_common_beginning_is_counted(ours: list[int], length: int) -> None:
    assert common(ours, [1, 2, 3]) == length
