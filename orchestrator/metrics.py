"""What is measured of each request, as Prometheus metrics and as one log line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType

import structlog
from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
REQUESTS = Counter("stagecraft_requests", "Requests by endpoint and outcome", ["model", "endpoint", "outcome"])
PROMPT_TOKENS = Counter("stagecraft_prompt_tokens", "Tokens of prompts taken in", ["model"])
GENERATED_TOKENS = Counter("stagecraft_generated_tokens", "Tokens generated", ["model"])
IN_FLIGHT = Gauge("stagecraft_requests_in_flight", "Requests in work or waiting", ["model"])
FIRST_TOKEN_S = Histogram(
    "stagecraft_time_to_first_token_seconds", "From request to first token", ["model"], buckets=_SECONDS
)
INTER_TOKEN_S = Histogram(
    "stagecraft_inter_token_seconds", "Between two tokens of one choice", ["model"], buckets=_SECONDS
)
SHARED = Counter(
    "stagecraft_idempotent_requests",
    "Requests with an idempotency key: begun, joined, repeated, or refused for another body",
    ["model", "outcome"],
)
BATCH_REQUESTS = Counter(
    "stagecraft_batch_requests", "Request events of batches by what became of them", ["model", "outcome"]
)
BATCH_IN_FLIGHT = Gauge("stagecraft_batch_requests_in_flight", "Requests of batches in work", ["model"])
BATCH_QUEUE = Gauge(
    "stagecraft_batch_queue", "Events in the orchestrator's file: requests, results, undelivered", ["model", "kind"]
)
TASKS = Gauge("stagecraft_tasks", "Tasks of the event loop; as many as before when nobody asks")

_log = structlog.get_logger("orchestrator")


def watch_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Counts them whenever the metrics are read."""
    TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))


class RequestRecord:
    """Context around one request's generation. Leaving it counts and logs: ok, cancelled, or the error's code."""

    def __init__(
        self, *, model: str, endpoint: str, request_id: str, prompt_tokens: int, choices: int, about: Mapping[str, str]
    ) -> None:
        self._labels = {"model": model, "endpoint": endpoint}
        self._about = dict(about)
        self._request_id = request_id
        self._choices = choices
        self._inter_token_s = INTER_TOKEN_S.labels(model)  # looked up once, not for each token
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.finishes: list[str] = []

    def token(self, choice: int) -> None:
        """To be called for each token as it arrives."""
        now_s = time.perf_counter()
        if self._first_s is None:
            self._first_s = now_s
            FIRST_TOKEN_S.labels(self._labels["model"]).observe(now_s - self._started_s)
        if choice in self._last_s:
            self._inter_token_s.observe(now_s - self._last_s[choice])
        self._last_s[choice] = now_s
        self.completion_tokens += 1

    def __enter__(self) -> RequestRecord:
        IN_FLIGHT.labels(self._labels["model"]).inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        model = self._labels["model"]
        IN_FLIGHT.labels(model).dec()
        PROMPT_TOKENS.labels(model).inc(self.prompt_tokens)
        GENERATED_TOKENS.labels(model).inc(self.completion_tokens)
        if error is None:
            outcome = "ok"
        elif isinstance(error, Exception):
            outcome = str(getattr(error, "code", "internal_error"))
        else:  # GeneratorExit or CancelledError: the client has gone
            outcome = "cancelled"
        REQUESTS.labels(**self._labels, outcome=outcome).inc()
        self._write(outcome, None if outcome in ("ok", "cancelled") else str(error))

    def _write(self, outcome: str, error: str | None) -> None:
        first_ms = None if self._first_s is None else round((self._first_s - self._started_s) * 1000, 1)
        _log.info(
            "request",
            request_id=self._request_id,
            **self._labels,
            outcome=outcome,
            choices=self._choices,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            ttft_ms=first_ms,
            total_ms=round((time.perf_counter() - self._started_s) * 1000, 1),
            finish=",".join(self.finishes),
            **self._about,
            **({"error": error} if error else {}),
        )
