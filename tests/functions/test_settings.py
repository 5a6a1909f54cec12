"""Settings of a stage: from STAGE_ variables, wrong ones named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from functions.contract.checkpoint import Checkpoint
from functions.contract.settings_error import SettingsError
from functions.contract.spans import BlockSpan
from functions.settings import StageSettings, read_settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what must be set is set."""
    for name in [name for name in os.environ if name.startswith("STAGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STAGE_MODEL", "/models/x")
    monkeypatch.setenv("STAGE_BLOCKS", "2:5")


def test_defaults() -> None:
    settings = read_settings()
    assert (settings.model, settings.blocks) == ("/models/x", BlockSpan(2, 5))
    assert (settings.index, settings.count, settings.plan, settings.dtype) == (0, 1, "", "auto")
    assert settings.body_bytes_max == 1 << 30


def test_every_setting_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "MODEL": "s3://b/m", "BLOCKS": "0:3", "INDEX": "1", "COUNT": "4", "PLAN": "ab", "MODEL_NAME": "n",
        "DTYPE": "bfloat16", "DEVICE": "cuda:1", "KV_BYTES_MAX": "123", "BODY_BYTES_MAX": "456", "THREADS": "2",
        "REPLICA": "10.0.0.1:8012", "KV_SHARE": "0.5", "MODEL_WAIT_S": "7.5",
        "SCORE_TOKENS_MAX": "9", "CLAIMS": "s3://b/c", "CLAIM_BYTES": "0", "CLAIM_AGE_S": "1.5", "QUANTIZE": "int8",
        "CORES_LOCK": "/tmp/cores.lock", "KV_LEASE_S": "1.25", "GRACE_S": "3.5",
        "CONNECTIONS_MAX": "10", "HEADERS_MAX": "11", "HEADER_BYTES_MAX": "12", "RECEIVE_TIMEOUT_S": "1.25",
        "SIGNING_KEY_FILE": "/tmp/keys", "CLOCK_SKEW_S": "2.5", "UNSIGNED_SCORES": "allow",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"STAGE_{name}", value)
    settings = read_settings()
    assert {name: str(getattr(settings, name.lower())) for name in values} == values
    assert {name.lower() for name in values} == set(StageSettings.model_fields)


WRONG = [
    ("BLOCKS", "5:2", "start < end"), ("BLOCKS", "two", "START:END"), ("BLOCKS", "", "START:END"),
    ("INDEX", "-1", "greater"), ("INDEX", "one", "integer"), ("COUNT", "0", "greater"),
    ("DTYPE", "int8", "float32"), ("DEVICE", "tpu", "match"), ("KV_BYTES_MAX", "0", "greater"),
    ("KV_BYTES_MAX", "2GiB", "integer"), ("BODY_BYTES_MAX", "-1", "greater"), ("THREADS", "-2", "greater"),
    ("QUANTIZE", "int4", "int8"),
]  # fmt: skip


def test_claims_that_cannot_be_opened_are_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_CLAIMS", "floppy://a/claims")
    with pytest.raises(SettingsError, match="STAGE_CLAIMS is 'floppy://a/claims'"):
        read_settings().open_claims()


@pytest.mark.parametrize(("name", "value", "hint"), WRONG)
def test_wrong_value_names_the_setting_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, hint: str
) -> None:
    monkeypatch.setenv(f"STAGE_{name}", value)
    with pytest.raises(SettingsError, match=f"STAGE_{name}: .*{hint}"):
        read_settings()


def test_index_past_the_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_INDEX", "2")
    monkeypatch.setenv("STAGE_COUNT", "2")
    with pytest.raises(SettingsError, match="STAGE_INDEX"):
        read_settings()


@pytest.mark.parametrize("name", ["MODEL", "BLOCKS"])
def test_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(f"STAGE_{name}")
    with pytest.raises(SettingsError, match=f"STAGE_{name}: .*required"):
        read_settings()


def test_all_wrong_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_DTYPE", "int8")
    monkeypatch.setenv("STAGE_THREADS", "many")
    with pytest.raises(SettingsError, match=r"STAGE_DTYPE: .*; STAGE_THREADS: "):
        read_settings()


def test_unknown_setting_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_BLOKS", "0:1")
    with pytest.raises(SettingsError, match="unknown settings STAGE_BLOKS; known are STAGE_BLOCKS, "):
        read_settings()


def test_device_auto_is_what_the_machine_has() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert read_settings().torch_device().type == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_DEVICE", "cuda:0")
    with pytest.raises(SettingsError, match="STAGE_DEVICE is cuda:0, but torch finds no CUDA device"):
        read_settings().torch_device()


@pytest.mark.parametrize(
    ("setting", "device", "saved", "expected"),
    [
        ("float16", "cpu", {"dtype": "bfloat16"}, torch.float16),
        ("auto", "cpu", {"dtype": "bfloat16"}, torch.float32),
        ("auto", "cuda", {"dtype": "float16"}, torch.float16),
        ("auto", "cuda", {"torch_dtype": "float16"}, torch.float16),
        ("auto", "cuda", {"text_config": {"dtype": "float32"}}, torch.float32),
        ("auto", "cuda", {}, torch.bfloat16),
        ("auto", "cuda", {"dtype": "nonsense"}, torch.bfloat16),
    ],
)
def test_dtype(
    monkeypatch: pytest.MonkeyPatch, setting: str, device: str, saved: dict[str, object], expected: torch.dtype
) -> None:
    monkeypatch.setenv("STAGE_DTYPE", setting)
    assert read_settings().torch_dtype(Checkpoint("/x", saved, {}), torch.device(device)) == expected


def test_kv_budget_is_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_KV_BYTES_MAX", "12345")
    assert read_settings().kv_budget_bytes(torch.device("cpu")) == 12345


def test_kv_budget_of_a_host_is_bounded() -> None:
    assert 0 < read_settings().kv_budget_bytes(torch.device("cpu")) <= 4 << 30


def test_kv_budget_of_a_container_is_a_share_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(str(64 << 20))
    (tmp_path / "memory.current").write_text(str(24 << 20))
    monkeypatch.setenv("STAGE_KV_SHARE", "0.5")
    assert read_settings().kv_budget_bytes(torch.device("cpu"), tmp_path) == (40 << 20) * 0.25 * 0.5


@pytest.mark.parametrize(
    ("setting", "quota", "expected"), [("0", "100000", 1), ("0", "max", 3), ("0", "800000", 3), ("5", "100000", 5)]
)
def test_threads_are_those_set_or_at_most_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, quota: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota} 100000")
    monkeypatch.setenv("STAGE_THREADS", setting)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert read_settings().torch_threads(tmp_path) == expected
    finally:
        torch.set_num_threads(before)


def test_a_file_named_env_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("STAGE_INDEX=1\n")
    monkeypatch.chdir(tmp_path)
    assert read_settings().index == 0


@pytest.mark.parametrize("name", ["STAGE_BLOCKS", "STAGE_INDEX", "STAGE_" + "A" * 100_000])
def test_a_complaint_is_short_however_long_the_value_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_BLOCKS", "0:2")
    monkeypatch.setenv(name, "0" * 100_000 + ":")
    with pytest.raises(SettingsError, match=name[:12]) as caught:
        read_settings()
    assert len(str(caught.value)) < 5000
