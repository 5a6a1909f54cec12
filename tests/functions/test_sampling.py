"""Choosing tokens: as Transformers does, evenly distributed, and independent of company."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from functions.contract.sampling import SamplingParams
from functions.sampling import Draw, adjusted, choose, filtered, uniform

VOCABULARY = 40
PROMPT = [3, 5, 5, 7]
ANSWER = [9, 9, 3]


def logits_of(seed: int, rows: int = 1, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def draw_of(position: int = 7, tokens: list[int] | None = None, **params: Any) -> Draw:
    return Draw(1, position, SamplingParams(**params), tokens or PROMPT + ANSWER, len(PROMPT))


def chosen(logits: torch.Tensor, **params: Any) -> int:
    return choose(logits, [draw_of(**params)])[0].token


# -- against Transformers


def of_transformers(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scores [vocabulary] as generate computes them, its processors in its order."""
    processors: list[Any] = []
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return LogitsProcessorList(processors)(torch.tensor([PROMPT + ANSWER]), logits)[0]


@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 1.5, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 10, VOCABULARY - 1, VOCABULARY, VOCABULARY + 5]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 10.0]),
)
@settings(max_examples=300, deadline=None)
def test_scores_are_those_of_transformers(seed: int, **values: Any) -> None:
    logits, draw = logits_of(seed), draw_of(**values)
    scores = filtered(adjusted(logits[0], draw), draw.params)
    torch.testing.assert_close(scores, of_transformers(logits, draw.params), rtol=1e-6, atol=1e-6)


