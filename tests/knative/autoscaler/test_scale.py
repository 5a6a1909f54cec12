"""What becomes of decisions: bounds, initial scale, and the way to zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.autoscaler.config import ScalerSpec
from knative.autoscaler.kpa import Decision
from knative.autoscaler.scale import PodScaler, Scaled, bounded

SPEC = ScalerSpec()  # stable window 60 s, grace 30 s


def decided(desired: int, excess: int = -100) -> Decision:
    return Decision(
        valid=True,
        desired=desired,
        excess_burst_capacity=excess,
        activators=2,
        panic=False,
        stable=0.0,
        panic_average=0.0,
        reason="",
    )


class Revision:
    """A PodScaler with pods that are ready as soon as they are asked for."""

    def __init__(self, spec: ScalerSpec) -> None:
        self.scaler = PodScaler(spec, 0.0)
        self.pods = self.scaler.initial_pods
        self.ready: int | None = None  # instead of all

    def at(self, now_s: float, desired: int | None, *, excess: int = -100, probed: bool = True) -> Scaled:
        scaled = self.scaler.reconcile(
            None if desired is None else decided(desired, excess),
            ready_pods=self.pods if self.ready is None else self.ready,
            pods=self.pods,
            probed=probed,
            now_s=now_s,
        )
        if scaled.want is not None:
            self.pods = scaled.want
        return scaled


def test_new_revision_becomes_active_when_its_pod_is_ready() -> None:
    revision = Revision(SPEC)
    revision.ready = 0
    first = revision.at(0, None)
    assert (first.want, first.state, first.mode) == (None, "activating", "proxy")
    revision.ready = 1
    second = revision.at(2, None)
    assert (second.want, second.state) == (None, "active")
    assert revision.scaler.initialized


def test_idle_revision_keeps_one_pod_for_a_stable_window_after_activation() -> None:
    revision = Revision(SPEC)
    revision.at(0, 5)
    early = revision.at(40, 0)
    assert (early.want, early.state, early.recheck_after_s) == (1, "active", 20)
    late = revision.at(60, 0)
    assert (late.want, late.state, late.mode) == (None, "inactive", "proxy")
    assert late.recheck_after_s is not None


def test_last_pod_goes_after_the_grace_period_behind_the_activator() -> None:
    revision = Revision(SPEC)
    assert revision.at(0, 1, excess=5).mode == "serve"
    assert revision.at(100, 0, excess=5).mode == "proxy"
    waiting = revision.at(103, 0, excess=5)
    assert (waiting.want, waiting.recheck_after_s) == (None, 27)
    assert revision.at(129.9, 0, excess=5).want is None
    gone = revision.at(130, 0, excess=5)
    assert (gone.want, gone.state, gone.mode) == (0, "inactive", "proxy")
    assert gone.reason.startswith("1 -> 0: ")


def test_fast_path_where_the_activator_was_in_the_path_all_the_time() -> None:
    revision = Revision(SPEC)
    assert revision.at(0, 1).mode == "proxy"
    assert revision.at(100, 0).want is None, "the pod is not taken in the same step that marks it inactive"
    assert revision.at(100.1, 0).want == 0


def test_time_in_the_path_starts_anew_each_time_the_activator_enters_it() -> None:
    revision = Revision(SPEC)
    revision.at(0, 1, excess=-1)
    revision.at(90, 1, excess=1)
    revision.at(100, 0, excess=1)
    assert revision.at(101, 0, excess=1).recheck_after_s == 29


def test_retention_is_a_least_time_even_on_the_fast_path() -> None:
    revision = Revision(replace(SPEC, pod_retention_s=50.0))
    revision.at(0, 1)
    revision.at(100, 0)
    held = revision.at(140, 0)
    assert (held.want, held.recheck_after_s) == (None, 10)
    assert "retention" in held.reason
    assert revision.at(150, 0).want == 0


def test_retention_shorter_than_the_grace_period_still_allows_the_fast_path() -> None:
    revision = Revision(replace(SPEC, pod_retention_s=10.0))
    revision.at(0, 1)
    revision.at(100, 0)
    assert revision.at(109, 0).want is None
    assert revision.at(110, 0).want == 0


def test_no_pod_goes_before_the_activator_answers() -> None:
    revision = Revision(SPEC)
    revision.at(0, 1)
    revision.at(100, 0)
    unanswered = revision.at(500, 0, probed=False)
    assert (unanswered.want, unanswered.recheck_after_s) == (None, 1)
    assert revision.at(501, 0).want == 0


def test_no_probe_is_needed_where_the_activator_is_always_in_the_path() -> None:
    revision = Revision(replace(SPEC, target_burst_capacity=-1.0, scraping=False))
    revision.at(0, 1, excess=-1)
    revision.at(100, 0, excess=-1)
    assert revision.at(101, 0, excess=-1, probed=False).want == 0


def test_a_request_during_the_grace_period_keeps_the_pod() -> None:
    revision = Revision(SPEC)
    revision.at(0, 1, excess=5)
    revision.at(100, 0, excess=5)
    back = revision.at(110, 1, excess=5)
    assert (back.want, back.state, back.mode) == (1, "active", "serve")
    assert revision.at(112, 0, excess=5).recheck_after_s == 58, "a whole stable window counts again"


def test_woken_revision_is_activating_until_a_pod_is_ready() -> None:
    revision = Revision(SPEC)
    revision.at(0, 1)
    revision.at(100, 0)
    revision.at(101, 0)
    revision.ready = 0
    woken = revision.at(200, 3, excess=50)
    assert (woken.want, woken.state, woken.mode) == (3, "activating", "proxy")
    assert revision.at(201, 0).want is None, "nothing is taken away while it starts"
    revision.ready = 1
    assert revision.at(202, 3, excess=50).state == "active"


def test_never_active_within_the_progress_deadline_goes_to_zero() -> None:
    revision = Revision(replace(SPEC, progress_deadline_s=100.0))
    revision.ready = 0
    assert revision.at(0, None).recheck_after_s == 130
    assert revision.at(130, None).want is None
    failed = revision.at(130.5, None)
    assert (failed.want, failed.state) == (0, "inactive")
    assert "progress deadline" in failed.reason


def test_lost_pods_make_an_active_revision_activating() -> None:
    revision = Revision(SPEC)
    revision.at(0, 2)
    revision.ready = 0
    assert revision.at(10, 2).state == "activating"


def test_restart_at_zero_leaves_all_as_it_is_behind_the_activator() -> None:
    revision = Revision(replace(SPEC, initial_scale=0))
    assert revision.pods == 0
    for now_s in (0, 2, 1000):
        scaled = revision.at(now_s, None)
        assert (scaled.want, scaled.state, scaled.mode) == (None, "inactive", "proxy")
    assert revision.at(1002, 1).want == 1


def test_initial_scale_holds_until_it_was_reached_once() -> None:
    revision = Revision(replace(SPEC, initial_scale=3))
    assert revision.pods == 3
    revision.ready = 2
    held = revision.at(0, None)
    assert (held.want, held.state) == (3, "activating")
    assert revision.at(2, 0).want == 3
    revision.ready = 3
    assert revision.at(4, 0).state == "active"
    assert revision.at(6, 2).want == 2


def test_initial_scale_does_not_hold_for_an_unreachable_revision() -> None:
    revision = Revision(replace(SPEC, initial_scale=3, reachable=False))
    revision.ready = 2
    assert revision.at(0, 1).want == 1


def test_min_scale_counts_for_being_active_and_keeps_its_pods() -> None:
    revision = Revision(replace(SPEC, min_scale=2))
    first = revision.at(0, None)
    assert (first.want, first.state) == (2, "activating")
    assert revision.at(2, 0).state == "active"
    assert revision.at(1000, 0).want == 2


def test_one_pod_stays_where_scale_to_zero_is_off() -> None:
    revision = Revision(replace(SPEC, enable_scale_to_zero=False))
    revision.at(0, 4)
    idle = revision.at(1000, 0)
    assert (idle.want, idle.state) == (1, "active")


def test_changed_settings_take_effect() -> None:
    revision = Revision(replace(SPEC, min_scale=2))
    revision.at(0, 2)
    revision.at(2, 2)
    revision.scaler.update(replace(SPEC, max_scale=1))
    assert revision.at(4, 9).want == 1


def test_activators_follow_the_ready_pods() -> None:
    revision = Revision(SPEC)
    revision.ready = 10
    assert revision.at(0, 10).activators == 13


@pytest.mark.parametrize(
    ("low", "high", "initial", "initialized", "desired", "wanted"),
    [
        (0, 0, 1, True, 7, 7),
        (2, 0, 1, True, 0, 2),
        (0, 3, 1, True, 7, 3),
        (2, 3, 1, True, -1, 2),
        (0, 3, 5, False, 1, 5),  # a count below the lower bound is not looked at further
        (0, 3, 5, True, 1, 1),
        (1, 0, 5, False, 9, 9),
    ],
)
def test_bounds(low: int, high: int, initial: int, initialized: bool, desired: int, wanted: int) -> None:
    spec = replace(SPEC, min_scale=low, max_scale=high, initial_scale=initial)
    assert bounded(spec, desired, initialized=initialized) == wanted


@given(
    steps=st.lists(st.tuples(st.floats(0.1, 40), st.integers(-1, 6), st.integers(0, 6), st.booleans()), max_size=60),
    low=st.integers(0, 2),
    retention_s=st.sampled_from((0.0, 20.0, 45.0)),
)
def test_whatever_happens_the_last_pod_goes_only_from_behind_the_activator(
    steps: list[tuple[float, int, int, bool]], low: int, retention_s: float
) -> None:
    spec = replace(SPEC, min_scale=low, pod_retention_s=retention_s, progress_deadline_s=50.0)
    scaler, now_s, before = PodScaler(spec, 0.0), 0.0, "activating"
    idle_since_s: float | None = None
    for wait_s, desired, ready, probed in steps:
        now_s += wait_s
        scaled = scaler.reconcile(decided(desired, excess=10), ready_pods=ready, pods=1, probed=probed, now_s=now_s)
        idle_since_s = (idle_since_s or now_s) if scaled.state == "inactive" else None
        assert scaled.want is None or scaled.want >= low
        if scaled.want == 0 and before != "activating":
            assert probed
            assert scaled.mode == "proxy"
            assert idle_since_s is not None
            assert now_s - idle_since_s >= retention_s
        if scaled.want is None:
            assert scaled.recheck_after_s is not None or desired == -1
        assert scaled.recheck_after_s is None or scaled.recheck_after_s > 0
        assert scaled.mode == "proxy" or ready > 0
        before = scaled.state
