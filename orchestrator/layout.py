"""How stages share the cores of one machine. Pure.

Stages of one request compute one after another. With few cores it is best to give each of them all cores in its turn:
batches are as large as they can be, and no core waits while another stage computes. With many cores threads beyond a
few bring a stage less and less, so stages have cores of their own and compute at once, each for another lane.
"""

from __future__ import annotations

from dataclasses import dataclass

_CORES_PER_STAGE = 4  # up to so many a stage, they are shared


@dataclass(frozen=True, slots=True)
class Layout:
    """`spread`: stages that compute at once. `threads`: of each stage. `in_turn`: two stages at once would have more
    threads than there are cores, so they have to take turns (STAGE_CORES_LOCK)."""

    spread: int
    threads: int
    in_turn: bool


def shared_cores_layout(stages: int, cores: int, *, threads: int | None = None, spread: int | None = None) -> Layout:
    """The layout for `stages` stages on `cores` cores; what is given is kept, and the rest made to fit it."""
    if threads is None:
        at_once = (1 if cores <= _CORES_PER_STAGE * stages else stages) if spread is None else min(spread, stages)
        threads = max(1, cores // at_once)
    if spread is None:
        spread = min(stages, max(1, cores // threads))
    return Layout(spread, threads, in_turn=stages > 1 and 2 * threads > cores)
