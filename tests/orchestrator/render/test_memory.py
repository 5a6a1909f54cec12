"""What a stage's replica is given: enough for what it loads there, in the type that it loads there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.cost import Cost
from orchestrator.render.concurrency import concurrency
from orchestrator.render.deployment import Deployment, Gpu
from orchestrator.render.pods import stage_budget, stage_environment, stage_pod

Make = Callable[..., Deployment]

MILLION = 1_000_000
GIB = 1 << 30
LANE_TOKENS = 64 * 1024  # of the usual workload: a lane's sequences, each with a prompt and an answer
RUNTIME_BYTES = 3 * GIB // 2
KV = 1000  # bytes of a token, in two bytes a number
HALVES = Cost(1000 * MILLION, 2000 * MILLION, KV, 1)
SINGLES = Cost(1000 * MILLION, 4000 * MILLION, 2 * KV, 1)


def with_cost(what: Deployment, cost: Cost, dtype: str = "auto") -> Deployment:
    stages = tuple(replace(one, cost=cost) for one in what.plan.stages)
    return replace(what, plan=replace(what.plan, stages=stages, dtype=dtype))


@pytest.mark.parametrize(
    ("cost", "dtype", "weight_bytes", "token_bytes"),
    [
        (HALVES, "auto", 4000 * MILLION, 2 * KV),
        (SINGLES, "auto", 4000 * MILLION, 2 * KV),
        (SINGLES, "float32", 4000 * MILLION, 2 * KV),
        (HALVES, "bfloat16", 2000 * MILLION, KV),
        (replace(HALVES, parameters=0), "auto", 4000 * MILLION, 2 * KV),
    ],
    ids=["halves", "singles", "float32", "bfloat16", "unknown-parameters"],
)
def test_on_a_cpu_weights_and_caches_are_counted_in_the_type_that_is_computed_in(
    deployment: Make, cost: Cost, dtype: str, weight_bytes: int, token_bytes: int
) -> None:
    budget = stage_budget(with_cost(deployment(), cost, dtype), 0)
    two_lanes = 2 * LANE_TOKENS * token_bytes
    assert budget.kv_bytes_max == two_lanes
    assert budget.memory_bytes is not None
    needed = weight_bytes + two_lanes + RUNTIME_BYTES
    assert needed <= budget.memory_bytes < needed + (256 << 20)


def test_int8_weights_stay_what_they_are_on_a_cpu_and_all_else_becomes_float32(deployment: Make) -> None:
    """1000 million parameters, of which 900 million are int8 and the rest halves."""
    what = with_cost(deployment(), replace(HALVES, weight_bytes=1100 * MILLION))
    what = replace(what, plan=replace(what.plan, quantize="int8"))
    two_lanes = 2 * LANE_TOKENS * 2 * KV
    budget = stage_budget(what, 0)
    assert budget.memory_bytes is not None
    needed = (900 + 4 * 100) * MILLION + two_lanes + RUNTIME_BYTES
    assert needed <= budget.memory_bytes < needed + (256 << 20)
    assert stage_environment(what, 0, budget)["STAGE_QUANTIZE"] == "int8"
    assert "STAGE_QUANTIZE" not in stage_environment(deployment(), 0, budget)


def test_the_caches_of_a_cpu_hold_as_many_lanes_as_its_comment_says(deployment: Make) -> None:
    """Halves in the checkpoint, float32 in the process: 3 lanes of halves are one and a half."""
    what = replace(with_cost(deployment(), HALVES), kv_bytes_max=3 * LANE_TOKENS * KV)
    assert any("holds 1 lane of" in line for line in concurrency(what)[0].arithmetic)
    assert any("holds 3 lanes of" in line for line in concurrency(replace(what, gpu=Gpu()))[0].arithmetic)


def environment(what: Deployment, index: int) -> dict[str, Any]:
    return {one["name"]: one["value"] for one in stage_pod(what, index).container["env"].value}


@pytest.mark.parametrize("shared_by", [2, 4])
def test_stages_that_share_a_device_fit_on_it_whichever_comes_first(deployment: Make, shared_by: int) -> None:
    """The first one would find free what the others' weights need, so a share of that is too much."""
    what = with_cost(deployment(gpu=Gpu(shared_by=shared_by, memory_bytes=16 * GIB)), HALVES)
    found = environment(what, 0)
    assert "STAGE_KV_SHARE" not in found
    assert shared_by * (HALVES.weight_bytes + int(found["STAGE_KV_BYTES_MAX"])) < 16 * GIB


def test_stages_that_share_a_device_of_unknown_size_take_a_share(deployment: Make) -> None:
    found = environment(with_cost(deployment(gpu=Gpu(shared_by=4)), HALVES), 0)
    assert (found["STAGE_KV_SHARE"], "STAGE_KV_BYTES_MAX" in found) == ("0.250000", False)


def test_the_host_has_room_for_tensors_on_their_way_to_the_device(deployment: Make) -> None:
    """Half of Llama 3 8B: four tensors are read at a time, and its embedding alone has 1 GiB."""
    embedding, others = 128_256 * 4096 * 2, 3 * 4096 * 14_336 * 2
    budget = stage_budget(with_cost(deployment(gpu=Gpu()), Cost(4000 * MILLION, 8000 * MILLION, KV, 1)), 0)
    assert budget.memory_bytes is not None
    assert budget.memory_bytes - embedding - others > 3 * GIB
