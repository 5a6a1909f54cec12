"""What Prometheus sees of the chain."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

STEP_SECONDS = Histogram("stagecraft_step_seconds", "One step of a lane through all stages", buckets=_BUCKETS)
HOP_SECONDS = Histogram("stagecraft_hop_seconds", "One event to a stage and its reply", ["stage"], buckets=_BUCKETS)
HOP_BYTES = Counter("stagecraft_hop_bytes_total", "Bytes of step data sent to a stage", ["stage"])
TOKENS = Counter("stagecraft_tokens_sampled_total", "Tokens that the last stage has sampled")
REPLAYS = Counter("stagecraft_replays_total", "Times that what a stage had lost was computed anew by the whole chain")
REFILL_TOKENS = Counter("stagecraft_refill_tokens_total", "Tokens that a stage alone computed anew", ["stage"])
HANGS = Counter("stagecraft_hangs_total", "Times that a replica gave no reply within the limit of a step", ["stage"])
JOURNAL_BYTES = Gauge("stagecraft_journal_bytes", "Bytes of steps kept for stages that may lose what they hold")
WAITING = Gauge("stagecraft_sequences_waiting", "Sequences that wait for a lane", ["priority"])
RUNNING = Gauge("stagecraft_sequences_running", "Sequences in a lane (numbers are used again)", ["lane"])
HANDOVERS = Counter(
    "stagecraft_handovers_total",
    "Lanes that left a replica which drains: whole, partly or not at all (failed), or that stay there to their end",
    ["stage", "outcome"],
)
HANDOVER_SECONDS = Histogram(
    "stagecraft_handover_seconds", "Time in which a lane's keys and values went to another replica", buckets=_BUCKETS
)
