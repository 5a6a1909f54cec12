"""Hostile inputs at every door, as few as a test may have; `make fuzz` gives millions (docs/fuzzing.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.fuzzing.catalogue import DOORS
from tools.fuzzing.door import Door
from tools.fuzzing.http_text import Request

# how many of each; those that load or compute something get fewer. Not here: stage-loading, half a second an input
EXAMPLES = {
    "stage-events": 150, "stage-replies": 150, "public": 60, "grpc": 60, "proxies": 150, "results": 60,
    "broker-events": 300, "filters": 300, "batch-lines": 300, "plans": 60, "manifests": 60, "settings": 60,
    "checkpoints": 30,
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_input_breaks_the_door(door_of: Callable[[str], Door], name: str) -> None:
    door = door_of(name)
    verdicts: Counter[str] = Counter()

    # an input comes from a Random that Hypothesis steers, so that it can be made smaller when it breaks something
    @settings(
        derandomize=True,
        database=None,
        max_examples=EXAMPLES[name],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(st.randoms(use_true_random=False))
    def run(random: Random) -> None:
        verdicts[door.take(door.make(random))] += 1

    run()
    door.check()
    assert verdicts["refused"], "the inputs are hostile, so a door must refuse some"


def test_every_door_is_tested() -> None:
    assert set(DOORS) - set(EXAMPLES) == {"stage-loading"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_seed_makes_the_same_inputs(door_of: Callable[[str], Door], name: str) -> None:
    door = door_of(name)
    first, again, other = (door.make(Random(f"{seed}/x")) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_request_is_kept_as_the_bytes_of_http() -> None:
    request = Request("POST", "/a?b=c", (("content-type", "text/plain"), ("x-a", "é")), b"\r\n\r\n\x00")
    data = request.to_bytes()
    head = b"POST /a?b=c HTTP/1.1\r\ncontent-type: text/plain\r\nx-a: \xe9\r\ncontent-length: 5\r\n\r\n"
    assert data == head + request.body
    again = Request.from_bytes(data)
    assert (again.method, again.target, again.body) == (request.method, request.target, request.body)
    assert again.headers == (*request.headers, ("content-length", "5"))
