"""At how many requests a stage's replica is busy: what was asked for, else what `orchestrator/targets.py` derives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.plan import PlanError, StageSpec
from orchestrator.render.deployment import Deployment, DeploymentError
from orchestrator.render.pods import loaded_cost, stage_budget
from orchestrator.targets import CPU, GPU, stage_targets

_BURST_MIN = 211  # Knative's default of target-burst-capacity


@dataclass(frozen=True, slots=True)
class Concurrency:
    """`target` and `limit` (containerConcurrency, 0: none) of one replica; `burst` is target-burst-capacity."""

    target: float
    limit: int
    burst: int
    arithmetic: tuple[str, ...]
    holds_a_lane: bool = True  # as far as anybody knows


def concurrency(what: Deployment) -> tuple[Concurrency, ...]:
    """For every stage. Raises DeploymentError, also for a plan that lacks figures."""
    count, asked = len(what.plan.stages), what.scaling
    if asked.target is not None and (asked.container_concurrency is not None or what.stage is None):
        limit = asked.container_concurrency or 0
        return (Concurrency(asked.target, limit, _burst(what, asked.target, limit), ("as asked for",)),) * count
    budgets = [stage_budget(what, index).kv_bytes_expected for index in range(count)]
    try:
        derived = stage_targets(tuple(_stages(what)), what.workload, GPU if what.gpu else CPU, budgets)
    except PlanError as error:
        raise DeploymentError(str(error)) from None
    found = []
    for index, one in enumerate(derived):
        target = one.target if asked.target is None else asked.target
        limit = max(one.container_concurrency, math.ceil(target) + 1)
        limit = limit if asked.container_concurrency is None else asked.container_concurrency
        if 0 < limit < target:
            raise DeploymentError(
                f"--container-concurrency {limit} is below the target of stage {index}, {target:g}: a replica would "
                "never have so many requests at once; raise the limit, or give a lower --target"
            )
        lines = one.arithmetic if asked.target is None else ("as asked for",)
        burst, holds = _burst(what, target, limit), _holds_a_lane(what, index, budgets[index])
        found.append(Concurrency(target, limit, burst, lines, holds))
    return tuple(found)


def _holds_a_lane(what: Deployment, index: int, kv_bytes: int | None) -> bool:
    cost = what.plan.stages[index].cost
    if cost is None or kv_bytes is None:
        return True
    tokens = what.workload.lane_width * what.workload.tokens_per_sequence
    return kv_bytes >= tokens * loaded_cost(what, cost).kv_bytes_per_token


def _stages(what: Deployment) -> Iterator[StageSpec]:
    """Those of the plan, with what they take where they will run."""
    for stage in what.plan.stages:
        yield stage if stage.cost is None else replace(stage, cost=loaded_cost(what, stage.cost))


def _burst(what: Deployment, target: float, limit: int) -> int:
    """More than Knative counts all replicas to take: without a hard limit, the target of each."""
    if what.scaling.target_burst_capacity is not None:
        return what.scaling.target_burst_capacity
    return max(_BURST_MIN, what.scaling.max_scale * (limit or math.ceil(target)) + 1)
