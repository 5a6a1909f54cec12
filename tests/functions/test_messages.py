"""Messages of the contract: what is built is valid, and survives the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract import errors
from functions.contract.errors import InvalidEvent, StageError, StageFailure, WrongPosition, from_json
from functions.contract.frames import Frame, Frames, pack
from functions.contract.messages import (
    Opening,
    Sampled,
    Samples,
    Slice,
    StageInfo,
    Step,
    decode_release,
    encode_release,
)
from functions.contract.sampling import SEED_BOUND, SamplingParams

ids = st.integers(1, 2**53 - 1)
finite = {"allow_nan": False, "allow_infinity": False}
float32s = st.floats(width=32, max_value=0, **finite)  # type: ignore[arg-type]
sampling_params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=3),
    seed=st.integers(0, SEED_BOUND - 1),
    logprobs=st.none() | st.integers(0, 20),
)
openings = st.builds(Opening, sampling_params, st.integers(1, 2**31 - 1))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    sequences = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    slices = tuple(
        Slice(s, draw(st.integers(0, 1000)), draw(st.integers(1, 5)), draw(st.booleans())) for s in sequences
    )
    total = sum(s.length for s in slices)
    tokens = np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=total, max_size=total)), dtype=np.int32)
    width = draw(st.integers(1, 4))
    hidden = Frame("BF16", (total, width), draw(st.binary(min_size=2 * total * width, max_size=2 * total * width)))
    opened = {s.sequence: draw(openings) for s in slices if s.start == 0}
    return Step(slices, tokens, draw(st.sampled_from([None, hidden])), opened)


@st.composite
def sampled(draw: st.DrawFn) -> Sampled:
    tokens = st.integers(0, 2**31 - 1)
    top = tuple(draw(st.lists(st.tuples(tokens, float32s), max_size=3)))
    return Sampled(draw(ids), draw(st.integers(1, 2**31)), draw(tokens), draw(st.none() | float32s), top)


@given(steps())
def test_step_survives_the_wire(step: Step) -> None:
    read = Step.from_body(b"".join(step.to_body()))
    assert (read.slices, read.openings) == (step.slices, step.openings)
    assert read.tokens.tolist() == step.tokens.tolist()
    assert (read.hidden is None) == (step.hidden is None)
    if read.hidden is not None and step.hidden is not None:
        assert (read.hidden.dtype, read.hidden.shape) == (step.hidden.dtype, step.hidden.shape)
        assert bytes(read.hidden.data) == bytes(step.hidden.data)


@given(st.lists(sampled(), max_size=4))
def test_samples_survive_the_wire(items: list[Sampled]) -> None:
    samples = Samples(tuple(items))
    assert Samples.from_body(b"".join(samples.to_body())) == samples


@given(sampling_params)
def test_sampling_params_survive_json(params: SamplingParams) -> None:
    text = json.dumps(params.to_json())
    assert SamplingParams.from_json(json.loads(text)) == params


def test_defaults_take_no_room_in_json() -> None:
    assert SamplingParams().to_json() == {}


@given(st.lists(ids, max_size=5))
def test_release_survives_the_wire(sequences: list[int]) -> None:
    assert decode_release(encode_release(sequences)) == tuple(sequences)


# -- what cannot be built

ONE = Slice(1, 0, 2)
LATER = Slice(2, 5, 1)
OPEN = {1: Opening(SamplingParams(), 2)}


def tokens(count: int) -> Any:
    return np.zeros(count, dtype=np.int32)


def hidden(*shape: int) -> Frame:
    return Frame.of(np.zeros(shape, dtype=np.float32))


BAD_STEPS: dict[str, Callable[[], Step]] = {
    "no slice": lambda: Step((), tokens(0)),
    "a sequence twice": lambda: Step((ONE, Slice(1, 2, 1)), tokens(3), None, OPEN),
    "too few tokens": lambda: Step((ONE,), tokens(1), None, OPEN),
    "too many tokens": lambda: Step((ONE,), tokens(3), None, OPEN),
    "tokens of two dimensions": lambda: Step((ONE,), tokens(2).reshape(2, 1), None, OPEN),
    "hidden of fewer rows": lambda: Step((ONE,), tokens(2), hidden(1, 4), OPEN),
    "hidden of one dimension": lambda: Step((ONE,), tokens(2), hidden(2), OPEN),
    "hidden of three dimensions": lambda: Step((ONE,), tokens(2), hidden(2, 1, 4), OPEN),
    "an opening missing": lambda: Step((ONE,), tokens(2)),
    "an opening of nobody": lambda: Step((ONE,), tokens(2), None, {**OPEN, 9: OPEN[1]}),
}


@pytest.mark.parametrize("build", BAD_STEPS.values(), ids=BAD_STEPS)
def test_invalid_step_cannot_be_built(build: Callable[[], Step]) -> None:
    with pytest.raises(InvalidEvent, match=r"."):
        build()


def test_opening_of_a_slice_that_continues_is_refused() -> None:
    """Openings are for exactly the sequences whose slice starts at 0."""
    with pytest.raises(InvalidEvent, match="openings"):
        Step((LATER,), tokens(1), None, {2: OPEN[1]})


BAD_SLICES = {
    "sequence 0": (0, 0, 1),
    "negative sequence": (-1, 0, 1),
    "sequence of 2^53": (2**53, 0, 1),
    "negative start": (1, -1, 1),
    "no length": (1, 0, 0),
    "negative length": (1, 5, -1),
    "past 2^31": (1, 2**31, 1),
    "ends past 2^31": (1, 2**31 - 1, 2),
}


@pytest.mark.parametrize("fields", BAD_SLICES.values(), ids=BAD_SLICES)
def test_invalid_slice_cannot_be_built(fields: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidEvent, match=r"sequence"):
        Slice(*fields)


BAD_PARAMS: list[dict[str, Any]] = [
    {"temperature": -0.1}, {"temperature": 100.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
    {"temperature": "1"}, {"temperature": None}, {"temperature": True}, {"temperature": 10**400},
    {"top_k": -1}, {"top_k": 1.5}, {"top_k": 2**31 + 1},
    {"top_p": 0.0}, {"top_p": 1.01}, {"min_p": -0.1}, {"min_p": 1.1},
    {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0},
    {"presence_penalty": 2.1}, {"presence_penalty": -2.1}, {"frequency_penalty": 2.1}, {"frequency_penalty": -2.1},
    {"seed": -1}, {"seed": 2**53}, {"seed": 0.5}, {"seed": 10**400},
    {"logprobs": -1}, {"logprobs": 21}, {"logprobs": True},
    {"logit_bias": {-1: 0.0}}, {"logit_bias": {1: 101.0}}, {"logit_bias": {1: "x"}}, {"logit_bias": {1: 10**400}},
]  # fmt: skip


@pytest.mark.parametrize("values", BAD_PARAMS, ids=lambda values: str(values)[:40])
def test_invalid_params_cannot_be_built(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)


@pytest.mark.parametrize("values", [{"beams": 2}, {"logit_bias": [1]}, {"logit_bias": {"a": 1}}, {"top_k": "1"}])
def test_invalid_params_cannot_be_read(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        SamplingParams.from_json(values)


@pytest.mark.parametrize(
    "values",
    [
        None, [], {}, {"params": {}}, {"prompt_length": 1}, {"params": [], "prompt_length": 1},
        {"params": {}, "prompt_length": 0}, {"params": {}, "prompt_length": 1.5}, {"params": {}, "prompt_length": True},
        {"params": {}, "prompt_length": 2**31}, {"params": {}, "prompt_length": 1, "x": 1},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_opening_cannot_be_read(values: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        Opening.from_json(values)


# -- bodies of samples that do not add up


def samples_body(rows: Any, logprobs: Any, top_tokens: Any, top_logprobs: Any) -> bytes:
    arrays = {
        "samples": Frame.of(np.array(rows, dtype=np.int64)),
        "logprobs": Frame.of(np.array(logprobs, dtype=np.float32)),
        "top_tokens": Frame.of(np.array(top_tokens, dtype=np.int32)),
        "top_logprobs": Frame.of(np.array(top_logprobs, dtype=np.float32)),
    }
    return b"".join(pack(Frames(arrays)))


BAD_SAMPLES = {
    "four columns": samples_body([[1, 2, 3, 0]], [0], [], []),
    "one dimension": samples_body([1, 2, 3, 0, 0], [0], [], []),
    "a logprob too few": samples_body([[1, 2, 3, 0, 0]], [], [], []),
    "logprobs of two dimensions": samples_body([[1, 2, 3, 0, 1]], [[0, 0]], [], []),
    "an alternative too few": samples_body([[1, 2, 3, 2, 1]], [0], [7], [0]),
    "an alternative too many": samples_body([[1, 2, 3, 0, 1]], [0], [7], [0]),
    "no value for an alternative": samples_body([[1, 2, 3, 1, 1]], [0], [7], []),
    "counts that cancel out": samples_body([[1, 2, 3, -1, 1], [2, 2, 3, 1, 1]], [0, 0], [], []),
    "counts whose sum overflows": samples_body([[i, 2, 3, 2**62, 0] for i in range(1, 5)], [0] * 4, [], []),
    "tensors of a step": b"".join(Step((ONE,), tokens(2), None, OPEN).to_body()),
    "noise": b"noise",
}


@pytest.mark.parametrize("body", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_samples_that_do_not_add_up_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidEvent, match=r"."):
        Samples.from_body(body)


# -- errors and the answer to a wake

ERRORS: list[StageError] = [
    *(kind("what happened") for kind in (errors.InvalidEvent, errors.PlanMismatch, errors.EventTooLarge)),
    *(kind("what happened") for kind in (errors.PromptTooLong, errors.KvExhausted, errors.StageFailure)),
    errors.NotReady("what happened"),
    errors.WrongPosition("what happened", {7: 41, 9: 0}),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_error_survives_json(error: StageError) -> None:
    read = from_json(json.loads(json.dumps(error.to_json())))
    assert type(read) is type(error)
    assert (str(read), read.to_json()) == (str(error), error.to_json())


@pytest.mark.parametrize(
    "data",
    [None, [], "text", {}, {"code": "new"}, {"code": ["x"]}, {"code": None},
     {"code": "wrong_position", "message": "", "positions": "x"},
     {"code": "wrong_position", "message": "", "positions": {"a": 1}},
     {"code": "wrong_position", "message": "", "positions": {"1": None}},
     {"code": "wrong_position", "message": "", "positions": {"1": float("inf")}}],
    ids=str,
)  # fmt: skip
def test_unreadable_error_becomes_a_failure_that_quotes_it(data: Any) -> None:
    error = from_json(data)
    assert isinstance(error, StageFailure)
    assert not isinstance(error, WrongPosition)
    assert str(data)[:20] in str(error)


INFO = {
    "model": "m", "plan": "p", "stage": 0, "stages": 1, "blocks": [0, 1], "replica": "h:1", "dtype": "float32",
    "device": "cpu", "hidden_size": 1, "vocab_size": 1, "max_positions": 1, "kv_bytes_per_token": 8,
    "kv_bytes_max": 1000, "kv_bytes_used": 600, "weight_bytes": 0, "sequences": 3,
}  # fmt: skip


def test_stage_info_is_read_with_members_that_came_later() -> None:
    info = StageInfo.from_json({**INFO, "later": [1]})
    assert (info.blocks, info.kv_tokens_free) == ((0, 1), 50)


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {**INFO, "blocks": [0]}, {**INFO, "blocks": "01"}, {**INFO, "blocks": [0, None]},
     {**INFO, "kv_bytes_max": "1000"}, {**INFO, "kv_bytes_used": {}}, {**INFO, "kv_bytes_max": True},
     {**INFO, "vocab_size": -1}, {**INFO, "hidden_size": 1.5}, {**INFO, "sequences": 10**400}, {**INFO, "replica": 1},
     {name: value for name, value in INFO.items() if name != "dtype"}],
    ids=lambda data: str(data)[-60:],
)  # fmt: skip
def test_stage_info_that_nobody_could_compute_with_is_an_error(data: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|JSON object|missing"):
        StageInfo.from_json(data)


def test_budget_in_tokens_of_a_stage_without_kv_cache_is_no_division_by_zero() -> None:
    info = StageInfo("m", "p", 0, 1, (0, 1), "h:1", "float32", "cpu", 1, 1, 1, 0, 100, 0, 0, 0)
    assert info.kv_tokens_free == 100


def test_what_is_used_is_not_free() -> None:
    info = StageInfo("m", "p", 0, 1, (0, 1), "h:1", "float32", "cpu", 1, 1, 1, 8, 1000, 600, 0, 3)
    assert info.kv_tokens_free == 50
