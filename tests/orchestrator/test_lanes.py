"""A lane's steps: what they carry, what answers mean, and that no interleaving changes a sequence's tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Items
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.messages import Opening, Sampled, Step
from functions.contract.sampling import SamplingParams
from orchestrator import lanes
from orchestrator.generation import GenerationRequest, Priority

VOCABULARY = 50
PRIORITIES = st.sampled_from(get_args(Priority))


def sequence_of(
    identity: int,
    prompt: Items[int],
    answer: Items[int] = (),
    cached: int = 0,
    *,
    max_tokens: int = 99,
    priority: Priority = "interactive",
) -> lanes.Sequence:
    """A sequence in the middle: `answer` is generated already, `cached` tokens are in the stages."""
    request = GenerationRequest(tuple(prompt), max_tokens, SamplingParams(seed=identity), priority=priority)
    sequence = lanes.Sequence(identity, request)
    sequence.history.extend(answer)
    sequence.cached = cached
    return sequence


@st.composite
def a_lane(draw: st.DrawFn) -> list[lanes.Sequence]:
    """Sequences in any state in which a lane may meet them: at least one token is not cached yet."""
    sequences = []
    for identity in range(1, draw(st.integers(1, 8)) + 1):
        prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
        answer = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=6))
        # decoding is the common state, so it is drawn more often than any other
        cached = draw(st.just(len(prompt + answer) - 1) | st.integers(0, len(prompt + answer) - 1))
        sequences.append(sequence_of(identity, prompt, answer, cached, priority=draw(PRIORITIES)))
    return sequences


# -- what a step carries


@given(a_lane(), st.integers(1, 40))
def test_a_step_holds_something_and_never_more_than_asked_for(sequences: list[lanes.Sequence], tokens_max: int) -> None:
    step = lanes.next_step(sequences, tokens_max)
    assert step.slices
    assert len(step.tokens) <= tokens_max
    waiting = sum(s.pending for s in sequences)
    assert len(step.tokens) == min(tokens_max, waiting), "room is left although a sequence has tokens to send"


@given(a_lane(), st.integers(1, 40))
def test_slices_carry_what_the_stages_lack(sequences: list[lanes.Sequence], tokens_max: int) -> None:
    by_id = {s.id: s for s in sequences}
    step = lanes.next_step(sequences, tokens_max)
    at = 0
    for piece in step.slices:
        sequence = by_id[piece.sequence]
        assert piece.start == sequence.cached
        assert step.tokens[at : at + piece.length].tolist() == sequence.history[piece.start : piece.end]
        assert piece.sample == (piece.end == len(sequence.history))
        at += piece.length
    assert step.tokens.dtype == np.int32


@given(a_lane(), st.integers(1, 40))
def test_decode_tokens_come_first_then_prefill_oldest_first(sequences: list[lanes.Sequence], tokens_max: int) -> None:
    """In both, those of batches come last."""
    step = lanes.next_step(sequences, tokens_max)
    parts = [[s for s in sequences if s.request.priority == priority] for priority in ("interactive", "batch")]
    # the shortest answers first, so that nobody waits for ever where not all fit
    decoding = [s.id for part in parts for s in sorted(part, key=lambda s: s.generated) if s.decoding]
    prefilling = [s.id for part in parts for s in part if not s.decoding]
    order = [piece.sequence for piece in step.slices]
    room = max(1, tokens_max - bool(prefilling))
    assert order == [*decoding[:room], *prefilling][: len(order)]
    if prefilling and tokens_max > 1:
        assert prefilling[0] in order, "a prompt gets on by a token at least"
    cut_short = [piece.sequence for piece in step.slices if not piece.sample]
    assert cut_short in ([], order[-1:]), "only the last sequence of a step may be cut into chunks"


@given(a_lane(), st.integers(1, 40))
def test_openings_are_given_for_exactly_the_slices_from_the_start(
    sequences: list[lanes.Sequence], tokens_max: int
) -> None:
    by_id = {s.id: s for s in sequences}
    step = lanes.next_step(sequences, tokens_max)
    assert step.openings == {
        piece.sequence: Opening(by_id[piece.sequence].request.params, len(by_id[piece.sequence].request.prompt))
        for piece in step.slices
        if piece.start == 0
    }


@given(a_lane(), st.integers(1, 40))
def test_making_a_step_changes_nothing(sequences: list[lanes.Sequence], tokens_max: int) -> None:
    """A step that failed is made again, and must be the same."""
    first, again = (Step.from_body(b"".join(lanes.next_step(sequences, tokens_max).to_body())) for _ in range(2))
    assert (first.slices, first.tokens.tolist(), first.openings) == (
        again.slices,
        again.tokens.tolist(),
        again.openings,
    )


def test_a_replayed_answer_is_told_apart_from_its_prompt() -> None:
    """Penalties count the answer only, so the opening names the prompt's length and not that of the history."""
    lost = sequence_of(1, [1, 2, 3], answer=[4, 5])
    step = lanes.next_step([lost], 99)
    assert step.openings[1].prompt_length == 3
    assert step.tokens.tolist() == [1, 2, 3, 4, 5]


