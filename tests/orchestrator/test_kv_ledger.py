"""Promised KV memory: no replica is promised more than it has, and what was promised comes back."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.kv_ledger import KvLedger

STAGES = 2
REPLICAS = ("a", "b", "c")


def ledger_of(budget: int) -> KvLedger:
    """Two stages whose replica "a" has been woken."""
    ledger = KvLedger(STAGES)
    for stage in range(STAGES):
        ledger.learn(stage, "a", budget, budget)
        ledger.resize(stage, "a")
    return ledger


# what lanes do: (what, which lane, at which stage, tokens or replica)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "join", "pin", "leave"]), st.integers(0, 3), st.integers(0, 1), st.integers(1, 60)
    ),
    max_size=40,
)


class Lanes:
    """Four lanes that take sequences where the ledger says they fit."""

    def __init__(self, ledger: KvLedger) -> None:
        self.ledger = ledger
        self.homes: list[list[str | None]] = [[None] * STAGES for _ in range(4)]
        self.tokens: list[list[int]] = [[] for _ in range(4)]

    def do(self, what: str, lane: int, stage: int, number: int) -> None:
        if what == "join" and self.ledger.fits(self.homes[lane], number):
            self.ledger.promise(self.homes[lane], number)
            self.tokens[lane].append(number)
        elif what == "leave" and self.tokens[lane]:
            self.ledger.free(self.homes[lane], self.tokens[lane].pop())
        elif what == "pin" and self.homes[lane][stage] is None:
            replica = REPLICAS[number % len(REPLICAS)]
            self.ledger.move(stage, None, replica, sum(self.tokens[lane]))
            self.homes[lane][stage] = replica

    def held(self, stage: int, replica: str | None) -> int:
        return sum(sum(t) for home, t in zip(self.homes, self.tokens, strict=True) if home[stage] == replica)


@given(STEPS, st.integers(60, 150))
def test_no_replica_is_promised_more_than_it_has_wherever_lanes_land(steps: list[Any], budget: int) -> None:
    lanes = Lanes(ledger_of(budget))
    for step in steps:
        lanes.do(*step)
        for stage in range(STAGES):
            for replica in REPLICAS:
                assert lanes.ledger.promised(stage, replica) == lanes.held(stage, replica) <= budget


@given(STEPS)
def test_all_that_was_promised_comes_back(steps: list[Any]) -> None:
    lanes = Lanes(ledger_of(100))
    for step in steps:
        lanes.do(*step)
    for lane in range(4):
        while lanes.tokens[lane]:
            lanes.do("leave", lane, 0, 0)
    assert lanes.ledger.fits([None] * STAGES, 100)
    assert not any(lanes.ledger.promised(stage, home) for stage in range(STAGES) for home in (*REPLICAS, None))


def test_lanes_on_other_replicas_have_budgets_of_their_own() -> None:
    ledger = ledger_of(100)
    ledger.promise(["a", "a"], 90)
    assert not ledger.fits(["a", "a"], 20)
    assert not ledger.fits([None, None], 20), "the service might choose the full one"
    assert ledger.fits(["b", "b"], 20)
    assert not ledger.fits(["b", "a"], 20)


def test_what_others_hold_on_a_replica_is_not_free_and_what_we_hold_is_ours() -> None:
    ledger = ledger_of(100)
    ledger.promise(["b", "b"], 30)
    ledger.learn(0, "b", free=50, total=100)  # 20 belong to somebody else
    assert ledger.fits(["b", "a"], 50)
    assert not ledger.fits(["b", "a"], 51)


def test_a_replica_that_says_it_is_full_gets_nothing_until_something_there_ends() -> None:
    ledger = ledger_of(100)
    ledger.promise(["b", "b"], 40)
    ledger.promise(["b", "b"], 10)
    ledger.full(1, "b")
    ledger.free(["b", "b"], 10)
    assert not ledger.fits(["b", "b"], 10)
    ledger.free(["b", "b"], 40)
    assert ledger.fits(["b", "b"], 10)
    assert ledger.fits(["b", "b"], 60), "an empty replica says for itself what is too much"


def test_the_longest_sequence_is_what_the_smallest_stage_holds() -> None:
    ledger = ledger_of(100)
    ledger.learn(1, "b", 70, 70)
    assert ledger.largest == 100
    ledger.resize(1, "b")
    assert ledger.largest == 70


def test_what_a_replica_said_before_it_went_does_not_bind_its_successor() -> None:
    ledger = ledger_of(100_000)
    ledger.promise([None, None], 1000)
    for stage in range(STAGES):
        ledger.move(stage, None, "a", 1000)
        ledger.full(stage, "a")  # held by others
    ledger.free(["a", "a"], 1000)  # and then "a" is scaled away, which nobody tells
    for stage in range(STAGES):
        ledger.learn(stage, "b", 100_000, 100_000)
        ledger.resize(stage, "b")
        ledger.move(stage, None, "b", 0)
    ledger.promise(["b", "b"], 600)
    assert ledger.fits([None, None], 600)


@given(STEPS)
def test_replicas_that_hold_nothing_any_more_are_forgotten(steps: list[Any]) -> None:
    lanes = Lanes(ledger_of(100))
    for step in steps:
        lanes.do(*step)
    for home in lanes.homes:
        for stage, replica in enumerate(home):
            if replica is not None and lanes.held(stage, replica):
                lanes.ledger.full(stage, replica)
    for lane in range(4):
        while lanes.tokens[lane]:
            lanes.do("leave", lane, 0, 0)
    for stage in range(STAGES):
        lanes.ledger.learn(stage, "z", 100, 100)
        lanes.ledger.resize(stage, "z")
    lanes.ledger.promise(["z", "z"], 60)
    assert lanes.ledger.fits([None, None], 40)
    assert not any(lanes.ledger.known(stage, replica) for stage in range(STAGES) for replica in ("b", "c"))


@given(
    st.integers(60, 150),
    st.lists(st.integers(1, 60), max_size=8),
    st.integers(1, 60),
    st.sampled_from([0.25, 0.75, 1.0]),
)
def test_who_may_fill_a_share_only_leaves_the_rest_free(
    budget: int, held: list[int], tokens: int, share: float
) -> None:
    ledger, home = ledger_of(budget), ["a"] * STAGES
    for some in held:
        if ledger.fits(home, some):
            ledger.promise(home, some)
    promised = ledger.promised(0, "a")
    assert ledger.fits(home, tokens, share) == (promised == 0 or promised + tokens <= share * budget)
    assert ledger.fits(home, tokens) or not ledger.fits(home, tokens, share)


def test_another_replica_in_use_is_one_with_room_that_is_not_avoided() -> None:
    ledger = KvLedger(1)
    for replica in ("a", "b", "c"):
        ledger.learn(0, replica, 100, 100)
    assert ledger.another(0, 10, {"a"}) is None, "none is in use"
    ledger.promise(["a"], 50)
    ledger.promise(["b"], 95)
    assert ledger.another(0, 10, {"a"}) is None
    assert ledger.another(0, 5, {"a"}) == "b"
    ledger.promise(["c"], 10)
    assert ledger.another(0, 10, {"a"}) == "c"
    assert ledger.another(0, 10, {"a", "c"}) is None
