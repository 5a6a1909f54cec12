"""How many pods a revision should have: the decision of the Knative Pod Autoscaler.

After knative/serving pkg/autoscaler/scaling/autoscaler.go. All arithmetic is plain double precision, as there:
a tolerance in a division would decide differently from a cluster.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from knative.autoscaler.config import ScalerSpec
from knative.autoscaler.values import format_number
from knative.autoscaler.windows import BucketedWindow

TICK_S = 2
"""A revision is evaluated every 2 s, and at once when a request arrives at none."""

ACTIVATORS_MIN = 2

UNDECIDED = -1


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of one evaluation.

    `desired` (before min and max scale) and `excess_burst_capacity` are those in force: of this evaluation if
    `valid`, else of the last valid one; `desired` is -1 until there is one.
    """

    valid: bool
    desired: int
    excess_burst_capacity: int
    activators: int
    panic: bool
    stable: float | None  # average over the stable window; None: no data
    panic_average: float | None
    reason: str  # for people: which window, limit or delay decided


class Autoscaler:
    """Windows, panic mode and delay of one revision. Not for use by several threads at a time."""

    def __init__(self, spec: ScalerSpec, now_s: float, ready_pods: int) -> None:
        self._spec = spec
        self._stable = BucketedWindow(spec.stable_window_s)
        self._panic = BucketedWindow(spec.panic_window_s)
        # As upstream, the delay is that of creation: a later change does not resize its window.
        self._delay = DelayWindow(spec.scale_down_delay_s) if spec.scale_down_delay_s else None
        # Pods that exist may carry load nobody has told us about: panic keeps them for one stable window.
        self._panic_since_s = now_s if ready_pods > 1 else None
        self._panic_most = ready_pods if ready_pods > 1 else 0
        self._desired = UNDECIDED
        self._excess = initial_excess_burst_capacity(spec)

    @property
    def spec(self) -> ScalerSpec:
        return self._spec

    def update(self, spec: ScalerSpec) -> None:
        """Another configuration or reachability from now on; what was seen so far stays."""
        self._spec = spec
        self._stable.resize(spec.stable_window_s)
        self._panic.resize(spec.panic_window_s)

    def record(self, at_s: float, concurrency: float, requests_per_s: float = 0.0) -> None:
        """One sample of the whole revision, under the second `at_s`; samples of one second add up."""
        value = requests_per_s if self._spec.scaling_metric == "rps" else concurrency
        self._stable.record(at_s, value)
        self._panic.record(at_s, value)

    def decide(self, now_s: float, ready_pods: int) -> Decision:
        """Evaluates once; `ready_pods` run, are ready and are not being deleted. Costs O(window)."""
        spec = self._spec
        if spec.scraping and self._stable.is_empty(now_s):
            return self._outcome(ready_pods, None, None, "no data: the former decision stays")
        stable, panic = self._average(self._stable, now_s), self._average(self._panic, now_s)
        wanted = _Wanted(spec, stable, panic, max(1, ready_pods))
        self._update_panic(now_s, wanted.over_threshold)
        reasons = wanted.reasons()
        desired = wanted.stable
        if self._panic_since_s is not None:
            desired = self._panic_most = max(wanted.stable, wanted.panic, self._panic_most)
            reasons.append(f"panic: {wanted.panic} by the panic average of {panic:.6g}, never below {desired}")
        if self._delay and spec.reachable:
            undelayed, desired = desired, self._delay.most(now_s, desired)
            if desired > undelayed:
                reasons.append(f"scale-down-delay keeps {desired}")
        self._desired = desired
        self._excess = _excess_burst_capacity(spec, ready_pods, panic)
        return self._outcome(ready_pods, stable, panic, "; ".join(reasons))

    def _average(self, window: BucketedWindow, now_s: float) -> float:
        if self._spec.aggregation == "weighted-exponential":
            return window.weighted_average(now_s)
        return window.average(now_s)

    def _update_panic(self, now_s: float, over_threshold: bool) -> None:
        if over_threshold:
            self._panic_since_s = now_s
        elif self._panic_since_s is not None and self._panic_since_s + self._spec.stable_window_s < now_s:
            self._panic_since_s = None
            self._panic_most = 0

    def _outcome(self, ready_pods: int, stable: float | None, panic: float | None, reason: str) -> Decision:
        return Decision(
            valid=stable is not None,
            desired=self._desired,
            excess_burst_capacity=self._excess,
            activators=activators(self._spec, ready_pods),
            panic=self._panic_since_s is not None,
            stable=stable,
            panic_average=panic,
            reason=reason,
        )


