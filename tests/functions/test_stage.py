"""One stage, or several in a row, in this process: positions, repeats, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from functions.contract.errors import InvalidEvent, KvExhausted, PromptTooLong, StageError, WrongPosition
from functions.contract.frames import Frame
from functions.contract.messages import Opening, Samples, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.runner import PackedRunner
from functions.stage import Stage

PROMPT = [10, 200, 30, 40, 250, 60, 7]
StageOf = Callable[..., Stage]
StepOf = Callable[..., Step]


def hidden_of(step: Step | Samples) -> np.ndarray[Any, Any]:
    assert isinstance(step, Step)
    assert step.hidden is not None
    return step.hidden.numpy()


def tokens_of(answer: Step | Samples) -> list[int]:
    assert isinstance(answer, Samples)
    return [item.token for item in answer.items]


def through(stages: Sequence[Stage], step: Step) -> Samples:
    answer: Step | Samples = step
    for stage in stages:
        assert isinstance(answer, Step)
        answer = stage.step(answer)
    assert isinstance(answer, Samples)
    return answer


def generate(stages: Sequence[Stage], step_of: StepOf, count: int, **params: Any) -> list[int]:
    """`count` tokens of sequence 1 after the prompt, one step each."""
    made, chosen = [], PROMPT
    position = 0
    for _ in range(count):
        answer = through(stages, step_of((1, position, chosen), params=SamplingParams(**params)))
        position += len(chosen)
        chosen = tokens_of(answer)
        made += chosen
    return made


# -- the same as the whole model


@pytest.mark.parametrize("spans", [("0:4",), ("0:2", "2:4"), ("0:1", "1:3", "3:4"), ("0:1", "1:2", "2:3", "3:4")])
def test_any_cut_generates_what_transformers_generates(
    stage_of: StageOf, step_of: StepOf, reference: Any, spans: tuple[str, ...]
) -> None:
    assert generate([stage_of(span) for span in spans], step_of, 20) == reference(PROMPT, 20)


@pytest.mark.parametrize("spans", [("0:2", "2:4"), ("0:1", "1:3", "3:4")])
def test_sampled_tokens_are_the_same_for_any_cut(stage_of: StageOf, step_of: StepOf, spans: tuple[str, ...]) -> None:
    params = {"temperature": 1.5, "top_p": 0.95, "seed": 3, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    whole = generate([stage_of()], step_of, 30, **params)
    assert generate([stage_of(span) for span in spans], step_of, 30, **params) == whole
    assert generate([stage_of()], step_of, 30, **{**params, "seed": 4}) != whole


def test_sequences_together_answer_as_alone(stage_of: StageOf, step_of: StepOf, reference: Any) -> None:
    prompts = {1: PROMPT, 2: [5], 3: list(range(40)), 4: [9, 9]}
    stage = stage_of()
    answer = stage.step(step_of(*((s, 0, tokens) for s, tokens in prompts.items())))
    assert tokens_of(answer) == [reference(tokens, 1)[0] for tokens in prompts.values()]
    again = stage.step(step_of(*((s, len(prompts[s]), [t]) for s, t in zip(prompts, tokens_of(answer), strict=True))))
    assert tokens_of(again) == [reference(tokens, 2)[1] for tokens in prompts.values()]


def test_prefill_and_decode_share_a_step(stage_of: StageOf, step_of: StepOf, reference: Any) -> None:
    stage = stage_of()
    first = tokens_of(stage.step(step_of((1, 0, PROMPT))))
    answer = stage.step(step_of((1, len(PROMPT), first), (2, 0, [1, 2, 3])))
    assert tokens_of(answer) == [reference(PROMPT, 2)[1], reference([1, 2, 3], 1)[0]]


@pytest.mark.parametrize("chunks", [(1,) * 7, (3, 4), (6, 1), (2, 2, 3)], ids=str)
def test_prefill_in_chunks_equals_the_whole(stage_of: StageOf, step_of: StepOf, chunks: tuple[int, ...]) -> None:
    first, last = stage_of("0:2"), stage_of("2:4")
    whole = hidden_of(first.step(step_of((1, 0, PROMPT))))
    expected = through([stage_of()], step_of((1, 0, PROMPT), params=SamplingParams(logprobs=3)))
    rows, at = [], 0
    for length in chunks:
        step = step_of((2, at, PROMPT[at : at + length]), params=SamplingParams(logprobs=3), sample=False)
        at += length
        if at == len(PROMPT):
            slices = tuple(Slice(s.sequence, s.start, s.length, True) for s in step.slices)
            step = Step(slices, step.tokens, None, step.openings)
        relayed = first.step(step)
        assert isinstance(relayed, Step)
        rows.append(hidden_of(relayed))
        answer = last.step(relayed)
    np.testing.assert_allclose(np.concatenate(rows), whole, rtol=0, atol=1e-5)
    assert tokens_of(answer) == tokens_of(expected)
    assert isinstance(answer, Samples)
    assert answer.items[0].logprob == pytest.approx(expected.items[0].logprob, abs=1e-5)


def test_only_slices_that_ask_are_sampled(stage_of: StageOf, reference: Any) -> None:
    opening = Opening(SamplingParams(), 2)
    slices = (Slice(1, 0, 2, False), Slice(2, 0, 1, True), Slice(3, 0, 1, False))
    tokens = np.array([1, 2, 3, 4], dtype=np.int32)
    answer = stage_of().step(Step(slices, tokens, None, dict.fromkeys((1, 2, 3), opening)))
    assert isinstance(answer, Samples)
    assert [(item.sequence, item.position) for item in answer.items] == [(2, 1)]
    assert tokens_of(answer) == reference([3], 1)


def test_step_that_asks_for_no_sample_answers_none(stage_of: StageOf, step_of: StepOf, reference: Any) -> None:
    stage = stage_of()
    assert stage.step(step_of((1, 0, PROMPT[:-1]), sample=False)) == Samples(())
    assert tokens_of(stage.step(step_of((1, len(PROMPT) - 1, PROMPT[-1:])))) == reference(PROMPT, 1)


def test_stage_passes_on_slices_tokens_and_openings(stage_of: StageOf, step_of: StepOf) -> None:
    step = step_of((1, 0, PROMPT), params=SamplingParams(seed=5))
    relayed = stage_of("0:2").step(step)
    assert isinstance(relayed, Step)
    assert (relayed.slices, relayed.openings) == (step.slices, step.openings)
    assert relayed.tokens.tolist() == PROMPT
    assert hidden_of(relayed).shape == (len(PROMPT), 16)


# -- repeats, rewinding, gaps


@pytest.mark.parametrize("span", ["0:2", "0:4"])
def test_repeated_step_gives_the_identical_answer(stage_of: StageOf, step_of: StepOf, span: str) -> None:
    stage = stage_of(span)
    params = SamplingParams(temperature=1.0, seed=8, logprobs=2)
    for step in (step_of((1, 0, PROMPT), params=params), step_of((1, len(PROMPT), [77]))):
        first, again = (b"".join(stage.step(step).to_body()) for _ in range(2))
        assert first == again
    assert stage.kv.position(1) == len(PROMPT) + 1


@pytest.mark.parametrize("back", [0, 1, 7, 9])
def test_going_back_and_on_equals_a_straight_run(stage_of: StageOf, step_of: StepOf, reference: Any, back: int) -> None:
    stages = [stage_of("0:2"), stage_of("2:4")]
    text = PROMPT + generate(stages, step_of, 6)
    through(stages, step_of((1, len(PROMPT), [99, 98])))  # another history behind the prompt
    for start in range(back, len(text), 4):
        answer = through(stages, step_of((1, start, text[start : start + 4])))
    assert text[len(PROMPT) :] == reference(PROMPT, 6)
    assert tokens_of(answer) == [reference(PROMPT, 7)[6]]
    through(stages, step_of((1, 3, [99, 98])))
    assert {stage.kv.position(1) for stage in stages} == {5}


def test_penalties_count_what_was_kept_after_going_back(stage_of: StageOf, step_of: StepOf) -> None:
    params = {"temperature": 1.0, "seed": 2, "frequency_penalty": 2.0, "repetition_penalty": 1.5}
    straight = generate([stage_of()], step_of, 12, **params)
    stage = stage_of()
    text = PROMPT + straight
    generate([stage], step_of, 12, **params)
    start = len(PROMPT) + 4
    assert tokens_of(stage.step(step_of((1, start, text[start : start + 1])))) == [straight[5]]


@pytest.mark.parametrize(("held", "start"), [(0, 1), (0, 50), (7, 8)])
def test_gap_names_the_position(stage_of: StageOf, step_of: StepOf, held: int, start: int) -> None:
    stage = stage_of()
    if held:
        stage.step(step_of((1, 0, PROMPT[:held])))
    with pytest.raises(WrongPosition, match=f"has {held} tokens") as caught:
        stage.step(step_of((1, start, [1])))
    assert caught.value.positions == {1: held}
    assert stage.kv.position(1) == held


def test_released_sequence_is_unknown_again(stage_of: StageOf, step_of: StepOf) -> None:
    stage = stage_of()
    stage.step(step_of((1, 0, PROMPT)))
    assert stage.kv.release([1, 2]) == [1]
    assert stage.kv.bytes_used == 0
    with pytest.raises(WrongPosition) as caught:
        stage.step(step_of((1, len(PROMPT), [1])))
    assert caught.value.positions == {1: 0}


# -- refusals change nothing


def raw_hidden(rows: int, width: int = 16, dtype: str = "F32", item_bytes: int = 4) -> Frame:
    return Frame(dtype, (rows, width), bytearray(rows * width * item_bytes))


REFUSED: dict[str, tuple[str, type[StageError], Callable[[StepOf], Step]]] = {
    "gap in the second of two": ("0:4", WrongPosition, lambda s: s((1, 7, [1]), (2, 5, [1]))),
    "going back in one, gap in another": ("0:4", WrongPosition, lambda s: s((1, 2, [1]), (2, 5, [1]))),
    "one too long": ("0:4", PromptTooLong, lambda s: s((1, 7, [1]), (2, 0, [1] * 257))),
    "grown too long": ("0:4", PromptTooLong, lambda s: s((1, 7, [1] * 250))),
    "token past the vocabulary": ("0:4", InvalidEvent, lambda s: s((1, 7, [257]))),
    "token far past the vocabulary": ("0:4", InvalidEvent, lambda s: s((1, 7, [2**31 - 1]))),
    "negative token": ("0:4", InvalidEvent, lambda s: s((1, 7, [-1]))),
    "hidden states at the first stage": ("0:4", InvalidEvent, lambda s: s((1, 7, [1]), hidden=raw_hidden(1))),
    "no hidden states at the last": ("2:4", InvalidEvent, lambda s: s((1, 7, [1]))),
    "hidden states too wide": ("2:4", InvalidEvent, lambda s: s((1, 7, [1]), hidden=raw_hidden(1, 17))),
    "hidden states of no width": ("2:4", InvalidEvent, lambda s: s((1, 7, [1]), hidden=raw_hidden(1, 0))),
    "hidden states in bfloat16": ("2:4", InvalidEvent, lambda s: s((1, 7, [1]), hidden=raw_hidden(1, 16, "BF16", 2))),
    "hidden states of integers": ("2:4", InvalidEvent, lambda s: s((1, 7, [1]), hidden=raw_hidden(1, 16, "I32", 4))),
    "more than the KV budget": ("0:4", KvExhausted, lambda s: s((1, 3, [1]), (2, 0, [1] * 200))),
}


@pytest.mark.parametrize(("span", "kind", "build"), REFUSED.values(), ids=REFUSED)
def test_refused_step_changes_nothing(
    stage_of: StageOf, step_of: StepOf, span: str, kind: type[StageError], build: Callable[[StepOf], Step]
) -> None:
    bytes_per_token = stage_of(span).kv.bytes_per_token
    stage = stage_of(span, 150 * bytes_per_token)

    def feed(start: int, tokens: list[int]) -> bytes:
        hidden = None if span == "0:4" else raw_hidden(len(tokens))
        return b"".join(stage.step(step_of((1, start, tokens), hidden=hidden)).to_body())

    feed(0, PROMPT)
    expected = feed(7, [50])
    feed(0, PROMPT)
    before = (len(stage.kv), stage.kv.bytes_used, stage.kv.position(1))
    with pytest.raises(kind, match=r"\w+ \w+"):
        stage.step(build(step_of))
    assert (len(stage.kv), stage.kv.bytes_used, stage.kv.position(1)) == before
    assert feed(7, [50]) == expected


def test_full_budget_lets_others_go_on_and_heals_by_release(stage_of: StageOf, step_of: StepOf, reference: Any) -> None:
    stage = stage_of("0:4", 60 * stage_of().kv.bytes_per_token)
    first = tokens_of(stage.step(step_of((1, 0, PROMPT))))
    stage.step(step_of((2, 0, [1] * 30)))
    with pytest.raises(KvExhausted):
        stage.step(step_of((3, 0, [1] * 30)))
    assert tokens_of(stage.step(step_of((1, len(PROMPT), first)))) == [reference(PROMPT, 2)[1]]
    stage.kv.release([2])
    assert tokens_of(stage.step(step_of((3, 0, [1] * 30)))) == reference([1] * 30, 1)


def test_longest_sequence_is_taken(stage_of: StageOf, step_of: StepOf, reference: Any) -> None:
    prompt = [(7 * i) % 250 for i in range(256)]
    assert tokens_of(stage_of().step(step_of((1, 0, prompt)))) == reference(prompt, 1)


# -- a computation that fails


class FailsOnce(PackedRunner):
    """Computes as ever, but the next pass after `fail` is set breaks off behind the first blocks."""

    fail = False

    def run(self, *args: Any) -> torch.Tensor:
        result = super().run(*args)
        if self.fail:
            self.fail = False
            raise RuntimeError("out of luck")
        return result


@pytest.fixture
def failing(stage_of: StageOf) -> Stage:
    runner = FailsOnce(stage_of().model)
    stage = Stage(runner, 1 << 20)
    stage.step(Step((Slice(1, 0, 7),), np.array(PROMPT, dtype=np.int32), None, {1: Opening(SamplingParams(), 7)}))
    runner.fail = True
    return stage


def test_failed_computation_leaves_positions_as_they_were(failing: Stage, step_of: StepOf, reference: Any) -> None:
    decode = step_of((1, 7, reference(PROMPT, 1)), (2, 0, [4, 5]))
    with pytest.raises(RuntimeError):
        failing.step(decode)
    assert (failing.kv.position(1), failing.kv.position(2)) == (7, 0)
    assert tokens_of(failing.step(decode)) == [reference(PROMPT, 2)[1], reference([4, 5], 1)[0]]


def test_computation_that_fails_while_going_back_stands_at_its_start(
    failing: Stage, step_of: StepOf, reference: Any
) -> None:
    """What lies behind the start may have been overwritten, so it no longer counts."""
    with pytest.raises(RuntimeError):
        failing.step(step_of((1, 4, [9, 9])))
    assert failing.kv.position(1) == 4
    assert tokens_of(failing.step(step_of((1, 4, PROMPT[4:])))) == reference(PROMPT, 1)
