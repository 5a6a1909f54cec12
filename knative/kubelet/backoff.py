"""How long to wait before a replica that ended is started again. After pkg/kubelet (CrashLoopBackOff)."""

from __future__ import annotations

_CAP = 30  # times the initial delay: 300 s for Kubernetes' 10 s
_FORGIVEN = 60  # times the initial delay: a run of 600 s and all before is forgotten


class Backoff:
    """The first restart is at once, then `initial_s`, doubled each time up to 30 times `initial_s`."""

    def __init__(self, initial_s: float = 10.0) -> None:
        self._initial_s = initial_s
        self._delay_s = 0.0

    def after_run(self, ran_s: float) -> float:
        """Seconds to wait now that a run of `ran_s` seconds has ended."""
        if ran_s >= _FORGIVEN * self._initial_s:
            self._delay_s = 0.0
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s or self._initial_s, _CAP * self._initial_s)
        return delay_s