# -- what an answer means


def test_a_stop_token_ends_the_sequence_and_is_reported() -> None:
    request = GenerationRequest((1,), max_tokens=5, stop_ids=frozenset({7, 8}))
    sequence = lanes.Sequence(1, request)
    assert sequence.accept(Sampled(1, 1, 6)).finish is None
    last = sequence.accept(Sampled(1, 2, 8))
    assert (last.id, last.finish) == (8, "stop")


def test_the_last_of_max_tokens_ends_the_sequence_by_length() -> None:
    sequence = sequence_of(1, [1, 2], max_tokens=3)
    assert [sequence.accept(Sampled(1, 2 + i, 9)).finish for i in range(3)] == [None, None, "length"]


def test_a_stop_token_at_the_last_place_counts_as_stop() -> None:
    sequence = lanes.Sequence(1, GenerationRequest((1,), max_tokens=1, stop_ids=frozenset({7})))
    assert sequence.accept(Sampled(1, 1, 7)).finish == "stop"


def test_a_stop_id_in_the_prompt_ends_nothing() -> None:
    sequence = lanes.Sequence(1, GenerationRequest((7, 7), max_tokens=3, stop_ids=frozenset({7})))
    assert sequence.accept(Sampled(1, 2, 6)).finish is None


def test_log_probabilities_reach_the_token() -> None:
    token = sequence_of(1, [1]).accept(Sampled(1, 1, 6, -0.5, ((6, -0.5), (2, -1.0))))
    assert (token.logprob, token.top) == (-0.5, ((6, -0.5), (2, -1.0)))


def test_an_answered_step_moves_its_sequences_only() -> None:
    first, second, absent = (sequence_of(i, [1, 2, 3]) for i in (1, 2, 3))
    first.failures = second.failures = absent.failures = 2
    step = lanes.next_step([first, second], 5)  # 3 tokens of the first, 2 of the second
    booked = lanes.progress([first, second, absent], step, [Sampled(1, 3, 9)])
    assert [(s.id, token.id) for s, token in booked] == [(1, 9)]
    assert [s.cached for s in (first, second, absent)] == [3, 2, 0]
    assert [s.failures for s in (first, second, absent)] == [0, 0, 2]
    assert first.history == [1, 2, 3, 9]
    assert first.decoding
    assert not second.decoding


@pytest.mark.parametrize(
    "samples",
    [[], [Sampled(2, 1, 9)], [Sampled(1, 7, 9)], [Sampled(1, 1, 9), Sampled(1, 2, 9)]],
    ids=["none", "another sequence", "another position", "too many"],
)
def test_an_answer_to_another_step_is_noticed_before_anything_is_booked(samples: list[Sampled]) -> None:
    sequence = sequence_of(1, [1])
    with pytest.raises(ValueError, match="samples"):
        lanes.progress([sequence], lanes.next_step([sequence], 9), samples)
    assert (sequence.cached, sequence.history) == (0, [1])


def test_where_not_all_decoding_sequences_fit_they_take_turns() -> None:
    requests = [GenerationRequest((i,), max_tokens=20) for i in range(5)]
    lane = SimulatedLane(requests, tokens_max=5)
    lane.running = lane.waiting
    lane.step()
    lane.tokens_max = 2
    for _ in range(30):
        lane.step()
    counts = [len(tokens) for tokens in lane.answers.values()]
    assert max(counts) - min(counts) <= 1


