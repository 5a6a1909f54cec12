"""From the decision to replicas: bounds, going to zero, and whether the activator is in the path.

After knative/serving pkg/reconciler/autoscaling/kpa/kpa.go and scaler.go, and for the activator's place
pkg/reconciler/serverlessservice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from knative.autoscaler.config import ScalerSpec
from knative.autoscaler.kpa import UNDECIDED, Decision, activators, initial_excess_burst_capacity

PROGRESS_BUFFER_S = 30.0
"""Beyond the progress deadline, so that why a pod failed is known before it is taken away."""

PROBE_AGAIN_S = 1.0

PROXY_AGAIN_S = 3.0
"""When the path already leads through the activator, no change of it calls for the next look."""

Mode = Literal["proxy", "serve"]
State = Literal["activating", "active", "inactive"]


@dataclass(frozen=True, slots=True)
class Scaled:
    """What is to be done now."""

    want: int | None  # replicas to have; None: leave them as they are
    mode: Mode  # proxy: requests go through the activator; serve: straight to ready replicas
    state: State
    activators: int
    recheck_after_s: float | None  # reconcile again after this, even if no new decision comes; None: no need
    reason: str


@dataclass(frozen=True, slots=True)
class _Step:
    """Outcome of looking at the wanted count: the count (-1: unknown), whether to apply it, when to look again."""

    want: int
    apply: bool
    reason: str
    recheck_after_s: float | None = None


def bounded(spec: ScalerSpec, desired: int, *, initialized: bool) -> int:
    """`desired` within min and max scale; until `initialized`, an initial scale above 1 is a lower bound too."""
    low = spec.min_scale
    if spec.initial_scale > 1 and not initialized and spec.reachable:
        low = max(low, spec.initial_scale)
    if desired < low:
        return low
    return min(desired, spec.max_scale) if spec.max_scale else desired


class PodScaler:
    """The PodAutoscaler of one revision: its Active condition, and since when the activator is in the path."""

    def __init__(self, spec: ScalerSpec, now_s: float) -> None:
        self._spec = spec
        self._state: State = "activating"
        self._state_since_s = now_s
        self._proxy_since_s: float | None = None
        self._initialized = False

    @property
    def initial_pods(self) -> int:
        """Replicas that a new revision is created with; 0 only where the cluster allows it."""
        return self._spec.initial_scale

    @property
    def initialized(self) -> bool:
        """Whether the revision has once had as many ready pods as min and initial scale ask for."""
        return self._initialized

    def update(self, spec: ScalerSpec) -> None:
        """Another configuration or reachability from now on."""
        self._spec = spec

    def reconcile(self, decision: Decision | None, *, ready_pods: int, pods: int, probed: bool, now_s: float) -> Scaled:
        """What to do now; call it for each new decision, change of `ready_pods` and when `recheck_after_s` is over.

        `pods` is how many replicas are asked for at present; `probed` says whether a probe of the revision's
        address has just been answered by the activator.
        """
        desired = UNDECIDED if decision is None else decision.desired
        excess = initial_excess_burst_capacity(self._spec) if decision is None else decision.excess_burst_capacity
        step = self._scale(desired, probed, now_s)
        mode = self._update_mode(step.want, excess, ready_pods, now_s)
        self._update_state(step.want, ready_pods, now_s)
        want = step.want if step.apply else None
        change = f"{pods} -> {want}: " if want is not None and want != pods else ""
        return Scaled(
            want=want,
            mode=mode,
            state=self._state,
            activators=activators(self._spec, ready_pods),
            recheck_after_s=step.recheck_after_s,
            reason=change + step.reason,
        )

    def _scale(self, desired: int, probed: bool, now_s: float) -> _Step:
        if desired == UNDECIDED and self._state != "activating":
            return _Step(UNDECIDED, False, "no decision yet")
        want = bounded(self._spec, desired, initialized=self._initialized)
        if want > 0:
            reason = "as decided" if want == desired else f"{desired} decided, bounds allow {want}"
            return _Step(want, True, reason)
        if not self._spec.enable_scale_to_zero:
            return _Step(1, True, "enable-scale-to-zero is false")
        if self._state == "activating":
            return self._to_zero_from_activating(now_s)
        if self._state == "active":
            return self._to_zero_from_active(now_s)
        return self._to_zero_from_inactive(probed, now_s)

    def _to_zero_from_activating(self, now_s: float) -> _Step:
        left_s = self._spec.progress_deadline_s + PROGRESS_BUFFER_S - (now_s - self._state_since_s)
        if left_s < 0:
            return _Step(0, True, "not active within the progress deadline")
        # at the very deadline the next look must still come later
        return _Step(UNDECIDED, False, "waiting for the revision to become active", max(left_s, PROBE_AGAIN_S))

    def _to_zero_from_active(self, now_s: float) -> _Step:
        left_s = self._spec.stable_window_s - (now_s - self._state_since_s)
        if left_s > 0:
            return _Step(1, True, "active for less than the stable window", left_s)
        return _Step(0, False, "idle: requests go to the activator before the last pod goes", PROXY_AGAIN_S)

    def _to_zero_from_inactive(self, probed: bool, now_s: float) -> _Step:
        spec = self._spec
        if not probed and spec.target_burst_capacity != -1:
            return _Step(0, False, "the activator does not answer for the revision yet", PROBE_AGAIN_S)
        inactive_s = now_s - self._state_since_s
        if inactive_s >= max(spec.scale_to_zero_grace_s, spec.pod_retention_s):
            return _Step(0, True, "inactive for the grace period")
        if inactive_s < spec.pod_retention_s:
            return _Step(0, False, "pod retention period", spec.pod_retention_s - inactive_s)
        proxied_s = 0.0 if self._proxy_since_s is None else now_s - self._proxy_since_s
        if proxied_s >= spec.scale_to_zero_grace_s:
            return _Step(0, True, "the activator has been in the path for the grace period")
        return _Step(0, False, "scale-to-zero grace period", spec.scale_to_zero_grace_s - proxied_s)

    def _update_mode(self, want: int, excess: int, ready_pods: int, now_s: float) -> Mode:
        """Without a ready pod there is nowhere else to go than to the activator, whatever is decided."""
        asleep = want == 0 or (want == UNDECIDED and self._state == "inactive")
        if not (asleep or excess < 0 or ready_pods == 0):
            self._proxy_since_s = None
            return "serve"
        if self._proxy_since_s is None:
            self._proxy_since_s = now_s
        return "proxy"

    def _update_state(self, want: int, ready_pods: int, now_s: float) -> None:
        """The Active condition: by what is wanted and how many pods are ready, after computeActiveCondition."""
        enough = self._active_threshold()
        if ready_pods >= enough:
            self._initialized = True
        if want == 0 or enough == 0:
            state: State = "inactive"
        elif want == UNDECIDED and self._state == "inactive":
            state = "inactive"
        else:
            state = "active" if ready_pods >= enough else "activating"
        if state != self._state:
            self._state, self._state_since_s = state, now_s

    def _active_threshold(self) -> int:
        if not self._initialized:
            return max(self._spec.min_scale, self._spec.initial_scale)
        return max(self._spec.min_scale, 1)
