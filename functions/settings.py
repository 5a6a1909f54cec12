"""Settings of a stage's process, read once from STAGE_... environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

import psutil
import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from functions.cgroup import CGROUP_ROOT, cpu_limit, memory_available_bytes
from functions.claims import Claims
from functions.contract.checkpoint import Checkpoint
from functions.contract.http_limits import HttpLimits
from functions.contract.location import default_wait_s
from functions.contract.seals import CLOCK_SKEW_S, Seals
from functions.contract.settings_error import SettingsError
from functions.contract.spans import BlockSpan
from functions.contract.watched_file import FileError
from functions.quantize import Quantization

_CPU_KV_BYTES_MAX = 4 << 30
_CPU_KV_SHARE = 0.25
_CUDA_KV_SHARE = 0.85


class StageSettings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="STAGE_", extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: str = Field(description="folder or URL of the checkpoint, or demo")
    model_wait_s: float = Field(
        default_factory=default_wait_s, ge=0, description="seconds to wait for a folder that appears late"
    )
    blocks: Annotated[BlockSpan, NoDecode] = Field(description="START:END, half-open")
    index: int = Field(0, ge=0, description="number of this stage, from 0")
    count: int = Field(1, ge=1, description="number of stages")
    plan: str = Field("", description="digest of the plan; events of another plan are refused")
    model_name: str = "model"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantization = Field("none", description="int8: linear layers with weights of 8 bits")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    kv_bytes_max: int | None = Field(None, gt=0, description="bytes; default a share of free memory")
    kv_share: float = Field(
        1.0, gt=0, le=1, description="this stage's part of that share, when others share the device"
    )
    kv_lease_s: float = Field(
        60, ge=0, description="seconds without a step or a renewal after which a sequence is freed; 0: never"
    )
    grace_s: float = Field(25, ge=0, description="seconds after SIGTERM in which sequences may go to other replicas")
    body_bytes_max: int = Field(1 << 30, gt=0, description="largest event taken, in bytes")
    score_tokens_max: int = Field(16_384, gt=0, description="most tokens of one score event")
    claims: str = Field("", description="folder or URL for data too large for a broker; all stages have the same")
    claim_bytes: int = Field(48 << 10, ge=0, description="score events with more data refer to a claim")
    claim_age_s: float = Field(86_400, gt=0, description="seconds after which claims are removed, used or not")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: its default, at most the CPU limit")
    cores_lock: str = Field(
        "", description="file that stages on the same cores share; one that computes holds a lock on it"
    )
    connections_max: int = Field(HttpLimits.connections_max, gt=0, description="open at once; further ones get 503")
    header_bytes_max: int = Field(HttpLimits.header_bytes_max, gt=0, description="of a request; more get 431")
    headers_max: int = Field(HttpLimits.headers_max, gt=0, description="of a request; more get 431")
    receive_timeout_s: float = Field(
        HttpLimits.receive_timeout_s, gt=0, description="seconds for an event to come, headers and body; then 408"
    )
    signing_key_file: Path | None = Field(
        None, description="file of keys; only events signed with one of them are taken"
    )
    clock_skew_s: float = Field(
        CLOCK_SKEW_S, gt=0, description="a signed event may be so old, or from the future; as long it is taken once"
    )
    unsigned_scores: Literal["refuse", "allow"] = Field(
        "refuse", description="whether a stage with keys takes score events, which brokers bring unsigned"
    )
    replica: str = Field("", description="HOST:PORT that reaches this replica; found out if not set")

    @field_validator("blocks", mode="before")
    @classmethod
    def _parse_blocks(cls, value: object) -> object:
        return BlockSpan.parse(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_index(self) -> Self:
        if self.index >= self.count:
            raise ValueError(f"STAGE_INDEX {self.index} must be below STAGE_COUNT {self.count}")
        return self

    @property
    def http_limits(self) -> HttpLimits:
        return HttpLimits(self.connections_max, self.header_bytes_max, self.headers_max, self.receive_timeout_s)

    def open_claims(self) -> Claims | None:
        """None without STAGE_CLAIMS. Raises SettingsError for a URL that cannot be opened."""
        try:
            return Claims(self.claims) if self.claims else None
        except (ValueError, ImportError) as error:
            raise SettingsError(f"STAGE_CLAIMS is {self.claims!r}, which cannot be opened: {error}") from None

    def open_seals(self) -> Seals:
        """Raises SettingsError for a file that holds no keys."""
        try:
            return Seals.open(self.signing_key_file, self.clock_skew_s)
        except FileError as error:
            raise SettingsError(f"STAGE_SIGNING_KEY_FILE: {error}") from None

    def torch_device(self) -> torch.device:
        """Raises SettingsError for a GPU that is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise SettingsError(f"STAGE_DEVICE is {self.device}, but torch finds no CUDA device; use cpu or auto")
        return torch.device(self.device)

    def torch_dtype(self, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
        """auto: what the checkpoint was saved in on a GPU, float32 on a CPU (few CPUs compute halves quickly)."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)  # type: ignore[no-any-return]  # one of the dtypes named above
        if device.type == "cpu":
            return torch.float32
        saved = checkpoint.text_config.get("dtype") or checkpoint.text_config.get("torch_dtype") or "bfloat16"
        return getattr(torch, str(saved).removeprefix("torch."), torch.bfloat16)

    def kv_budget_bytes(self, device: torch.device, cgroup_root: Path = CGROUP_ROOT) -> int:
        """What was set, else 85 % of the GPU's free memory, or a quarter of the host's or container's (at most 4 GiB),
        times the part that is this stage's."""
        if self.kv_bytes_max is not None:
            return self.kv_bytes_max
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0] * _CUDA_KV_SHARE * self.kv_share)
        return int(min(_CPU_KV_BYTES_MAX, _memory_available_bytes(cgroup_root) * _CPU_KV_SHARE) * self.kv_share)

    def torch_threads(self, cgroup_root: Path = CGROUP_ROOT) -> int:
        """What was set, else torch's own choice (a thread a core), or fewer where the container's CPU limit is below:
        threads beyond it would only use up its share sooner and then stand still together."""
        own_choice = torch.get_num_threads()
        return self.threads or min(own_choice, cpu_limit(cgroup_root) or own_choice)


def _memory_available_bytes(cgroup_root: Path) -> int:
    node, container = psutil.virtual_memory().available, memory_available_bytes(cgroup_root)
    return node if container is None else min(node, container)


def read_settings() -> StageSettings:
    """From the environment. Raises SettingsError, also for a STAGE_ name that does not exist."""
    known = {f"STAGE_{name.upper()}" for name in StageSettings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith("STAGE_") and name not in known)
    if unknown:
        raise SettingsError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return StageSettings()  # type: ignore[call-arg]  # pydantic reads the environment
    except (ValidationError, ValueError) as error:
        raise SettingsError(_explain(error)) from None


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"STAGE_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}" if item["loc"] else item["msg"]
        for item in error.errors()
    )
