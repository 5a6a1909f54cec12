"""Which faults come when: a pure function of a seed. No I/O and no clock.

Faults come after so many tokens, of all answers together, and not after so many seconds: on a slow machine they hit the
same moments of the generations as on a quick one. Those at a stage wait there for the next step, some for the next
event of any type, and are done to the replica that it is for, at a point of its way:

    orchestrator ──1──► replica ──2──► stage computes ──3──► reply ──► orchestrator
                      "before"       "during"          "after"
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "kill",  # SIGKILL; another process takes its place
    "stop",  # SIGSTOP for some time
    "drain",  # a rolling update: another replica starts, this one ends as Knative ends pods
    "delay",  # a request or a reply is late
    "cut",  # the connection is reset
    "drop",  # the replica's network is silent for some time: nothing arrives and nothing comes back
    "corrupt",  # bits of a request or a reply are flipped, in its headers or its body
    "duplicate",  # a request arrives twice, at once or some time later
    "reorder",  # a request is held back until a later one has passed
    "disconnect",  # a client goes in the middle of its answer
    "orchestrator",  # SIGKILL of the orchestrator, and a new one
    "terminate",  # SIGTERM of the orchestrator, which ends as it likes, and a new one
]
Point = Literal["before", "during", "after"]
Part = Literal["request head", "request body", "reply head", "reply body"]

KINDS: tuple[Kind, ...] = get_args(Kind)
POINTS: tuple[Point, ...] = get_args(Point)
PARTS: tuple[Part, ...] = get_args(Part)
ELSEWHERE = frozenset({"disconnect", "orchestrator", "terminate"})  # all others are done to a stage

_SECONDS_MAX: Mapping[Kind, float] = {
    "kill": 1.0,  # until the new process is started
    "stop": 4.0,
    "drain": 1.0,  # that the old replica serves on
    "delay": 0.5,
    "drop": 4.0,
    "duplicate": 1.0,  # until the second one arrives
    "reorder": 0.5,  # at the most
    "orchestrator": 0.3,
    "terminate": 0.3,
}
_TOGETHER = 0.2  # of all faults come at the same moment as the one before


@dataclass(frozen=True, slots=True)
class Fault:
    """`seconds` is how long it lasts, `stage` None for what is not done to a stage; `part` for corrupt alone.
    `salt` chooses what is left, such as the bits that are flipped."""

    number: int
    kind: Kind
    after_tokens: int
    stage: int | None
    point: Point
    seconds: float
    part: Part | None
    salt: int

    @property
    def takes_any_event(self) -> bool:
        """Whether it befalls releases, wakes and whatever else comes, and not steps alone."""
        return self.salt % 4 == 0

    def __str__(self) -> str:
        where = "" if self.stage is None else f" at stage {self.stage}, {self.point}"
        part = f", {self.part}" if self.part else ""
        return f"#{self.number} {self.kind}{where}{part}, {self.seconds:.2f} s"


def planned(
    seed: int, counts: Mapping[Kind, int], *, stages: int, tokens: int, times: float = 1.0
) -> tuple[Fault, ...]:
    """The faults in their order: of each kind so many, while `tokens` are generated in `stages` stages. They last
    `times` as long as they otherwise would."""
    chance = random.Random(f"faults {seed}")
    kinds = [kind for kind in KINDS for _ in range(counts.get(kind, 0))]
    chance.shuffle(kinds)
    # none at the end, where nobody may be left to be hit: whole answers are counted when they end
    moments = sorted(chance.randrange(1, max(2, int(tokens * 0.85))) for _ in kinds)
    for index in range(1, len(moments)):
        if chance.random() < _TOGETHER:
            moments[index] = moments[index - 1]
    return tuple(
        _fault(chance, number, kind, moment, stages, times)
        for number, (kind, moment) in enumerate(zip(kinds, moments, strict=True), 1)
    )


def _fault(chance: random.Random, number: int, kind: Kind, moment: int, stages: int, times: float) -> Fault:
    stage, point, part = chance.randrange(stages), chance.choice(POINTS), chance.choice(PARTS)
    seconds = round(times * chance.uniform(0, _SECONDS_MAX.get(kind, 0.0)), 3)
    return Fault(
        number,
        kind,
        moment,
        None if kind in ELSEWHERE else stage,
        point,
        seconds,
        part if kind == "corrupt" else None,
        chance.getrandbits(32),
    )
