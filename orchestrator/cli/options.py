"""Values of options that several commands read alike."""

from __future__ import annotations

from orchestrator.cli.console import fail


def duration_s(option: str, text: str) -> float:
    """Seconds of a duration as Knative writes it. Ends the command with 2 when it is none."""
    from knative.autoscaler.durations import parse_duration_s

    try:
        seconds = parse_duration_s(text)
    except ValueError:
        seconds = -1.0
    if seconds < 0:
        fail(f"{option}: {text!r} is no duration such as 500ms, 30s or 1m30s", 2)
    return seconds
