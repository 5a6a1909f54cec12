"""What steps of each stage take, as one line of text: how a plan's profiles get into the orchestrator's settings.

1:0.004,512:0.2;1:0.005,512:0.3     two stages, each with pairs of a step's tokens and its seconds
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cost import StageProfile, timings_problem

StepTimes = tuple[tuple[int, float], ...]
"""Of a stage: tokens of a step, growing, and the seconds that it takes. Empty where nothing is known."""


def read_step_times(text: str) -> list[StepTimes]:
    """What `step_times_text` writes. Raises ValueError."""
    stages = []
    for part in text.split(";"):
        pairs = [pair.partition(":")[::2] for pair in part.split(",") if pair]
        times = tuple((int(tokens), float(seconds)) for tokens, seconds in pairs)
        if problem := timings_problem("times", times) if times else None:
            raise ValueError(problem)
        stages.append(times)
    return stages


def step_times_text(profiles: Sequence[StageProfile | None]) -> str:
    """The figures of stages as the setting has them; empty if there are none."""
    stages = [dict((*profile.decode_s, *profile.prefill_s)) if profile is not None else {} for profile in profiles]
    if not any(stages):
        return ""
    return ";".join(",".join(f"{tokens}:{times[tokens]:.3g}" for tokens in sorted(times)) for times in stages)
