"""A lane's steps: what they carry, what answers mean, and that no interleaving changes a sequence's tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Items
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.errors import WrongPosition
from functions.contract.messages import Opening, Sampled, Step
from functions.contract.sampling import SamplingParams
from orchestrator import lanes
from orchestrator.generation import GenerationRequest, Priority
from orchestrator.window import Flight, Window

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
    sequence.cached = sequence.sent = cached
    return sequence


def step_of(sequences: Items[lanes.Sequence], tokens_max: int, spread: int = 1) -> Step:
    """The next step of sequences of which there is something to send."""
    planned = lanes.next_step(sequences, tokens_max, spread)
    assert planned is not None
    step, chosen = planned
    assert [sequence.id for sequence in chosen] == [piece.sequence for piece in step.slices]
    return step


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
    step = step_of(sequences, tokens_max)
    assert step.slices
    assert len(step.tokens) <= tokens_max
    waiting = sum(s.pending for s in sequences)
    assert len(step.tokens) == min(tokens_max, waiting), "room is left although a sequence has tokens to send"


@given(a_lane(), st.integers(1, 40))
def test_slices_carry_what_the_stages_lack(sequences: list[lanes.Sequence], tokens_max: int) -> None:
    by_id = {s.id: s for s in sequences}
    step = step_of(sequences, tokens_max)
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
    """In both, those of batches come last where not all have room."""
    step = step_of(sequences, tokens_max)
    parts = [[s for s in sequences if s.request.priority == priority] for priority in ("interactive", "batch")]
    # the shortest answers first, so that nobody waits for ever where not all fit
    decoding = [s.id for part in parts for s in sorted(part, key=lambda s: s.generated) if s.decoding]
    prefilling = [s.id for part in parts for s in part if not s.decoding]
    order = [piece.sequence for piece in step.slices]
    room = min(len(decoding), max(1, tokens_max - bool(prefilling)))
    assert set(order[:room]) == set(decoding[:room])
    assert order[room:] == prefilling[: len(order) - room]
    if prefilling and tokens_max > 1:
        assert prefilling[0] in order, "a prompt gets on by a token at least"
    cut_short = [piece.sequence for piece in step.slices if not piece.sample]
    assert cut_short in ([], order[-1:]), "where no stages overlap, only the last sequence of a step is cut into chunks"


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 8))
def test_a_prompt_is_cut_so_that_the_stages_overlap(prompt_tokens: int, tokens_max: int, spread: int) -> None:
    """A chunk is a quarter of a stage's share, neither so short that it does not pay nor longer than a step."""
    sequence = sequence_of(1, [1] * prompt_tokens)
    lengths = []
    while sequence.pending:
        step = step_of([sequence], tokens_max, spread)
        lengths.append(len(step.tokens))
        sequence.sent += lengths[-1]
    chunk = tokens_max if spread == 1 else min(tokens_max, max(64, -(-prompt_tokens // (4 * spread))))
    assert lengths[:-1] == [chunk] * (len(lengths) - 1)
    assert 0 < lengths[-1] <= chunk


def test_long_prompts_go_on_side_by_side() -> None:
    """Each has a chunk in the step as long as there is room, so that a short one behind a long one is not held up."""
    prompts = [sequence_of(1, [1] * 1000), sequence_of(2, [1] * 1000), sequence_of(3, [1] * 20)]
    assert [piece.length for piece in step_of(prompts, 512, 2).slices] == [125, 125, 20]


def test_beside_others_only_prefill_is_sent_and_answers_go_with_it() -> None:
    decoding, prefilling = sequence_of(1, [1], [2], cached=1), sequence_of(2, [1, 2, 3])
    assert lanes.next_step([decoding], 99, 2, beside_others=True) is None
    planned = lanes.next_step([decoding, prefilling], 99, 2, beside_others=True)
    assert planned is not None
    assert [piece.sequence for piece in planned[0].slices] == [1, 2]
    assert lanes.next_step([], 99, 2) is None


@given(a_lane(), st.integers(1, 40))
def test_openings_are_given_for_exactly_the_slices_from_the_start(
    sequences: list[lanes.Sequence], tokens_max: int
) -> None:
    by_id = {s.id: s for s in sequences}
    step = step_of(sequences, tokens_max)
    assert step.openings == {
        piece.sequence: Opening(by_id[piece.sequence].request.params, len(by_id[piece.sequence].request.prompt))
        for piece in step.slices
        if piece.start == 0
    }


@given(a_lane(), st.integers(1, 40))
def test_making_a_step_changes_nothing(sequences: list[lanes.Sequence], tokens_max: int) -> None:
    """A step that failed is made again, and must be the same."""
    first, again = (Step.from_body(b"".join(step_of(sequences, tokens_max).to_body())) for _ in range(2))
    assert (first.slices, first.tokens.tolist(), first.openings) == (
        again.slices,
        again.tokens.tolist(),
        again.openings,
    )


def test_a_replayed_answer_is_told_apart_from_its_prompt() -> None:
    """Penalties count the answer only, so the opening names the prompt's length and not that of the history."""
    lost = sequence_of(1, [1, 2, 3], answer=[4, 5])
    step = step_of([lost], 99)
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
    window = Window(1)
    flight = window.send([first, second], 5)  # 3 tokens of the first, 2 of the second
    assert flight is not None
    flight.samples = [Sampled(1, 3, 9)]
    booked = window.book()
    assert booked is not None
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
        lanes.progress([sequence], step_of([sequence], 9), samples)
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
    step = step_of([sequence], 1000)
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
        st.sampled_from(["join", *["send"] * 4, *["answer"] * 3, "cancel", "stage loses", "answer is lost"]),
        st.integers(0, 5),
        st.integers(0, 20),
    ),
    max_size=40,
)


class SimulatedLane:
    """The loop of a lane without tasks or HTTP, over a stage that may lose things. A step on its way reaches it when it
    is answered."""

    def __init__(self, requests: list[GenerationRequest], tokens_max: int, spread: int = 1) -> None:
        self.stage = RememberingStage()
        self.waiting = [lanes.Sequence(i + 1, request) for i, request in enumerate(requests)]
        self.running: list[lanes.Sequence] = []
        self.answers: dict[int, list[int]] = {s.id: [] for s in self.waiting}
        self.given_up: set[int] = set()
        self.tokens_max = tokens_max
        self.window = Window(spread)
        self.flights: list[Flight] = []

    def happen(self, what: str, which: int, position: int) -> None:
        if what == "join" and self.waiting:
            self.running.append(self.waiting.pop(0))
        elif what == "send":
            self.send()
        elif what == "answer":
            self.answer()
        elif what == "answer is lost":
            self.answer(lost=True)
        elif self.running and what == "cancel":
            self.running[which % len(self.running)].cancelled = True
            self.given_up.add(self.running[which % len(self.running)].id)
        elif self.running and what == "stage loses":
            sequence = self.running[which % len(self.running)]
            self.stage.held[sequence.id] = self.stage.held.get(sequence.id, [])[:position]
        self._sweep()

    def send(self) -> None:
        if self.window.takes_more:
            flight = self.window.send([s for s in self.running if not s.cancelled], self.tokens_max)
            if flight is not None:
                flight.passed = 1
                self.flights.append(flight)

    def answer(self, *, lost: bool = False) -> None:
        """The oldest step comes to the stage."""
        if not self.flights:
            return
        flight = self.flights.pop(0)
        if not self.window.stops(flight):
            self._compute(flight, lost)
        flight.ended = True
        while (tokens := self.window.book()) is not None:
            for sequence, token in tokens:
                self.answers[sequence.id].append(token.id)
                sequence.cancelled |= token.finish is not None
        for failed in self.window.clear():
            if isinstance(failed.error, WrongPosition):
                for sequence in self.running:
                    sequence.take_back(failed.error.positions.get(sequence.id, sequence.cached))
        self._sweep()

    def _compute(self, flight: Flight, lost: bool) -> None:
        if gaps := self.stage.gaps(flight.step):
            flight.error = WrongPosition("a gap", gaps)
            return
        samples = self.stage.step(flight.step)
        if lost:
            flight.error = TimeoutError()
        else:
            flight.samples = samples

    def _sweep(self) -> None:
        for sequence in [s for s in self.running if s.cancelled and not s.in_flight]:
            self.running.remove(sequence)
            self.stage.held.pop(sequence.id, None)

    def step(self) -> None:
        """As much is sent as may be on its way at once, and all of it is answered."""
        for _ in range(8):
            self.send()
        while self.flights:
            self.answer()

    def finish(self) -> None:
        """Everybody joins, nothing is disturbed any more; ends for certain, or the lane makes no progress."""
        self.running += self.waiting
        for _ in range(1000):
            if not self.running:
                return
            self.step()
        pytest.fail("the lane makes no progress")


@given(REQUESTS, HAPPENINGS, st.integers(1, 30), st.integers(1, 4))
def test_whatever_happens_every_sequence_gets_the_tokens_it_gets_alone(
    requests: list[GenerationRequest], happenings: list[tuple[str, int, int]], tokens_max: int, spread: int
) -> None:
    lane = SimulatedLane(requests, tokens_max, spread)
    for happening in happenings:
        lane.happen(*happening)
    lane.finish()
    for identity, request in enumerate(requests, 1):
        expected = alone(request)
        # one whose consumer has gone may have got any part of it
        assert lane.answers[identity] == expected[: len(lane.answers[identity])]
        if identity not in lane.given_up:
            assert lane.answers[identity] == expected
    assert not lane.stage.held, "what has ended is released"


@given(REQUESTS, st.integers(1, 12), st.integers(1, 4), st.lists(st.booleans(), max_size=60))
def test_undisturbed_every_token_is_sent_once_in_order_and_no_place_is_sampled_twice(
    requests: list[GenerationRequest], tokens_max: int, spread: int, sends: list[bool]
) -> None:
    lane = SimulatedLane(requests, tokens_max, spread)
    lane.running, lane.waiting = lane.waiting, []
    ends: dict[int, int] = {}
    sampled_at: set[tuple[int, int]] = set()
    flights: list[Flight] = []
    for sending in [*sends, *[True, False] * 400]:
        if not sending:
            lane.answer()
            continue
        known = len(lane.flights)
        lane.send()
        flights += lane.flights[known:]
        assert len(lane.window) <= spread + (spread > 1)
    for flight in flights:
        for piece in flight.step.slices:
            assert piece.start == ends.get(piece.sequence, 0)
            ends[piece.sequence] = piece.end
            if piece.sample:
                assert (piece.sequence, piece.end) not in sampled_at
                sampled_at.add((piece.sequence, piece.end))
    assert not lane.running
    assert [lane.answers[identity] for identity in ends] == [alone(requests[identity - 1]) for identity in ends]
    # the last token of an answer is sampled, and never sent
    for identity, end in ends.items():
        assert end == len(requests[identity - 1].prompt) + len(lane.answers[identity]) - 1


def test_a_failure_stops_what_is_behind_it_and_keeps_what_is_before_it() -> None:
    window, prompt = Window(4), sequence_of(1, [1] * 4)
    first, second, third, fourth = flights = [_sent(window, prompt) for _ in range(4)]
    assert [flight.step.slices[0].start for flight in flights] == [0, 1, 2, 3]
    second.error = ConnectionError()
    assert [window.stops(flight) for flight in flights] == [False, False, True, True]
    assert not window.takes_more
    assert (window.book(), window.clear()) == (None, ())
    first.samples = third.samples = []  # the third was at its end already
    for flight in flights:
        assert window.clear() == ()
        flight.ended = True
    assert window.book() == []
    assert window.book() is None
    assert window.clear() == (second, third, fourth)
    assert (prompt.cached, prompt.sent, prompt.in_flight, prompt.history) == (1, 1, 0, [1] * 4)
    assert window.takes_more


def test_an_answer_to_another_step_is_a_failure_of_that_step() -> None:
    window, sequence = Window(1), sequence_of(1, [1, 2])
    flight = window.send([sequence], 9)
    assert flight is not None
    flight.samples, flight.ended = [Sampled(1, 7, 9)], True
    assert window.book() is None
    assert window.clear() == (flight,)
    assert isinstance(flight.error, ValueError)
    assert (sequence.cached, sequence.sent, sequence.history) == (0, 0, [1, 2])


def test_the_next_step_waits_until_the_first_stage_is_free() -> None:
    window, prompt = Window(2), sequence_of(1, [1] * 4)
    flight = window.send([prompt], 1)
    assert flight is not None
    assert not window.takes_more
    flight.passed = 1
    assert window.takes_more


@pytest.mark.parametrize(("decoding", "most"), [(False, 3), (True, 2)])
def test_a_step_more_than_there_are_stages_waits_unless_somebody_waits_for_a_token(decoding: bool, most: int) -> None:
    window, sequences = Window(2), [sequence_of(1, [1] * 1000)]
    if decoding:
        sequences.append(sequence_of(2, [1], [2], cached=1))
    sent = 0
    while window.takes_more:
        flight = window.send(sequences, 20)
        assert flight is not None
        flight.passed = 1
        sent += 1
    assert sent == most


def _sent(window: Window, sequence: lanes.Sequence) -> Flight:
    """A step of one token, which leaves the first stage at once."""
    flight = window.send([sequence], 1)
    assert flight is not None
    flight.passed = 1
    return flight


def test_sequences_in_one_lane_share_their_steps() -> None:
    requests = [GenerationRequest((i, i + 1), max_tokens=10) for i in range(8)]
    lane = SimulatedLane(requests, tokens_max=64)
    lane.running = lane.waiting
    for _ in range(10):
        lane.step()
    assert lane.running == []
