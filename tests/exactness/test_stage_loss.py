"""Replicas are lost while others are ready: the text stays the same, and only the lost stage computes again.

Each of three stages has two replicas behind a service, see `Replicas` in conftest.py.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from functions.contract.sampling import SamplingParams
from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationRequest

THIRDS = ["0:1", "1:3", "3:4"]
NEW_TOKENS = 16
SAMPLED = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=5)
PATIENT = ChainSettings(hang_floor_s=100.0)  # on a busy machine no step is sent twice, and tokens can be counted


@pytest.fixture
async def replicas(start_replicas: Any) -> Any:
    return await start_replicas("llama", THIRDS)


def of_chain(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"stagecraft_{name}", labels) or 0.0


def refilled() -> list[float]:
    return [of_chain("refill_tokens_total", stage=str(stage)) for stage in range(len(THIRDS))]


async def texts(
    chain: Chain, prompts: Sequence[Sequence[int]], at_fifth: Callable[[], None] | None = None, *, sampled: bool = False
) -> Any:
    """Every other one is sampled, or all; the others are greedy. `at_fifth` is called when the first of them has its
    fifth token."""
    called = []

    async def one(index: int, prompt: Sequence[int]) -> list[int]:
        tokens = []
        params = SAMPLED if sampled or index % 2 else SamplingParams()
        async for token in chain.generate(GenerationRequest(tuple(prompt), NEW_TOKENS, params)):
            tokens.append(token.id)
            if len(tokens) == 5 and at_fifth is not None and not called:
                called.append(index)
                at_fifth()
        return tokens

    return await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))


_expected: list[Any] = []


@pytest.fixture
async def expected(start_stages: Any, open_chain: Any, prompts: Any, whole_model: Any) -> Any:
    """Texts of an undisturbed chain, computed once; the greedy ones are those of Transformers."""
    if not _expected:
        chain = await open_chain(start_stages("llama", THIRDS), PATIENT)
        _expected.extend(await texts(chain, prompts))
        assert _expected[::2] == [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts[::2]]
    return _expected


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_replica_killed_in_decode_is_replaced_and_no_other_stage_computes_again(
    lost: int, replicas: Any, open_chain: Any, prompts: Any, expected: Any
) -> None:
    chain = await open_chain(replicas, PATIENT)
    before, replays = refilled(), of_chain("replays_total")
    assert await texts(chain, prompts, lambda: replicas.lose(lost)) == expected
    again = [now - then for now, then in zip(refilled(), before, strict=True)]
    assert again[lost] > 0
    assert sum(again) == again[lost]
    assert of_chain("replays_total") == replays
    once = sum(len(prompt) + NEW_TOKENS - 1 for prompt in prompts)
    others = [stage for stage in range(len(THIRDS)) if stage != lost]
    computed = await replicas.tokens(others)
    assert computed == [once] * len(others), "the stages' own counts"


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_replica_killed_in_prefill_is_replaced_and_no_other_stage_computes_again(
    lost: int, replicas: Any, open_chain: Any, prompts: Any, expected: Any
) -> None:
    """After the first chunk of a prompt, with the next ones on their way."""
    chain = await open_chain(replicas, replace(PATIENT, step_tokens_max=8))
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    before = refilled()
    replicas.services[lost].answered = lambda steps: replicas.lose(lost) if steps == 1 else None
    assert await texts(chain, [prompts[longest]], sampled=bool(longest % 2)) == [expected[longest]]
    again = [now - then for now, then in zip(refilled(), before, strict=True)]
    assert again[lost] >= 8
    assert sum(again) == again[lost]


async def test_two_stages_killed_at_once_are_replaced_and_the_third_computes_nothing_again(
    replicas: Any, open_chain: Any, prompts: Any, expected: Any
) -> None:
    chain = await open_chain(replicas, PATIENT)
    before = refilled()

    def lose_both() -> None:
        replicas.lose(1)
        replicas.lose(2)

    assert await texts(chain, prompts, lose_both) == expected
    again = [now - then for now, then in zip(refilled(), before, strict=True)]
    assert again[0] == 0
    assert min(again[1:]) > 0


async def test_a_replacement_that_is_killed_while_it_is_filled_is_replaced_too(
    replicas: Any, start_stages: Any, open_chain: Any, prompts: Any, expected: Any
) -> None:
    third = start_stages("llama", THIRDS)
    service = replicas.services[1]
    service.replicas.append(third.urls[1])
    chain = await open_chain(replicas, PATIENT)

    def lose_first() -> None:
        replicas.lose(1)
        so_far = service.steps
        service.answered = lambda steps: replicas.lose(1, which=1) if steps == so_far + 1 else None

    before = refilled()
    assert await texts(chain, prompts, lose_first) == expected
    assert replicas.sets[1].processes[1].returncode == -signal.SIGKILL
    again = [now - then for now, then in zip(refilled(), before, strict=True)]
    assert sum(again) == again[1] > 0


# a step may take longer than these tests: that a replica hangs is known by what steps took before
WAKEFUL = ChainSettings(step_timeout_s=1e6, hang_floor_s=0.5, release_timeout_s=0.5, idle_before_wake_s=1e6)


async def test_a_replica_that_hangs_is_found_by_the_time_that_steps_took_before(
    replicas: Any, open_chain: Any, prompts: Any, expected: Any
) -> None:
    """The service knows nothing of it and leads back there every other time."""
    chain = await open_chain(replicas, WAKEFUL)
    before = of_chain("hangs_total", stage="1")

    def stop() -> None:
        replicas.services[1].in_turn = True
        replicas.stop(1)

    try:
        assert await texts(chain, prompts, stop) == expected
    finally:
        replicas.go_on(1)
    assert of_chain("hangs_total", stage="1") > before


async def test_a_service_that_hands_the_first_step_to_a_replica_that_hangs_is_asked_again(
    replicas: Any, open_chain: Any, prompts: Any, expected: Any
) -> None:
    chain = await open_chain(replicas, WAKEFUL)
    assert await texts(chain, prompts[:2]) == expected[:2]
    replicas.services[1].in_turn = True
    hung = replicas.sets[0].urls[1]
    before = replicas.services[1].asked[hung]
    replicas.stop(1)
    try:
        assert await texts(chain, prompts[:2]) == expected[:2]
    finally:
        replicas.go_on(1)
    assert replicas.services[1].asked[hung] > before


@pytest.mark.parametrize("bytes_max", [0, 20_000])
async def test_what_the_journal_has_no_room_for_is_replayed_through_all_stages(
    bytes_max: int, replicas: Any, open_chain: Any, prompts: Any, expected: Any
) -> None:
    chain = await open_chain(replicas, replace(PATIENT, journal_bytes_max=bytes_max))
    before = of_chain("replays_total")
    assert await texts(chain, prompts, lambda: replicas.lose(1)) == expected
    assert of_chain("replays_total") > before
    assert of_chain("journal_bytes") <= bytes_max


async def test_the_journal_is_empty_once_all_have_left(replicas: Any, open_chain: Any, prompts: Any) -> None:
    chain = await open_chain(replicas, PATIENT)
    seen: list[float] = []
    await texts(chain, prompts, lambda: seen.append(of_chain("journal_bytes")))
    assert seen[0] > 0
    while chain._lanes:  # noqa: ASYNC110 (another task's doing)
        await asyncio.sleep(0.01)
    assert of_chain("journal_bytes") == 0