@given(a_lane(), st.data())
def test_what_was_taken_back_is_what_is_sent_next(sequences: list[lanes.Sequence], data: st.DataObject) -> None:
    sequence = sequences[0]
    position = data.draw(st.integers(0, len(sequence.history)))
    held = min(position, sequence.cached)
    sequence.take_back(position)
    step = lanes.next_step([sequence], 1000)
    assert [(piece.start, piece.end, piece.sample) for piece in step.slices] == [(held, len(sequence.history), True)]
    assert step.tokens.tolist() == sequence.history[held:]


# -- which lane is joined


STATES = st.lists(
    st.builds(
        lanes.LaneState, sequences=st.integers(0, 5), age_s=st.sampled_from([0.0, 4.9, 5.0, 60.0]), fits=st.booleans()
    ),
    max_size=8,
)
RULES = st.builds(lanes.LaneRule, spread=st.integers(1, 4), width=st.integers(1, 5), lanes_max=st.integers(0, 8))


@given(STATES, RULES, st.booleans())
def test_a_lane_is_joined_only_where_there_is_room_and_opened_only_where_one_may_be(
    states: list[lanes.LaneState], rule: lanes.LaneRule, may_open: bool
) -> None:
    index = lanes.place(states, rule, may_open=may_open)
    may_open = may_open and (rule.lanes_max == 0 or len(states) < rule.lanes_max)
    room = [state for state in states if state.fits and state.sequences < rule.width]
    if index is None:
        assert not room, "nobody waits beside a lane with room"
        assert not may_open
    elif index == len(states):
        assert may_open
    else:
        assert states[index] in room
        of_its_age = [state for state in room if (state.age_s < rule.age_s) == (states[index].age_s < rule.age_s)]
        assert states[index].sequences == min(state.sequences for state in of_its_age)


@given(STATES, RULES)
def test_an_old_lane_is_joined_only_where_none_may_be_opened(
    states: list[lanes.LaneState], rule: lanes.LaneRule
) -> None:
    index = lanes.place(states, rule)
    if index is not None and index < len(states) and states[index].age_s >= rule.age_s:
        assert len(states) >= rule.lanes_max > 0
        assert not any(s.fits and s.sequences < rule.width and s.age_s < rule.age_s for s in states)


@given(STATES, RULES)
def test_old_lanes_do_not_count_among_those_to_spread_over(states: list[lanes.LaneState], rule: lanes.LaneRule) -> None:
    """While fewer lanes than stages are young, a new sequence gets a lane of its own: an empty one, else a new one."""
    young = [state for state in states if state.age_s < rule.age_s]
    index = lanes.place(states, rule)
    if rule.lanes_max == 0 and len(young) < rule.spread:
        assert index is not None
        assert index == len(states) or states[index].sequences == 0


@given(st.integers(1, 60), RULES)
def test_sequences_that_come_together_spread_then_pack_then_open_more(count: int, rule: lanes.LaneRule) -> None:
    loads: list[int] = []
    placed = 0
    for _ in range(count):
        index = lanes.place([lanes.LaneState(load) for load in loads], rule)
        if index is None:
            break
        if index == len(loads):
            # more lanes than stages only once all are packed
            assert len(loads) < rule.spread or min(loads) == rule.width
            loads.append(0)
        loads[index] += 1
        placed += 1
    most = rule.lanes_max or count
    assert placed == min(count, most * rule.width)
    if not rule.lanes_max:
        assert len(loads) == max(min(count, rule.spread), -(-count // rule.width))
    if len(loads) <= rule.spread:
        assert max(loads) - min(loads) <= 1


# -- a lane over time


class RememberingStage:
    """All stages as one: holds the tokens of each sequence and samples by a function of the whole history.

    A step past what it holds is refused, as a real stage does, so a lane that sent too little could not go on."""

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        self.openings: dict[int, Opening] = {}

    def gaps(self, step: Step) -> dict[int, int]:
        """The sequences of which too little is held, with how much it is."""
        held = {piece.sequence: len(self.held.get(piece.sequence, ())) for piece in step.slices}
        return {p.sequence: held[p.sequence] for p in step.slices if p.start > held[p.sequence]}

    def step(self, step: Step) -> list[Sampled]:
        self.openings.update(step.openings)
        samples, at = [], 0
        for piece in step.slices:
            history = self.held.get(piece.sequence, [])[: piece.start] + step.tokens[at : at + piece.length].tolist()
            self.held[piece.sequence] = history
            if piece.sample:
                samples.append(Sampled(piece.sequence, piece.end, sampled(history, self.openings[piece.sequence])))
            at += piece.length
        return samples


def sampled(history: list[int], opening: Opening) -> int:
    """Any function that differs with every token, with the seed, and with where the answer starts."""
    return zlib.crc32(repr((history, opening.prompt_length, opening.params.seed)).encode()) % VOCABULARY


def alone(request: GenerationRequest) -> list[int]:
    """What the request is answered by the same function with no lane around it."""
    history, opening = list(request.prompt), Opening(request.params, len(request.prompt))
    while len(history) - len(request.prompt) < request.max_tokens:
        history.append(sampled(history, opening))
        if history[-1] in request.stop_ids:
            break
    return history[len(request.prompt) :]


REQUESTS = st.lists(
    st.builds(
        GenerationRequest,
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=10).map(tuple),
        max_tokens=st.integers(1, 8),
        params=st.builds(SamplingParams, seed=st.integers(0, 3)),
        stop_ids=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=6),
        priority=PRIORITIES,
    ),
    min_size=1,
    max_size=6,
)
# what may happen between two steps: (what, to which sequence, at which position)
HAPPENINGS = st.lists(
    st.tuples(
        st.sampled_from(["join", "step", "step", "step", "cancel", "take back", "stage loses", "answer is lost"]),
        st.integers(0, 5),
        st.integers(0, 20),
    ),
    max_size=40,
)