class _Wanted:
    """Pods that the two averages ask for, within the rate limits. `pods` is at least 1."""

    def __init__(self, spec: ScalerSpec, stable: float, panic: float, pods: int) -> None:
        self._spec = spec
        self._average = stable
        self._up = math.ceil(spec.max_scale_up_rate * pods)
        self._down = math.floor(pods / spec.max_scale_down_rate) if spec.reachable else 0
        self._unlimited = math.ceil(stable / spec.target_value)
        panic_unlimited = math.ceil(panic / spec.target_value)
        self.over_threshold = panic_unlimited / pods >= spec.panic_threshold
        self.stable = self._within_limits(self._unlimited)
        self.panic = self._within_limits(panic_unlimited)

    def _within_limits(self, wanted: int) -> int:
        limited = min(max(wanted, self._down), self._up)
        # Not subject to the rate limit: the very first pods are to come at once.
        return max(limited, self._spec.activation_scale) if wanted > 0 and self._spec.activation_scale > 1 else limited

    def reasons(self) -> list[str]:
        target = format_number(self._spec.target_value)
        told = [f"stable: {self._unlimited} by an average of {self._average:.6g} at {target} a pod"]
        if self._unlimited > self._up:
            told.append(f"max-scale-up-rate allows {self._up}")
        if self._unlimited < self._down:
            told.append(f"max-scale-down-rate allows {self._down}")
        if self._unlimited > 0 and self.stable > max(self._down, min(self._unlimited, self._up)):
            told.append(f"activation-scale asks for {self.stable}")
        return told


class DelayWindow:
    """The largest count decided in the last intervals of one tick.

    After knative/serving pkg/autoscaler/aggregation/max/window.go. Kept as falling counts: an entry goes as soon
    as a later one is as large, so the first is the largest.
    """

    def __init__(self, delay_s: int) -> None:
        self._intervals = math.ceil(delay_s / TICK_S)
        self._falling: deque[tuple[int, int]] = deque()

    def most(self, now_s: float, count: int) -> int:
        """Records `count` and tells the largest of the window that ends now."""
        interval = int(now_s) // TICK_S
        while self._falling and self._falling[-1][1] <= count:
            self._falling.pop()
        self._falling.append((interval, count))
        while self._falling[0][0] <= interval - self._intervals:
            self._falling.popleft()
        return self._falling[0][1]


def activators(spec: ScalerSpec, ready_pods: int) -> int:
    """Activators that the revision's requests are spread over. After pkg/reconciler/autoscaling/kpa/kpa.go."""
    if spec.target_burst_capacity == 0:
        return ACTIVATORS_MIN
    capacity = ready_pods * spec.total_value + max(0.0, spec.target_burst_capacity)
    return max(ACTIVATORS_MIN, math.ceil(capacity / spec.activator_capacity))


def initial_excess_burst_capacity(spec: ScalerSpec) -> int:
    """What is assumed before the first valid evaluation. After pkg/autoscaler/scaling/multiscaler.go."""
    if spec.target_burst_capacity in (-1, 0):
        return int(spec.target_burst_capacity)
    return int(spec.initial_scale * spec.total_value - spec.target_burst_capacity)


def _excess_burst_capacity(spec: ScalerSpec, ready_pods: int, panic_average: float) -> int:
    """Requests that could still come at once; negative: activators stay in the path."""
    if spec.target_burst_capacity in (-1, 0):
        return int(spec.target_burst_capacity)
    return math.floor(ready_pods * spec.total_value - spec.target_burst_capacity - panic_average)
