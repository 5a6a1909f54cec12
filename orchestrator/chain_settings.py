"""How a chain of stages behaves: widths, limits, and how long it waits for what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChainSettings:
    spread: int = 0  # stages that compute at once: so many lanes, and steps of a lane, fill the pipeline; 0: all stages
    lane_width: int = 64  # sequences
    lanes_max: int = 0  # 0: no bound
    lane_age_s: float = 5.0  # older lanes take no new sequences, see lanes.place; 0: none grows old
    step_tokens_max: int = 512  # prefill chunks and decode tokens of one step
    waiting_max: int = 1024  # sequences admitted but not yet in a lane, of each priority
    waiting_tokens_max: int = 4 << 20  # of their prompts
    batch_share: float = 0.75  # of KV memory, and of bounded lanes, that batches may fill up beside interactive load
    batch_alone_after_s: float = 5.0  # without interactive load for so long, batches may use all
    wake_timeout_s: float = 600.0
    step_timeout_s: float = 120.0  # for one step, as long as nothing is known of how long steps take
    hang_floor_s: float = 2.0  # the least time that a replica gets for a step, see orchestrator/deadlines.py
    journal_bytes_max: int = 512 << 20  # of steps kept for stages that lose what they hold; 0: none
    release_timeout_s: float = 10.0
    attempts: int = 8  # steps in a row without progress before a sequence fails
    backoff_s: float = 0.1  # doubled with each attempt
    probe_every_s: float = 1.0  # how often replicas in use are asked whether they drain
    idle_before_wake_s: float = 2.0  # with no lane for so long the stages may be at zero, and are woken together
