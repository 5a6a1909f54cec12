"""Requests in and out, as the averages of one reporting period that the autoscaler's windows take.

After knative/serving pkg/network/stats.go and pkg/activator/handler/concurrency_reporter.go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class StatReport:
    """One reporting period of one queue-proxy, or of the activator for one revision."""

    concurrency: float  # time-weighted mean of the requests in flight
    proxied_concurrency: float  # the part of it that came through an activator, which reports it itself
    requests: float  # arrived in the period
    proxied_requests: float
    seconds: float  # length of the period


class RequestStats:
    """Counts requests between two reports. Times must not go back; one that does counts as no time."""

    def __init__(self, now_s: float) -> None:
        self._changed_s = now_s
        self._in_flight = self._proxied_in_flight = 0
        self._reset()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def request_in(self, now_s: float, proxied: bool) -> None:
        self._advance(now_s)
        self._in_flight += 1
        self._requests += 1
        if proxied:
            self._proxied_in_flight += 1
            self._proxied_requests += 1

    def request_out(self, now_s: float, proxied: bool) -> None:
        """`proxied` as it was given when this request came in."""
        self._advance(now_s)
        self._in_flight -= 1
        if proxied:
            self._proxied_in_flight -= 1

    def report(self, now_s: float) -> StatReport:
        """The period since the last report; a new one starts. Without any time passed, concurrencies are 0."""
        self._advance(now_s)
        seconds = self._seconds or 1.0  # the sums are 0 then
        report = StatReport(
            concurrency=self._request_seconds / seconds,
            proxied_concurrency=self._proxied_request_seconds / seconds,
            requests=float(self._requests),
            proxied_requests=float(self._proxied_requests),
            seconds=self._seconds,
        )
        self._reset()
        return report

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._changed_s
        if passed_s > 0:
            self._seconds += passed_s
            self._request_seconds += self._in_flight * passed_s
            self._proxied_request_seconds += self._proxied_in_flight * passed_s
            self._changed_s = now_s

    def _reset(self) -> None:
        self._seconds = self._request_seconds = self._proxied_request_seconds = 0.0
        self._requests = self._proxied_requests = 0


class ActivatorStats:
    """What the activator tells the autoscaler about one revision.

    The first request after a quiet period is told at once, so that a revision at zero need not wait for the
    next report; that report leaves it out.
    """

    def __init__(self) -> None:
        self._stats: RequestStats | None = None
        self._told_at_once = 0

    def request_in(self, now_s: float) -> float | None:
        """The concurrency to record at once, if any (with one request)."""
        first = self._stats is None
        if self._stats is None:
            self._stats = RequestStats(now_s)
            self._told_at_once = 1
        self._stats.request_in(now_s, proxied=False)
        return 1.0 if first else None

    def request_out(self, now_s: float) -> None:
        if self._stats is not None:
            self._stats.request_out(now_s, proxied=False)

    def report(self, now_s: float) -> StatReport | None:
        """The period since the last report; None if the revision has been quiet since before that."""
        if self._stats is None:
            return None
        report = self._stats.report(now_s)
        told, self._told_at_once = self._told_at_once, 0
        if report.concurrency == 0 and self._stats.in_flight == 0:
            self._stats = None
        return replace(report, concurrency=max(report.concurrency - told, 0.0), requests=report.requests - told)