class SimulatedLane:
    """The loop of a lane without tasks or HTTP, over a stage that may lose things."""

    def __init__(self, requests: list[GenerationRequest], tokens_max: int) -> None:
        self.stage = RememberingStage()
        self.waiting = [lanes.Sequence(i + 1, request) for i, request in enumerate(requests)]
        self.running: list[lanes.Sequence] = []
        self.answers: dict[int, list[int]] = {s.id: [] for s in self.waiting}
        self.cancelled: set[int] = set()
        self.tokens_max = tokens_max

    def happen(self, what: str, which: int, position: int) -> None:
        if what == "join" and self.waiting:
            self.running.append(self.waiting.pop(0))
        elif self.running and what in ("step", "answer is lost"):
            self.step(answered=what == "step")
        elif self.running:
            self._disturb(what, self.running[which % len(self.running)], position)

    def _disturb(self, what: str, sequence: lanes.Sequence, position: int) -> None:
        if what == "cancel":
            self.cancelled.add(sequence.id)
            self.running.remove(sequence)
            self.stage.held.pop(sequence.id, None)
        elif what == "take back":
            sequence.take_back(position)
        elif what == "stage loses":
            self.stage.held[sequence.id] = self.stage.held.get(sequence.id, [])[:position]

    def step(self, *, answered: bool = True) -> None:
        step = lanes.next_step(self.running, self.tokens_max)
        if gaps := self.stage.gaps(step):
            for sequence in self.running:
                sequence.take_back(gaps.get(sequence.id, sequence.cached))
            return
        samples = self.stage.step(step)
        if not answered:
            return
        for sequence, token in lanes.progress(self.running, step, samples):
            self.answers[sequence.id].append(token.id)
            if token.finish is not None:
                self.running.remove(sequence)

    def finish(self) -> None:
        """Everybody joins, nothing is disturbed any more; ends for certain, or the lane makes no progress."""
        self.running += self.waiting
        for _ in range(1000):
            if not self.running:
                return
            self.step()
        pytest.fail("the lane makes no progress")


@given(REQUESTS, HAPPENINGS, st.integers(1, 30))
def test_whatever_happens_every_sequence_gets_the_tokens_it_gets_alone(
    requests: list[GenerationRequest], happenings: list[tuple[str, int, int]], tokens_max: int
) -> None:
    lane = SimulatedLane(requests, tokens_max)
    for happening in happenings:
        lane.happen(*happening)
    lane.finish()
    for identity, request in enumerate(requests, 1):
        expected = alone(request)
        if identity in lane.cancelled:
            expected = expected[: len(lane.answers[identity])]
        assert lane.answers[identity] == expected


def test_sequences_in_one_lane_share_their_steps() -> None:
    requests = [GenerationRequest((i, i + 1), max_tokens=10) for i in range(8)]
    lane = SimulatedLane(requests, tokens_max=64)
    lane.running = lane.waiting
    for _ in range(10):
        lane.step()
    assert lane.running == []
