"""What Prometheus sees of a stage."""

from __future__ import annotations

from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

EVENTS = Counter("stagecraft_stage_events_total", "Events taken, by type and answer", ["type", "answer"])
TOKENS = Counter("stagecraft_stage_tokens_total", "Tokens that went through the blocks")
COMPUTE_SECONDS = Histogram(
    "stagecraft_stage_compute_seconds",
    "Time of one step in the blocks",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
WAIT_SECONDS = Histogram(
    "stagecraft_stage_wait_seconds",
    "Time that a step waited for the steps before it",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
BODY_BYTES = Counter("stagecraft_stage_body_bytes_total", "Bytes of event data", ["direction"])
KV_BYTES = Gauge("stagecraft_stage_kv_bytes", "Bytes of KV cache set aside")
KV_BYTES_FILLED = Gauge("stagecraft_stage_kv_bytes_filled", "Bytes of KV cache that hold keys and values")
KV_BYTES_MAX = Gauge("stagecraft_stage_kv_bytes_max", "Budget of the KV cache in bytes")
SEQUENCES = Gauge("stagecraft_stage_sequences", "Sequences held")
SEQUENCES_EXPIRED = Counter(
    "stagecraft_stage_sequences_expired_total", "Sequences freed because nobody had touched them for a lease"
)
HANDED_OVER = Counter(
    "stagecraft_stage_handed_over_total", "Sequences that went to another replica, or came from one", ["direction"]
)
HANDED_OVER_BYTES = Counter("stagecraft_stage_handed_over_bytes_total", "Their keys and values", ["direction"])
LOAD_SECONDS = Gauge("stagecraft_stage_load_seconds", "Time from the start of loading to ready")


def handed_over(direction: Literal["in", "out"], sequences: int, kv_bytes: int) -> None:
    HANDED_OVER.labels(direction).inc(sequences)
    HANDED_OVER_BYTES.labels(direction).inc(kv_bytes)