def test_equal_logits_at_the_border_of_top_k_all_stay() -> None:
    """As in Transformers, which compares with the k-th score."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4] = 5.0
    params = SamplingParams(temperature=1.0, top_k=2)
    torch.testing.assert_close(filtered(logits[0], params), of_transformers(logits, params))


# -- greedy and extremes


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_the_largest_logit(seed: int) -> None:
    logits = logits_of(seed)
    likeliest = int(logits.argmax())
    assert chosen(logits) == likeliest
    assert chosen(logits, logprobs=0) == likeliest
    assert chosen(logits, logit_bias={0: 0.0}) == likeliest


SURE = [
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 100.0, "min_p": 1.0},
    {"temperature": 0.001},
    {"temperature": 1e-30},
    {"temperature": 1e-40},
    {"temperature": 1e-300},
    {"temperature": 5e-324},
]


@pytest.mark.parametrize("params", SURE, ids=str)
def test_extreme_settings_leave_only_the_likeliest(params: dict[str, Any]) -> None:
    logits = logits_of(1)
    assert {chosen(logits, seed=seed, **params) for seed in range(50)} == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_against_all_but_one_leaves_that_one(temperature: float) -> None:
    bias = {token: -100.0 for token in range(VOCABULARY) if token != 17}
    logits = logits_of(2)
    assert {chosen(logits, seed=s, temperature=temperature, logit_bias=bias) for s in range(20)} == {17}


def test_bias_for_a_token_outside_the_vocabulary_changes_nothing() -> None:
    logits = logits_of(3)
    assert chosen(logits, logit_bias={VOCABULARY: 100.0, 10**6: 100.0}) == int(logits.argmax())


def test_temperature_100_makes_every_token_possible() -> None:
    tokens = {chosen(logits_of(4), temperature=100.0, seed=seed) for seed in range(1000)}
    assert tokens == set(range(VOCABULARY))


def test_token_that_the_model_rules_out_is_never_chosen() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, [0, 8, VOCABULARY - 1]] = 0.0
    assert {chosen(logits, temperature=1.0, seed=seed) for seed in range(100)} == {0, 8, VOCABULARY - 1}


def test_half_precision_logits_give_the_choice_of_their_float32_values() -> None:
    logits = logits_of(5).bfloat16()
    for seed in range(20):
        assert chosen(logits, temperature=1.0, seed=seed) == chosen(logits.float(), temperature=1.0, seed=seed)


def test_logits_are_left_as_they_are() -> None:
    logits = logits_of(6)
    before = logits.clone()
    chosen(logits, temperature=0.5, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 5.0}, top_p=0.5)
    assert torch.equal(logits, before)


# -- randomness


def test_frequencies_follow_the_softmax() -> None:
    """Chi-square over 40 tokens; 39 degrees of freedom exceed 72.1 once in a thousand times."""
    logits, count = logits_of(7, scale=1.0), 20_000
    expected = logits[0].double().softmax(dim=-1).numpy() * count
    params = SamplingParams(temperature=1.0, seed=11)
    draws = [Draw(1, position, params, PROMPT, len(PROMPT)) for position in range(count)]
    found = Counter(s.token for s in choose(logits.expand(count, -1), draws))
    observed = np.array([found[token] for token in range(VOCABULARY)])
    assert float((((observed - expected) ** 2) / expected).sum()) < 72.1


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_uniform_is_evenly_distributed(vary: str) -> None:
    """Chi-square over 100 bins; 99 degrees of freedom exceed 149 once in a thousand times."""
    count = 50_000
    numbers = np.array([uniform(5, n) if vary == "position" else uniform(n, 5) for n in range(count)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    bins = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert float(((bins - count / 100) ** 2 / (count / 100)).sum()) < 149
    # neighbours have nothing to do with each other
    assert abs(float(np.corrcoef(numbers[:-1], numbers[1:])[0, 1])) < 0.02


def test_uniform_gives_these_numbers_on_every_machine() -> None:
    """A changed generator would change the text of every seed."""
    found = [uniform(0, 0), uniform(1, 0), uniform(0, 1), uniform(2**53 - 1, 2**31)]
    assert found == [0.6524484863740322, 0.36818951565166946, 0.03401170130434639, 0.36224517935486833]


def test_seed_and_position_are_no_sum() -> None:
    assert len({uniform(seed, 10 - seed) for seed in range(10)}) == 10


def test_choice_does_not_depend_on_company() -> None:
    logits = logits_of(8, rows=8)
    variety: list[dict[str, Any]] = [
        {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1}, {"logprobs": 3}, {"temperature": 1.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "frequency_penalty": 1.5},
    ]  # fmt: skip
    draws = [draw_of(seed=i, position=i + 3, **params) for i, params in enumerate(variety)]
    together = choose(logits, draws)
    assert together == tuple(choose(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws))
    assert together == tuple(reversed(choose(logits.flip(0), draws[::-1])))


# -- penalties and bias


def test_presence_and_frequency_count_only_the_answer() -> None:
    logits = logits_of(9)[0]
    scores = adjusted(logits, draw_of(presence_penalty=0.5, frequency_penalty=0.25))
    lowered = {9: 0.5 + 2 * 0.25, 3: 0.5 + 0.25}  # 3 stands in the prompt too, where it does not count
    expected = logits.clone()
    for token, amount in lowered.items():
        expected[token] -= amount
    torch.testing.assert_close(scores, expected)


def test_repetition_penalty_counts_the_prompt_too() -> None:
    logits = logits_of(10)[0]
    scores = adjusted(logits, draw_of(repetition_penalty=2.0))
    changed = {int(token) for token in (scores != logits).nonzero()}
    assert changed == set(PROMPT + ANSWER)
    assert all(scores[token] < logits[token] for token in changed)


def test_without_an_answer_presence_and_frequency_do_nothing() -> None:
    logits = logits_of(11)[0]
    assert torch.equal(adjusted(logits, draw_of(tokens=PROMPT, presence_penalty=2.0, frequency_penalty=2.0)), logits)


def test_bias_is_added() -> None:
    logits = logits_of(12)[0]
    scores = adjusted(logits, draw_of(logit_bias={4: 7.5, 6: -3.0}))
    assert (scores - logits)[[4, 6]].tolist() == pytest.approx([7.5, -3.0], abs=1e-5)


# -- log-probabilities


@pytest.mark.parametrize("params", [{}, {"temperature": 2.0, "top_k": 3, "repetition_penalty": 3.0}], ids=str)
def test_logprobs_are_those_of_the_model_likeliest_first(params: dict[str, Any]) -> None:
    logits = logits_of(13)
    sampled = choose(logits, [draw_of(logprobs=5, **params)])[0]
    expected = logits[0].log_softmax(dim=-1)
    assert sampled.logprob == pytest.approx(float(expected[sampled.token]), abs=1e-6)
    assert [token for token, _ in sampled.top] == expected.argsort(descending=True)[:5].tolist()
    assert [value for _, value in sampled.top] == pytest.approx(expected.sort(descending=True).values[:5].tolist())


def test_logprobs_0_reports_only_the_chosen_token() -> None:
    sampled = choose(logits_of(14), [draw_of(logprobs=0)])[0]
    assert sampled.top == ()
    assert sampled.logprob is not None


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    sampled = choose(torch.randn(1, 6, generator=torch.Generator().manual_seed(0)), [
        Draw(1, 1, SamplingParams(logprobs=20), [1], 1)
    ])[0]  # fmt: skip
    assert sorted(token for token, _ in sampled.top) == list(range(6))


def test_no_logprobs_unless_asked_for() -> None:
    sampled = choose(logits_of(15), [draw_of(temperature=1.0)])[0]
    assert (sampled.logprob, sampled.top) == (None, ())
