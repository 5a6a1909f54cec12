"""How many steps a replica of a stage should have at once: the target of its autoscaling, derived instead of guessed.

A replica computes one step at a time; further steps wait for it, and Knative counts both (its concurrency metric). A
step of one lane is the unit that scales: it makes one token for each of the lane's sequences. Let

    s_i  seconds that a step takes in stage i        h  seconds of one event and its reply, without computation
    S    number of stages                            x  how many times its time without waiting a token may take

    T = s_1 + ... + s_S + S h      what a token takes when nothing waits
    w = (x - 1) T / S              waiting that each stage may add, in equal parts
    N_i = 1 + w / s_i              steps at once when stage i's part is used up: one computes, each other waits s_i

A slow stage so gets a lower target than a fast one, and more replicas first. A replica whose KV memory holds c_i lanes
cannot have more than c_i steps: N_i = min(N_i, max(1, c_i)). The target is N_i, rounded down to one decimal. Knative
plans for 70 % of it (target-utilization-percentage); that is the room for bursts, and is not taken off here again.
containerConcurrency is one more than the target, rounded up: a wake or a release does not wait behind steps then, and a
burst cannot pile up in the first replica that is ready.

Only the ratios of the s_i (and of h to them) matter: where everything is twice as fast, the targets are the same.

s_i is measured where every stage has a profile: its decode times, linear between the measured widths. Below the least
width the least one's time counts, above the greatest it grows in proportion (both are upper bounds). Where a profile
is missing, all stages are estimated by their costs, so that measured and estimated times are never compared:

    s_i = max((weights + lane width x tokens / 2 x KV bytes per token) / memory speed,
              lane width x FLOPs per token / arithmetic speed) + blocks x overhead

(half the tokens: a cache is on average half as long as it gets). Embeddings count as read although only some of their
rows are, so the first stage of a model with a large vocabulary is estimated as too slow; a profile is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.cost import Cost, StageProfile, Timings
from orchestrator.plan import PlanError, StageSpec
from orchestrator.planner import size_text

CONCURRENCY_MAX = 1000  # container-concurrency-max-limit of Knative's config-defaults
_ROUNDING = 1e-9  # 1.9999999 by binary fractions is 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What the stages are asked for, and how long it may take. Raises ValueError with what is allowed."""

    lane_width: int = 64  # sequences that travel together
    tokens_per_sequence: int = 1024  # prompt and answer: what a sequence takes of KV memory at its end
    hop_s: float = 0.001  # one event and its reply, without computation; docs/performance.md, figure `hop`
    stretch: float = 2.0  # a token may take so many times what it takes without waiting

    def __post_init__(self) -> None:
        for name in ("lane_width", "tokens_per_sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.hop_s < math.inf:
            raise ValueError(f"hop_s must be 0 or more, got {self.hop_s}")
        if not 1 <= self.stretch < math.inf:
            raise ValueError(f"stretch must be 1 (no waiting) or more, got {self.stretch}")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What estimates stand on. `block_overhead_s`: Python and kernel launches of one block, whatever its size."""

    name: str
    memory_bytes_per_s: float
    flops_per_s: float
    block_overhead_s: float


# What one thread reached in docs/performance.md (82M model, 330 MB of float32): 31 ms a token, of which 12 blocks of
# overhead take 6, so 330 MB / 25 ms; 32 sequences at once over two threads, 241 tokens/s x 164 MFLOPs / 2; overhead
# from the demonstration model, 6 ms a token in 8 blocks of which its 20 MB take 2. Rounded; cores
# that work at once share the memory's speed. More threads scale all stages alike.
CPU = Hardware("one CPU thread", 10e9, 20e9, 0.0005)
# NVIDIA L4, by its data sheet 300 GB/s and 121 TFLOP/s in bfloat16 (dense); kernels reach about 80 % and 50 % of that.
# The overhead is the host's, as on a CPU.
GPU = Hardware("a mid-range GPU", 240e9, 60e12, 0.0005)


@dataclass(frozen=True, slots=True)
class StageTarget:
    """The target of one stage and how it came about, in lines for a comment."""

    target: float  # steps at once, one decimal
    container_concurrency: int  # always above the target
    step_s: float
    arithmetic: tuple[str, ...]


def stage_targets(
    stages: Sequence[StageSpec], workload: Workload, hardware: Hardware, kv_bytes_max: Sequence[int | None]
) -> tuple[StageTarget, ...]:
    """Targets of all stages of a plan; `kv_bytes_max` is each stage's budget, None when unknown.

    Raises PlanError that names the stage which has neither figure."""
    steps = _steps(stages, workload, hardware)
    free_s = sum(step_s for step_s, _ in steps) + len(stages) * workload.hop_s
    wait_s = (workload.stretch - 1) * free_s / len(stages)
    budget = (
        f"a token takes {_ms(free_s)} without waiting, {workload.stretch:g} x that is allowed: "
        f"{_ms(wait_s)} of waiting in each of {_counted(len(stages), 'stage')}"
    )
    targets = []
    for stage, (step_s, origin), kv_bytes in zip(stages, steps, kv_bytes_max, strict=True):
        lanes = _lanes(stage.cost, workload, kv_bytes)
        targets.append(_target(step_s, wait_s, lanes, (*origin, budget), workload, kv_bytes))
    return tuple(targets)


def measured_step_s(profile: StageProfile, width: int) -> float:
    """Seconds of a decode step of `width` sequences: linear between measured widths; see the top for the ends."""
    points: Timings = profile.decode_s
    least, greatest = points[0], points[-1]
    if width <= least[0]:
        return least[1]
    if width >= greatest[0]:
        return greatest[1] * width / greatest[0]
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(points) if width <= pair[1][0])
    return y0 + (y1 - y0) * (width - x0) / (x1 - x0)


def estimated_step_s(blocks: int, cost: Cost, workload: Workload, hardware: Hardware) -> float:
    """Seconds of a decode step of a full lane: whichever of memory and arithmetic takes longer, and overhead."""
    reading_s = (cost.weight_bytes + _kv_read_bytes(cost, workload)) / hardware.memory_bytes_per_s
    computing_s = workload.lane_width * cost.flops_per_token / hardware.flops_per_s
    return max(reading_s, computing_s) + blocks * hardware.block_overhead_s


def _steps(stages: Sequence[StageSpec], workload: Workload, hardware: Hardware) -> list[tuple[float, tuple[str, ...]]]:
    """For each stage the seconds of a step, and lines that say where they come from. Raises PlanError."""
    profiles = [stage.profile for stage in stages if stage.profile is not None]
    if len(profiles) == len(stages):
        return [_measured(profile, workload.lane_width) for profile in profiles]
    estimates = []
    for index, stage in enumerate(stages):
        if stage.cost is None:
            raise PlanError(_lacking(index, stages))
        estimates.append(_estimated(stage, stage.cost, workload, hardware))
    return estimates


def _measured(profile: StageProfile, width: int) -> tuple[float, tuple[str, ...]]:
    step_s = measured_step_s(profile, width)
    counted = _counted(width, "sequence")
    return step_s, (f"a step takes {_ms(step_s)} at {counted}, measured {profile.measured} on {profile.device}",)


def _estimated(stage: StageSpec, cost: Cost, workload: Workload, hardware: Hardware) -> tuple[float, tuple[str, ...]]:
    step_s = estimated_step_s(len(stage.blocks), cost, workload, hardware)
    read = f"{size_text(cost.weight_bytes)} of weights + {size_text(_kv_read_bytes(cost, workload))} of KV cache"
    computed = f"{workload.lane_width} x {_si(cost.flops_per_token)}FLOP"
    return step_s, (
        f"a step takes {_ms(step_s)} at {_counted(workload.lane_width, 'sequence')}, an estimate for {hardware.name} "
        "(`stagecraft profile` measures):",
        f"the longer of {read} at {_si(hardware.memory_bytes_per_s)}B/s",
        f"and {computed} at {_si(hardware.flops_per_s)}FLOP/s; {_ms(hardware.block_overhead_s)} for each of "
        f"{_counted(len(stage.blocks), 'block')}",
    )


def _lacking(index: int, stages: Sequence[StageSpec]) -> str:
    lacks = "neither `cost` nor `profile`" if stages[index].profile is None else "no `cost`"
    others = [i for i, stage in enumerate(stages) if stage.profile is None and i != index]
    also = f", and stage {others[0]} no `profile`" if lacks == "no `cost`" else ""
    return (
        f"stage {index} of the plan has {lacks}{also}, so its share of a token's time is unknown; make the plan anew "
        "with `stagecraft plan MODEL -o FILE`, or measure it with `stagecraft profile FILE --in-place`"
    )


def _kv_read_bytes(cost: Cost, workload: Workload) -> int:
    return workload.lane_width * workload.tokens_per_sequence * cost.kv_bytes_per_token // 2


def _lanes(cost: Cost | None, workload: Workload, kv_bytes: int | None) -> int | None:
    """How many full lanes the KV memory holds, None when that is unknown."""
    if cost is None or kv_bytes is None or cost.kv_bytes_per_token == 0:
        return None
    return kv_bytes // (workload.lane_width * workload.tokens_per_sequence * cost.kv_bytes_per_token)


def _target(
    step_s: float, wait_s: float, lanes: int | None, origin: tuple[str, ...], workload: Workload, kv_bytes: int | None
) -> StageTarget:
    steps = 1 + wait_s / step_s
    bound = CONCURRENCY_MAX - 1 if lanes is None else min(max(1, lanes), CONCURRENCY_MAX - 1)
    target = min(math.floor(steps * 10 + _ROUNDING) / 10, float(bound))
    limit = math.ceil(target) + 1
    lines = [*origin, f"1 + {_ms(wait_s)} / {_ms(step_s)} = {steps:.2f} steps at once"]
    if lanes is not None and kv_bytes is not None:
        each = f"{_counted(workload.lane_width, 'sequence')} x {workload.tokens_per_sequence} tokens"
        lines.append(f"KV memory of {size_text(kv_bytes)} holds {_counted(lanes, 'lane')} of {each}")
    lines.append(f"target {target:g}; containerConcurrency {limit}: one slot more, for a wake or a release")
    return StageTarget(target, limit, step_s, tuple(lines))


def _ms(duration_s: float) -> str:
    """Milliseconds for people: 12.4 ms, 0.05 ms."""
    duration_ms = duration_s * 1000
    return f"{duration_ms:.{1 if duration_ms >= 1 or duration_ms == 0 else 3}f} ms"


def _si(value: float) -> str:
    """With three digits and the prefix of the unit that follows: 4.72 M, 60 T."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
