"""Settings of the orchestrator process, from ORCHESTRATOR_* variables and flags; read once, in `main`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from functions.contract.http_limits import HttpLimits
from functions.contract.location import default_wait_s
from functions.contract.settings_error import SettingsError
from orchestrator.step_times import StepTimes, read_step_times

PREFIX = "ORCHESTRATOR_"


class OrchestratorSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="checkpoint (folder, URL or demo) that tokenizer and configuration are read from")
    model_wait_s: float = Field(
        default_factory=default_wait_s, ge=0, description="seconds to wait for a folder that appears late"
    )
    model_name: str = Field(min_length=1, description="name that clients give as `model`")
    stage_urls: Annotated[tuple[str, ...], NoDecode] = Field(description="URLs of the stages, in order, by comma")
    plan: str = Field(description="digest of the plan that the stages belong to")
    stage_signing_key_file: Path | None = Field(
        None, description="file of the keys that stages share; events to them are signed with the first"
    )
    api_keys_file: Path | None = Field(None, description="file of API keys; only requests with one of them are taken")
    events_without_key: Literal["refuse", "allow"] = Field(
        "refuse", description="whether a server with API keys takes events at /events, which brokers bring without one"
    )
    host: str = Field("0.0.0.0", description="address of the HTTP and gRPC ports")
    http_port: int = Field(8080, ge=1, le=65535, description="port of REST and OpenAI endpoints")
    grpc_port: int = Field(8081, ge=0, le=65535, description="port of KServe's gRPC service, 0 for none")
    body_bytes_max: int = Field(8 << 20, gt=0, description="longest request body")
    json_depth_max: int = Field(64, gt=0, description="how deep the JSON of a request body may be nested")
    connections_max: int = Field(HttpLimits.connections_max, gt=0, description="open at once; further ones get 503")
    header_bytes_max: int = Field(HttpLimits.header_bytes_max, gt=0, description="of a request; more get 431")
    headers_max: int = Field(HttpLimits.headers_max, gt=0, description="of a request; more get 431")
    receive_timeout_s: float = Field(
        HttpLimits.receive_timeout_s, gt=0, description="seconds for a request to come, headers and body; then 408"
    )
    requests_max: int = Field(256, gt=0, description="requests in work or waiting at once; more get 429")
    events: Literal["reply", "later", "off"] = Field(
        "reply", description="requests of batches as events: answered with their result, acknowledged first, or refused"
    )
    events_file: Path | None = Field(None, description="file that keeps requests and results of mode later")
    events_sink: str | None = Field(None, pattern="^https?://", description="URL that results go to in mode later")
    events_queue_max: int = Field(1024, gt=0, description="requests and results in that file; more get 429")
    batch_requests_max: int = Field(
        0, ge=0, description="requests of batches in work at once; 0: sequences of a full chain, and a lane more"
    )
    batch_share: float = Field(
        0.75, gt=0, le=1, description="share of KV memory that batches may fill up beside interactive requests"
    )
    batch_alone_after_s: float = Field(
        5, ge=0, description="seconds without interactive requests after which batches may use all"
    )
    choices_max: int = Field(128, gt=0, description="sequences that one request may ask for (prompts x n)")
    grace_s: int = Field(25, ge=0, description="seconds that running requests get after SIGTERM")
    request_timeout_s: float = Field(
        0, ge=0, description="seconds after which a request is given up, whatever it asks for; 0: it says itself"
    )
    reader_timeout_s: float = Field(
        60, gt=0, description="seconds after which a stream is cut whose client takes nothing of it"
    )
    idempotency_keep_s: float = Field(
        600, ge=0, description="seconds that the answer to a request with an Idempotency-Key is kept"
    )
    idempotency_count_max: int = Field(4096, gt=0, description="answers kept for their keys at once")
    idempotency_bytes_max: int = Field(64 << 20, gt=0, description="memory for answers kept for their keys")
    idempotency_linger_s: float = Field(
        15, ge=0, description="seconds that a generation with a key goes on when its client has gone; 0: not at all"
    )
    spread: int = Field(0, ge=0, description="stages that compute at once, which lanes are to keep busy; 0: all")
    lane_width: int = Field(64, gt=0, description="sequences in a lane")
    lanes_max: int = Field(0, ge=0, description="lanes of sequences at once, 0 for no bound")
    lane_age_s: float = Field(5, ge=0, description="seconds after which a lane takes no new sequences; 0: never")
    step_tokens_max: int = Field(512, gt=0, description="tokens of one step: decode tokens and prefill chunks")
    waiting_max: int = Field(1024, gt=0, description="sequences that wait for a lane; more get 429")
    waiting_tokens_max: int = Field(4 << 20, gt=0, description="tokens of their prompts; more get 429")
    wake_timeout_s: float = Field(600, gt=0, description="seconds that stages get to wake and load")
    step_timeout_s: float = Field(
        120, gt=0, description="seconds that a stage gets for one step, while nothing tells how long steps take"
    )
    step_times: Annotated[tuple[StepTimes, ...], NoDecode] = Field(
        (), description="seconds of a step by its tokens, of each stage, as measured: 1:0.004,512:0.2;1:0.005,512:0.3"
    )
    hang_floor_s: float = Field(
        2, gt=0, description="least seconds that a replica gets for one step before it counts as hung"
    )
    journal_bytes_max: int = Field(
        512 << 20, ge=0, description="bytes of steps kept for stages that lose what they hold; 0: none"
    )
    release_timeout_s: float = Field(10, gt=0, description="seconds that a stage gets to free sequences")
    attempts: int = Field(8, gt=0, description="steps in a row without progress before a sequence fails")
    backoff_s: float = Field(0.1, gt=0, description="wait before a step is tried again, doubled each time")
    probe_every_s: float = Field(1, gt=0, description="seconds between two looks whether replicas in use drain")
    idle_before_wake_s: float = Field(2, ge=0, description="idle seconds after which all stages are woken at once")
    log_json: bool | None = Field(None, description="logs as JSON; by default wherever stderr is no terminal")

    @property
    def http_limits(self) -> HttpLimits:
        return HttpLimits(self.connections_max, self.header_bytes_max, self.headers_max, self.receive_timeout_s)

    @property
    def batch_workers(self) -> int:
        return self.batch_requests_max or self.lane_width * ((self.spread or len(self.stage_urls)) + 1)

    @field_validator("step_times", mode="before")
    @classmethod
    def _split_times(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(read_step_times(value)) if value else ()
        except ValueError:
            raise ValueError(
                "must be TOKENS:SECONDS pairs with commas between them, tokens growing, and a semicolon between two "
                "stages, such as 1:0.004,512:0.2;1:0.005,512:0.3"
            ) from None

    @field_validator("stage_urls", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = [part.strip().rstrip("/") for part in value.split(",")] if isinstance(value, str) else value
        if not parts or not all(isinstance(p, str) and p.startswith(("http://", "https://")) for p in parts):
            raise ValueError("must be http:// or https:// URLs with commas between them")
        return tuple(parts)


def load_settings(environment: Mapping[str, str], **given: Any) -> OrchestratorSettings:
    """`given` (flags) goes before the environment. Raises SettingsError.

    PORT, by which Knative tells a container where to listen, is the HTTP port where no other was named, and K_SINK, by
    which it tells where events go, the sink."""
    _check_names(environment)
    for name, of_platform in (("http_port", "PORT"), ("events_sink", "K_SINK")):
        if name not in given and PREFIX + name.upper() not in environment and environment.get(of_platform):
            given[name] = environment[of_platform]
    try:
        settings = OrchestratorSettings(**given)
    except ValidationError as error:
        lines = [f"  {PREFIX}{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors() if e["loc"]]
        raise SettingsError("the settings cannot be used:\n" + "\n".join(lines)) from None
    _check_times(settings)
    _check_later(settings)
    return settings


def _check_times(settings: OrchestratorSettings) -> None:
    if settings.step_times and len(settings.step_times) != len(settings.stage_urls):
        raise SettingsError(
            f"{PREFIX}STEP_TIMES tells the times of {len(settings.step_times)} stages, there are "
            f"{len(settings.stage_urls)} in {PREFIX}STAGE_URLS; a stage without figures has nothing between semicolons"
        )


def _check_later(settings: OrchestratorSettings) -> None:
    needed = {"EVENTS_FILE": settings.events_file, "EVENTS_SINK (or K_SINK)": settings.events_sink}
    missing = [f"{PREFIX}{name}" for name, value in needed.items() if value is None]
    if settings.events == "later" and missing:
        raise SettingsError(f"{PREFIX}EVENTS=later needs {' and '.join(missing)}")


def _check_names(environment: Mapping[str, str]) -> None:
    """pydantic-settings overlooks variables that it does not know, so a typing error would pass unseen."""
    known = {PREFIX + name.upper() for name in OrchestratorSettings.model_fields}
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
            raise SettingsError(f"unknown setting {name}; {hint}")
