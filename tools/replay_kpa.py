"""Replay recorded traces of Knative's pod autoscaler and compare every decision.

A trace is a JSON file with the settings, the samples and ready pods that went in, and what the autoscaler
decided. Integers and truth values must agree exactly; window averages to 1e-6, weighted ones to a relative 1e-9.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

# Run as a file, the interpreter knows only the folder of this file, not the one that holds `knative`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from knative.autoscaler.config import ScalerSpec
from knative.autoscaler.kpa import Autoscaler, Decision
from knative.autoscaler.scale import bounded

START_S = 1_700_000_000.0
"""Unix time of t = 0: an even whole second, as the traces ask."""

Row = Mapping[str, Any]


class TraceError(Exception):
    """A folder or file that cannot be replayed; the text says which and why."""


def trace_files(folder: Path) -> list[Path]:
    """The traces of a folder, by name. Raises TraceError if there are none."""
    if not folder.is_dir():
        raise TraceError(f"{folder} is not a folder; give the one that holds the traces (*.json)")
    found = sorted(folder.glob("*.json"))
    if not found:
        raise TraceError(f"{folder} holds no traces (*.json)")
    return found


def read_trace(path: Path) -> dict[str, Any]:
    """Raises TraceError if the file is no trace."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(f"{path} cannot be read as JSON: {error}") from None
    wanted = ("config", "samples", "expected")
    if not isinstance(trace, dict) or any(key not in trace for key in wanted):
        raise TraceError(f"{path} is no trace: it needs an object with {', '.join(wanted)}")
    return trace


def spec_of(config: Row) -> ScalerSpec:
    """The `config` of a trace as a spec; keys that are no part of one are left out."""
    return ScalerSpec(**{field.name: config[field.name] for field in fields(ScalerSpec) if field.name in config})


def first_difference(trace: Row) -> str | None:
    """When and where the decisions first leave the recorded ones; None if they never do."""
    weighted = trace["config"]["aggregation"] != "linear"
    for expected, actual in zip(trace["expected"], replay(trace), strict=True):
        for key, value in expected.items():
            if key in actual and not _agree(key, value, actual[key], weighted):
                return f"at t={expected['t']:g}: {key} is {actual[key]}, expected {value} ({actual['reason']})"
    return None


def replay(trace: Row) -> Iterator[dict[str, Any]]:
    """One row for each of `expected`, under the same names."""
    config = trace["config"]
    spec, ready = spec_of(config), config["ready_pods_at_start"]
    scaler = Autoscaler(spec, START_S, ready)
    enough = max(spec.min_scale, spec.initial_scale)
    initialized = ready >= enough
    samples = iter(trace["samples"])
    sample = next(samples, None)
    for expected in trace["expected"]:
        while sample is not None and sample["t"] <= expected["t"]:
            _record(scaler, sample)
            ready = sample["ready_pods"]
            initialized |= ready >= enough
            sample = next(samples, None)
        decision = scaler.decide(START_S + expected["t"], ready)
        yield _row(decision, bounded(spec, decision.desired, initialized=initialized))


def _record(scaler: Autoscaler, sample: Row) -> None:
    concurrency, rps = sample.get("concurrency_total"), sample.get("rps_total")
    if concurrency is not None or rps is not None:
        scaler.record(START_S + sample.get("stat_t", sample["t"]), concurrency or 0.0, rps or 0.0)


def _row(decision: Decision, bounded_pods: int) -> dict[str, Any]:
    valid = decision.valid
    return {
        "scale_valid": valid,
        "desired_pod_count": decision.desired if valid else None,
        "excess_burst_capacity": decision.excess_burst_capacity if valid else None,
        "num_activators": decision.activators,
        "panic": decision.panic,
        "observed_stable": decision.stable,
        "observed_panic": decision.panic_average,
        "bounded_pod_count": bounded_pods if valid else None,
        "reason": decision.reason,
    }


def _agree(key: str, expected: object, actual: object, weighted: bool) -> bool:
    if key.startswith("observed_") and isinstance(expected, int | float) and isinstance(actual, int | float):
        return math.isclose(expected, actual, rel_tol=1e-9 if weighted else 0.0, abs_tol=0.0 if weighted else 1e-6)
    return type(expected) is type(actual) and expected == actual


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all match, 1 some differ, 2 the folder or a file cannot be replayed."""
    parser = argparse.ArgumentParser(
        prog="replay_kpa.py",
        description=__doc__,
        epilog="example: python tools/replay_kpa.py ../shared/conformance/kpa",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of traces (*.json)")
    folder = parser.parse_args(arguments).folder
    try:
        return _replay_all(trace_files(folder))
    except TraceError as error:
        print(f"replay_kpa.py: {error}", file=sys.stderr)
        return 2


def _replay_all(paths: list[Path]) -> int:
    different = 0
    for path in paths:
        trace = read_trace(path)
        try:
            difference = first_difference(trace)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise TraceError(f"{path} has not the form of a trace ({what}); see the README beside it") from None
        if difference:
            different += 1
            print(f"{path.stem}: {difference}")
    print(f"{len(paths) - different} of {len(paths)} traces match")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
